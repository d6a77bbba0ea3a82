"""Import this to be able to import ``ansible_collections.mixtral.tpu``, as Ansible itself does."""

from ansible.plugins.loader import init_plugin_loader

# Finds the collection below collections/, which ansible.cfg names.
init_plugin_loader()
