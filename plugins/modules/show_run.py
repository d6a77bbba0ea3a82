"""Documentation of the action plugin ``show_run``, which does all the work."""

DOCUMENTATION = """
module: show_run
short_description: Displays the table of a run
description:
  - >-
    Displays what was measured, where the run's files are, and which workers failed. Where the
    callback C(mixtral.tpu.run_report) is enabled, it displays the same table after the recap, and
    the task displays nothing.
  - Runs on the controller, changes nothing, and does not fail because the run has failed.
author: mixtral-tpu contributors
options:
  run_dir:
    description: The run's directory on the controller, with C(report.json).
    type: path
    required: true
  symptoms:
    description: >-
      The symptoms that the Cloud TPU API reports, a list of texts for each worker's host.
    type: dict
    default: {}
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
- name: Show the run
  mixtral.tpu.show_run:
    run_dir: runs/latest
"""

RETURN = """
run_id:
  description: The run's name.
  type: str
  returned: success
status:
  description: One of C(succeeded), C(failed) and C(stopped).
  type: str
  returned: success
numbers:
  description: >-
    C(loss) (nats a token), C(step_time_s), C(host_clock_s) and C(split_s) (seconds),
    C(tokens_per_s_per_device), C(mfu) (a fraction), C(compile) and C(peak_memory_bytes), as in
    C(report.json). A number that is unknown is null.
  type: dict
  returned: success
report:
  description: The path of C(report.json), which has all numbers.
  type: str
  returned: success
lines:
  description: The table, line by line.
  type: list
  elements: str
  returned: success
"""
