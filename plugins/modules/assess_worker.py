"""Documentation of the action plugin ``assess_worker``, which does all the work."""

DOCUMENTATION = """
module: assess_worker
short_description: Assesses whether a worker can train, or has a run to follow
description:
  - Fails with every obstacle at once, each with the command that removes it.
  - >-
    Judges what earlier tasks have collected. It runs on the controller and connects to no worker.
  - >-
    In check mode the configuration files are not compared, because C(site.yml) has copied none.
author: mixtral-tpu contributors
options:
  inspections:
    description: >-
      For each worker of the slice, by its inventory name, what M(mixtral.tpu.trainer_state) has
      returned on it.
    type: dict
    required: true
  wanted:
    description: >-
      The run that is to be started. It has a C(command), a list, and an C(environment), a
      dictionary.
    type: dict
    required: true
  resume:
    description: >-
      V(must) resumes a run or fails, V(auto) resumes one if there is one, and V(never) starts a new
      run. V(bucket) leaves it to the trainer, because the checkpoints are not on the workers.
    type: str
    choices: [auto, bucket, must, never]
    required: true
  name:
    description: The name of the run to follow, to resume or to start. By default any.
    type: str
    default: ""
  detach:
    description: Whether the run is to go on without being followed.
    type: bool
    default: false
  runtime:
    description: Whether the trainer runs in a container or without one.
    type: str
    choices: [container, native]
    required: true
  runs_dir:
    description: The directory of all runs on the worker.
    type: str
    required: true
  stack:
    description: The name of the stack, with O(runtime=native).
    type: str
    required: true
  venv:
    description: The worker's virtual environment of the stack, with O(runtime=native).
    type: str
    required: true
  venv_exists:
    description: Whether the virtual environment is installed completely.
    type: bool
    required: true
  image:
    description: The name of the trainer's image, with O(runtime=container).
    type: str
    required: true
  images:
    description: What the worker's engine says of this image. Empty if it has none.
    type: list
    elements: dict
    required: true
  identity:
    description: The identity that the image must have. By default any.
    type: str
    default: ""
  configuration:
    description: >-
      What M(ansible.builtin.stat) has returned on the worker for each configuration file, with a
      checksum by SHA-1. The item of each has the file's C(name) and its C(source) on the
      controller.
    type: list
    elements: dict
    required: true
  accelerator_users:
    description: What M(mixtral.tpu.accelerator_users) has returned on the worker.
    type: list
    elements: dict
    required: true
  free_gib:
    description: The free space for the run's files, in GiB.
    type: float
    required: true
  needed_gib:
    description: The space that the run's files need, in GiB.
    type: float
    required: true
extends_documentation_fragment: ansible.builtin.action_common_attributes
attributes:
  check_mode:
    support: full
  diff_mode:
    support: none
  platform:
    platforms: posix
seealso:
  - module: mixtral.tpu.trainer_state
  - module: mixtral.tpu.accelerator_users
"""

EXAMPLES = """
- name: Inspect the worker
  mixtral.tpu.trainer_state:
    container: mixtral-trainer
    runs_dir: ~/mixtral-trainer/runs
  register: inspection

- name: Assess whether the worker is ready, and select the run
  mixtral.tpu.assess_worker:
    inspections: >-
      {{ dict(ansible_play_hosts_all
              | zip(ansible_play_hosts_all | map('extract', hostvars, 'inspection'))) }}
    wanted:
      command: [python, -m, trainer, --max_steps, "20"]
      environment: {PJRT_DEVICE: TPU}
    resume: auto
    runtime: native
    runs_dir: ~/mixtral-trainer/runs
    stack: release
    venv: ~/mixtral-trainer/stack
    venv_exists: true
    image: ""
    images: []
    configuration: []
    accelerator_users: []
    free_gib: 120
    needed_gib: 10
"""

RETURN = """
run_id:
  description: The run to follow, or null if a run is to be started.
  type: str
  returned: success
resumes:
  description: The run that is resumed from its checkpoint, or null if none is.
  type: str
  returned: success
"""
