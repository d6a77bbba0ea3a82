#!/usr/bin/python
"""Ansible module: lists the processes that hold a worker's accelerator."""

from __future__ import annotations

import glob
import os

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: accelerator_users
short_description: Lists the processes that hold the accelerator
description:
  - >-
    Searches the open files of all processes, as C(fuser) does, with nothing but Python on the
    worker. Only root can read the open files of other users' processes.
author: mixtral-tpu contributors
options:
  paths:
    description: The accelerator's device files and locks, as patterns.
    type: list
    elements: str
    default: ['/dev/accel*', '/dev/vfio/[0-9]*', /tmp/libtpu_lockfile]
extends_documentation_fragment: ansible.builtin.action_common_attributes
attributes:
  check_mode:
    support: full
  diff_mode:
    support: none
  platform:
    platforms: posix
"""

EXAMPLES = r"""
- name: List the processes that hold the accelerator
  become: true
  mixtral.tpu.accelerator_users:
"""

RETURN = r"""
users:
  description: Each process with its C(pid), its C(command) line and the C(path) of the open file.
  type: list
  elements: dict
  returned: always
"""


def open_files(pid: str) -> set[str]:
    """Return the real paths of a process's open files, none if the process has ended."""
    found = set()
    directory = f"/proc/{pid}/fd"
    try:
        for descriptor in os.listdir(directory):
            found.add(os.readlink(os.path.join(directory, descriptor)))
    except OSError:
        # The process has ended meanwhile, or belongs to another user.
        pass
    return found


def command_line(pid: str) -> str:
    """Return a process's command line, empty if the process has ended."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def users(patterns: list[str]) -> list[dict[str, str | int]]:
    """Return the processes with an open file that matches one of ``patterns``, sorted by pid."""
    paths = {os.path.realpath(path) for pattern in patterns for path in glob.glob(pattern)}
    found = []
    for pid in sorted(filter(str.isdecimal, os.listdir("/proc")), key=int):
        for path in sorted(open_files(pid) & paths):
            found.append({"pid": int(pid), "command": command_line(pid), "path": path})
    return found


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "paths": {
                "type": "list",
                "elements": "str",
                "default": ["/dev/accel*", "/dev/vfio/[0-9]*", "/tmp/libtpu_lockfile"],
            }
        },
        supports_check_mode=True,
    )
    module.exit_json(changed=False, users=users(module.params["paths"]))


if __name__ == "__main__":
    main()
