"""Documentation of the action plugin ``slice_info``, which does all the work."""

DOCUMENTATION = """
module: slice_info
short_description: Lists the TPU slices of a zone
description:
  - Lists all slices with their state, age, chip-hours and health, also those on which nothing runs.
  - >-
    Runs on the controller, which calls the Cloud TPU API. The credentials come from the environment
    variables of P(mixtral.tpu.gcp_tpu#inventory), beginning with E(GCP_AUTH_KIND).
author: mixtral-tpu contributors
requirements:
  - google-cloud-tpu
options:
  project:
    description: The id of the Google Cloud project.
    type: str
    required: true
  zone:
    description: The zone.
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
seealso:
  - module: mixtral.tpu.slice
"""

EXAMPLES = """
- name: List the slices of the zone
  mixtral.tpu.slice_info:
    project: my-project
    zone: us-east5-a
  register: listed
  run_once: true

- name: Show the slices
  ansible.builtin.debug:
    msg: "{{ listed.lines }}"
  run_once: true
"""

RETURN = """
lines:
  description: One line for each slice, sorted by name.
  type: list
  elements: str
  returned: success
  sample:
    - "my-tpu: v5p-16, READY, healthy, 1.5 hours old, 12.0 chip-hours"
symptoms:
  description: >-
    For each worker that has any, by its inventory name, what the API reports of its health, and
    the state of a slice that is not ready.
  type: dict
  returned: success
  sample:
    my-tpu-w0: [LOW_MEMORY, at 2026-01-02T03:04:05Z]
"""
