"""What several plugins of the controller share; nothing here is sent to a worker.

Ansible loads a plugin by its path and leaves this project off ``sys.path``. A plugin that imports
from here appends the project's directory first.
"""
