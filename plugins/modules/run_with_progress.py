"""Documentation of the action plugin ``run_with_progress``, which does all the work."""

DOCUMENTATION = """
module: run_with_progress
short_description: runs a long command on the worker and shows that it moves
description:
  - Runs a shell command in a new directory of its own, which is removed afterwards.
  - The last line of its output appears on the screen every ten seconds. When the command fails, the
    last twenty lines are in the error.
  - The command goes on when the playbook is interrupted.
  - It always reports a change, and in check mode it only says what it would do.
options:
  cmd:
    description: the command, for C(/bin/sh)
    type: str
    required: true
  root:
    description: the directory on the controller that O(files) are relative to
    type: path
  files:
    description: files of the controller, laid out the same below the directory's C(files)
    type: list
    elements: str
  private:
    description: names and contents of files below the directory's C(private), such as passwords
    type: dict
    default: {}
  would:
    description: what the command does, in a few words that complete "would ..."
    type: str
    required: true
author:
  - mixtral-tpu contributors
"""

EXAMPLES = """
- name: Count the lines of the trainer
  run_with_progress:
    would: count lines
    root: "{{ playbook_dir }}/.."
    files: [trainer/loop.py]
    cmd: wc --lines files/trainer/loop.py
"""

RETURN = """
rc:
  description: exit code of the command
  type: int
  returned: when it ran
"""
