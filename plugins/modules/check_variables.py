"""Documentation of the action plugin ``check_variables``, which does all the work."""

DOCUMENTATION = """
module: check_variables
short_description: Refuses variables that nobody reads, and values that do not fit
description:
  - >-
    Fails with everything that is wrong with the variables of the command line and of the inventory,
    before a worker is touched.
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
  run_once: true
"""

RETURN = """
"""
