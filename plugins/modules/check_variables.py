"""Documentation of the action plugin ``check_variables``, which does all the work."""

DOCUMENTATION = """
module: check_variables
short_description: Refuses variables that nobody reads, and values that do not fit
description:
  - >-
    Fails with everything that is wrong with the variables of the command line and of the inventory,
    before a worker is touched.
  - >-
    Warns of a name in the inventory that has no effect and is nearly one that users set.
  - Runs on the controller.
author: mixtral-tpu contributors
options: {}
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
- name: Check the variables
  mixtral.tpu.check_variables:
  register: checked
  run_once: true
"""

RETURN = """
given:
  description:
    - >-
      The settings, as the roles read them, whose value is that of another name after C(-e), each
      with this name. An inventory may have a value of the setting itself, which counts less.
  type: dict
  returned: success
  sample: {mixtral_zone: zone}
"""
