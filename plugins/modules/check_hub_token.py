"""Documentation of the action plugin ``check_hub_token``, which does all the work."""

DOCUMENTATION = """
module: check_hub_token
short_description: Checks a token with the Hugging Face hub
description:
  - >-
    Asks the hub whose the token is, and whether it may read some repositories. Fails with
    everything that it may not do, and the next step.
  - >-
    Reads the token from the variable C(huggingface__token), a dictionary with C(value) and
    C(source) as P(mixtral.tpu.hub_token#lookup) returns it. The token is neither an option nor part
    of the result, so the task needs no C(no_log).
  - Runs on the controller. The token is sent to no worker.
  - A hub that is busy or unreachable is asked up to four times.
author: mixtral-tpu contributors
options:
  endpoint:
    description: The hub's address. By default the public hub.
    type: str
    default: ""
  models:
    description: >-
      Repositories of models that the token must be able to read. A name that no repository can have
      is a local path, and is passed over.
    type: list
    elements: str
    default: []
  datasets:
    description: Repositories of datasets, likewise.
    type: list
    elements: str
    default: []
extends_documentation_fragment: ansible.builtin.action_common_attributes
attributes:
  check_mode:
    support: full
  diff_mode:
    support: none
  platform:
    platforms: posix
seealso:
  - plugin: mixtral.tpu.hub_token
    plugin_type: lookup
"""

EXAMPLES = """
- name: Check the token with the hub
  mixtral.tpu.check_hub_token:
    models: [mistralai/Mixtral-8x7B-v0.1]
    datasets: [wikitext]
  vars:
    huggingface__token: "{{ lookup('mixtral.tpu.hub_token') }}"
  run_once: true
"""

RETURN = """
user:
  description: The user whom the token belongs to, or null without a token.
  type: str
  returned: success
"""
