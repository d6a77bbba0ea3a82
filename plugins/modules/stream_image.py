"""Documentation of the action plugin ``stream_image``, which does all the work."""

DOCUMENTATION = """
module: stream_image
short_description: streams an image's archive into the worker's Docker engine
description:
  - Pipes an archive of the controller into C(docker load) on the worker, over Ansible's connection
    to the worker.
  - Displays every ten seconds how much was sent. If loading fails, docker's own message is in the
    error, and the worker has no new image.
  - The task always reports a change. It is skipped in check mode.
  - The connection must be C(ssh) or C(local), and C(become) must not need a password.
options:
  archive:
    description: a file that C(docker save) has written, compressed or not
    type: path
    required: true
author:
  - mixtral-tpu contributors
"""

EXAMPLES = """
- name: Load the image
  become: true
  stream_image:
    archive: ~/image.tar.gz
"""

RETURN = """
rc:
  description: exit code of C(docker load)
  type: int
  returned: always
"""
