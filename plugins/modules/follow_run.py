"""Documentation of the action plugin ``follow_run``, which does all the work."""

DOCUMENTATION = """
module: follow_run
short_description: Follows a worker's run to its end
description:
  - >-
    Renews the run's lease at every poll, copies the new parts of the worker's log and metrics to
    the controller, and displays the progress. Fails unless the trainer has succeeded.
  - >-
    Has to run on all O(workers) of the run at the same time, with a fork for each. When the trainer
    of one fails, those of the others are stopped.
  - Writes C(exit.json), which says how the trainer has ended.
  - The task always reports a change. It is skipped in check mode.
author: mixtral-tpu contributors
options:
  run_id:
    description: The run.
    type: str
    required: true
  container:
    description: The name of the trainer's container.
    type: str
    required: true
  process_dir:
    description: The worker's directory of a trainer without a container.
    type: str
    required: true
  runs_dir:
    description: The worker's directory of all runs.
    type: str
    required: true
  local_dir:
    description: >-
      The run's directory on the controller. The files of each worker are in its
      C(workers/<inventory name>), which has to exist.
    type: path
    required: true
  workers:
    description: >-
      The inventory names of all workers of the run. The first one that still runs displays the
      progress.
    type: list
    elements: str
    required: true
  since:
    description: When the run was started or found, in seconds since 1970.
    type: float
    required: true
  max_steps:
    description: >-
      The number of steps until the trainer announces it, V(0) if it is unknown.
    type: int
    required: true
  lease_seconds:
    description: Seconds without an answer after which the worker is given up as lost.
    type: int
    required: true
  stop_seconds:
    description: >-
      Seconds that a trainer has to end when it is stopped. Its container gets ten seconds more.
    type: int
    required: true
  poll_seconds:
    description: Seconds between two polls.
    type: float
    required: true
extends_documentation_fragment: ansible.builtin.action_common_attributes
attributes:
  check_mode:
    support: none
  diff_mode:
    support: none
  platform:
    platforms: posix
seealso:
  - module: mixtral.tpu.trainer_state
"""

EXAMPLES = """
- name: Follow every worker to the end of the run
  become: true
  mixtral.tpu.follow_run:
    run_id: 20261125-143645
    container: mixtral-trainer
    process_dir: /home/ada/mixtral-trainer/process
    runs_dir: /home/ada/mixtral-trainer/runs
    local_dir: runs/20261125-143645
    workers: "{{ ansible_play_hosts_all }}"
    since: "{{ now().timestamp() }}"
    max_steps: 140
    lease_seconds: 300
    stop_seconds: 60
    poll_seconds: 2
"""

RETURN = """
lost:
  description: >-
    Whether the worker no longer answers, or has no such run any more. How the trainer has ended is
    unknown then.
  type: bool
  returned: always
msg:
  description: How the run has ended, in one line.
  type: str
  returned: always
"""
