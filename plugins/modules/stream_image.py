"""Documentation of the action plugin ``stream_image``, which does all the work."""

DOCUMENTATION = """
module: stream_image
short_description: Streams an image's archive into the worker's Docker engine
description:
  - Pipes an archive of the controller into C(docker load) on the worker, over Ansible's connection
    to the worker.
  - Displays every ten seconds how much was sent. If loading fails, docker's own message is in the
    error, and the worker has no new image.
  - The task always reports a change. It is skipped in check mode.
  - The connection must be C(ssh) or C(local), and C(become) must not need a password.
author: mixtral-tpu contributors
options:
  archive:
    description: A file of the controller that C(docker save) has written, compressed or not.
    type: path
    required: true
extends_documentation_fragment: ansible.builtin.action_common_attributes
attributes:
  check_mode:
    support: none
  diff_mode:
    support: none
  platform:
    platforms: posix
"""

EXAMPLES = """
- name: Load the image
  become: true
  mixtral.tpu.stream_image:
    archive: ~/image.tar.gz
"""

RETURN = """
rc:
  description: The exit code of C(docker load).
  type: int
  returned: always
"""
