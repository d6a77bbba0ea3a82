"""Documentation of the action plugin ``stream_image``, which does all the work."""

DOCUMENTATION = """
module: stream_image
short_description: streams an image's archive into the worker's Docker engine
description:
  - Pipes an archive of the controller into C(docker load) on the worker, over the connection that
    Ansible has to it.
  - Every ten seconds the screen shows how much was sent. When it fails, docker's own words are in
    the error, and no image has come to be.
  - It always reports a change. It has no check mode.
  - Works over C(ssh) and C(local), and where becoming another user takes no password.
options:
  archive:
    description: what C(docker save) wrote, compressed or not
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
