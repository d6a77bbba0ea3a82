"""The collection in the tests' own Python."""

from functools import cache

from ansible.plugins.loader import init_plugin_loader


@cache
def make_importable() -> None:
    """Let ``ansible_collections.mixtral.tpu`` be imported, as in Ansible's own programs.

    It is found below collections/, which ansible.cfg names.
    """
    init_plugin_loader()
