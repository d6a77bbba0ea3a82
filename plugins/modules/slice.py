"""Documentation of the action plugin ``slice``, which does all the work."""

DOCUMENTATION = """
module: slice
short_description: Creates or deletes a TPU slice
description:
  - >-
    Creates a slice, or a queued resource of one or more slices, and waits until its workers exist;
    or deletes it, and waits until it is gone. A slice that was preempted, or whose request has
    failed, is deleted and created again.
  - >-
    Of an existing slice only labels, metadata and SSH key are changed. If it differs in anything
    else that is given, the task fails and names the differences.
  - >-
    Runs on the controller, which calls the Cloud TPU API. The credentials come from the environment
    variables of P(mixtral.tpu.gcp_tpu#inventory), beginning with E(GCP_AUTH_KIND).
author: mixtral-tpu contributors
requirements:
  - google-cloud-tpu
options:
  state:
    description: >-
      V(present) creates the slice, V(absent) deletes it. Required unless O(expired) is true.
    type: str
    default: ""
  expired:
    description: >-
      Delete every slice of the zone that is older than the O(max_hours) that it was created with.
    type: bool
    default: false
  name:
    description: >-
      The name of the slice and of its queued resource. Required unless O(expired) is true.
    type: str
    default: ""
  project:
    description: The id of the Google Cloud project.
    type: str
    required: true
  zone:
    description: The slice's zone.
    type: str
    required: true
  accelerator_type:
    description: >-
      The slice's accelerator type, such as V(v5p-128), or only the chip, such as V(v5p), together
      with O(topology). Required to create a slice.
    type: str
    default: ""
  topology:
    description: The arrangement of the slice's chips, such as V(4x4x4).
    type: str
    default: ""
  runtime_version:
    description: The software version of the TPU VMs. By default the one for the chip.
    type: str
    default: ""
  spot:
    description: >-
      Create a spot slice, which costs less and can be preempted at any time. Excludes O(reserved).
    type: bool
    default: false
  reserved:
    description: Create the slice in a reservation.
    type: bool
    default: false
  queued:
    description: Request the slice as a queued resource, which waits for capacity.
    type: bool
    default: false
  count:
    description: >-
      The number of slices. More than one are always a queued resource. With V(0) one slice is
      created, and an existing number is not compared.
    type: int
    default: 0
  max_hours:
    description: >-
      Hours after which O(expired) deletes the slice. With V(0) it never expires.
    type: float
    default: 0
  network:
    description: The network. By default the project's default network.
    type: str
    default: ""
  subnetwork:
    description: The subnetwork.
    type: str
    default: ""
  external_ips:
    description: Give every worker an external address.
    type: bool
    default: true
  labels:
    description: Labels to set on the slice. Its other labels stay.
    type: dict
    default: {}
  metadata:
    description: Metadata to set on the TPU VMs. Their other metadata stays.
    type: dict
    default: {}
  service_account:
    description: >-
      The service account of the TPU VMs. By default the project's Compute Engine service account.
    type: str
    default: ""
  data_disks:
    description: Names or paths of disks to attach to the TPU VMs.
    type: list
    elements: str
    default: []
  ssh_user:
    description: The user who may log in with the key in O(ssh_public_key_file).
    type: str
    default: ""
  ssh_public_key_file:
    description: >-
      The public SSH key to put into the metadata. By default C(~/.ssh/google_compute_engine.pub),
      which gcloud creates, if that file exists. With OS Login no key is put there.
    type: path
    default: ""
  timeout_minutes:
    description: Minutes to wait until the slice is ready, or gone.
    type: float
    default: 60
  poll_seconds:
    description: Seconds between two queries of the API.
    type: float
    default: 10
  known_hosts:
    description: >-
      The file from which the SSH host keys of a deleted slice are removed, that of
      P(mixtral.tpu.gcp_tpu#inventory).
    type: path
    default: ~/.ssh/mixtral_tpu_known_hosts
extends_documentation_fragment: ansible.builtin.action_common_attributes
attributes:
  check_mode:
    support: full
  diff_mode:
    support: full
  platform:
    platforms: posix
seealso:
  - module: mixtral.tpu.slice_info
  - plugin: mixtral.tpu.gcp_tpu
    plugin_type: inventory
"""

EXAMPLES = """
- name: Create a slice of eight chips
  mixtral.tpu.slice:
    state: present
    name: my-tpu
    project: my-project
    zone: us-east5-a
    accelerator_type: v5p-16
    max_hours: 8
    ssh_user: ada

- name: Delete the slice
  mixtral.tpu.slice:
    state: absent
    name: my-tpu
    project: my-project
    zone: us-east5-a

- name: Delete all slices that have expired
  mixtral.tpu.slice:
    expired: true
    project: my-project
    zone: us-east5-a
"""

RETURN = """
msg:
  description: The resulting state, with the number of workers, the age and the chip-hours.
  type: str
  returned: always
"""
