"""Documentation of the action plugin ``run_with_progress``, which does all the work."""

DOCUMENTATION = """
module: run_with_progress
short_description: Runs a long command on the worker and displays its progress
description:
  - Runs a shell command in a new directory, which is removed afterwards.
  - Displays the last line of the command's output every ten seconds. If the command fails, the last
    twenty lines are in the error.
  - The command goes on when the playbook is interrupted.
  - The task always reports a change. In check mode it only displays what the command would do.
author: mixtral-tpu contributors
options:
  cmd:
    description: The command, for C(/bin/sh).
    type: str
    required: true
  root:
    description: >-
      The directory on the controller that O(files) are relative to. Required with them.
    type: path
  files:
    description: >-
      Files of the controller, copied with their paths below the directory's C(files).
    type: list
    elements: str
  private:
    description: >-
      Names and contents of files below the directory's C(private), such as passwords.
    type: dict
    default: {}
  would:
    description: What the command does, as the end of a sentence that begins with "would".
    type: str
    required: true
extends_documentation_fragment: ansible.builtin.action_common_attributes
attributes:
  check_mode:
    support: full
  diff_mode:
    support: none
  platform:
    platforms: posix
"""

EXAMPLES = """
- name: Count the lines of the trainer
  mixtral.tpu.run_with_progress:
    would: count lines
    root: "{{ playbook_dir }}/.."
    files: [trainer/loop.py]
    cmd: wc --lines files/trainer/loop.py
"""

RETURN = """
rc:
  description: The exit code of the command.
  type: int
  returned: when the command was started
"""
