#!/usr/bin/python
"""Ansible module: which processes of a worker hold its accelerator."""

from __future__ import annotations

import glob
import os

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: accelerator_users
short_description: Which processes hold the accelerator
description:
  - >-
    Looks through the open files of all processes, as C(fuser) does, and needs
    nothing on the worker but Python. Only root sees the files of others.
author: mixtral-tpu contributors
options:
  paths:
    description: The accelerator's device files and locks, as patterns.
    type: list
    elements: str
    default: ['/dev/accel*', '/dev/vfio/[0-9]*', /tmp/libtpu_lockfile]
attributes:
  check_mode:
    support: full
"""

EXAMPLES = r"""
- name: Look who uses the accelerator
  become: true
  accelerator_users:
"""

RETURN = r"""
users:
  description: Each process with its C(pid), its C(command) line and the C(path) that it holds.
  type: list
  elements: dict
  returned: always
"""


def open_files(pid: str) -> set[str]:
    """Return the real paths of the files that a process has open; none of one that has ended."""
    found = set()
    directory = f"/proc/{pid}/fd"
    try:
        for descriptor in os.listdir(directory):
            found.add(os.readlink(os.path.join(directory, descriptor)))
    except OSError:
        # It ended while it was looked at.
        pass
    return found


def command_line(pid: str) -> str:
    """Return a process's command line, nothing of one that has ended."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def users(patterns: list[str]) -> list[dict[str, str | int]]:
    """Return the processes that have a file open which one of the ``patterns`` fits, by pid."""
    paths = {os.path.realpath(path) for pattern in patterns for path in glob.glob(pattern)}
    found = []
    for pid in sorted(filter(str.isdecimal, os.listdir("/proc")), key=int):
        for path in sorted(open_files(pid) & paths):
            found.append({"pid": int(pid), "command": command_line(pid), "path": path})
    return found


def main() -> None:
    """Answer the task."""
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
