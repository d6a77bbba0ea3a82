"""Documentation of the action plugin ``check_requirements``, which does all the work."""

DOCUMENTATION = """
module: check_requirements
short_description: fails unless the controller's Python has what it needs
description:
  - Compares the packages of the Python that runs Ansible with the collection's C(requirements.txt).
  - If one is missing or has another version, the error names it, and the command that installs it.
  - Runs on the controller, connects to no worker and changes nothing.
options: {}
author:
  - mixtral-tpu contributors
"""

EXAMPLES = """
- name: Require the controller's Python packages
  mixtral.tpu.check_requirements:
"""

RETURN = ""
