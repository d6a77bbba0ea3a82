"""Lookup for the settings of the controller's pip, in a form that works inside an image build."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleLookupError
from ansible.plugins.lookup import LookupBase

DOCUMENTATION = """
name: pip_settings
short_description: The settings by which the controller's pip reaches its package index
description:
  - Reads C(pip config list), which has both the configuration files and the C(PIP_*) variables.
  - Returns the settings for the addresses of packages and for the network. A local directory and a
    C(file://) index are left out, because they do not exist inside a build.
  - The result can contain an index's password, so it has to be a secret of the build.
options:
  ca_path:
    description: The path of the certificate bundle inside the build.
    type: str
    required: true
"""

EXAMPLES = """
secrets: "{{ lookup('mixtral.tpu.pip_settings', ca_path='/run/secrets/ca') }}"
"""

RETURN = """
_list:
  description: One dictionary.
  type: list
  elements: dict
  contains:
    pip:
      description: The text of a C(pip.conf).
      type: str
    ca:
      description: >-
        The certificates that pip, or else this machine, trusts. Empty if there are none.
      type: str
"""

ADDRESSES = ("index-url", "extra-index-url", "find-links")
WORDS = ("trusted-host", "proxy", "timeout", "default-timeout", "retries")
# Sections that apply to `pip install`; a later one overrides an earlier one.
SECTIONS = ("global", "install", ":env:")
SYSTEM_BUNDLE = "/etc/ssl/certs/ca-certificates.crt"


def parse(listing: str) -> dict[str, str]:
    """Return the settings that apply to ``pip install``, from the output of ``pip config list``."""
    sections: dict[str, dict[str, str]] = {name: {} for name in SECTIONS}
    for line in listing.splitlines():
        name, _, value = line.partition("=")
        section, _, key = name.rpartition(".")
        if section in sections:
            sections[section][key] = ast.literal_eval(value)
    return {key: value for section in sections.values() for key, value in section.items()}


def portable(settings: Mapping[str, str]) -> dict[str, str]:
    """Return the ``settings`` that are valid on another machine, too."""
    kept = {}
    for key in ADDRESSES:
        addresses = settings.get(key, "").split()
        if remote := [
            address for address in addresses if address.startswith(("http://", "https://"))
        ]:
            kept[key] = " ".join(remote)
    for key in WORDS:
        if words := " ".join(settings.get(key, "").split()):
            kept[key.removeprefix("default-")] = words
    return kept


def certificates(settings: Mapping[str, str], environment: Mapping[str, str]) -> str:
    """Return the certificate bundle that pip's ``settings`` or the ``environment`` name, else the
    system's, else an empty text.

    Raises AnsibleLookupError if a bundle that is named cannot be read.
    """
    named = [settings.get("cert")]
    named += [environment.get(name) for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")]
    for path in filter(None, named):
        try:
            return Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise AnsibleLookupError(
                f"cannot read the certificate bundle {path}: {error.strerror}. Correct its path in "
                "pip's setting cert, SSL_CERT_FILE or REQUESTS_CA_BUNDLE"
            ) from error
    system = Path(SYSTEM_BUNDLE)
    return system.read_text(encoding="utf-8") if system.is_file() else ""


class LookupModule(LookupBase):
    """The lookup ``pip_settings``."""

    def run(self, terms: list[str], variables: Any = None, **kwargs: Any) -> list[dict[str, str]]:
        """Return one dictionary with ``pip`` and ``ca``."""
        self.set_options(var_options=variables, direct=kwargs)
        listing = subprocess.run(
            [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True
        )
        if listing.returncode:
            raise AnsibleLookupError(
                f"pip config list failed: {listing.stderr.strip()}. "
                "Correct pip's configuration files"
            )
        settings = parse(listing.stdout)
        ca = certificates(settings, os.environ)
        lines = [f"{key} = {value}" for key, value in portable(settings).items()]
        if ca:
            lines.append(f"cert = {self.get_option('ca_path')}")
        return [{"pip": "\n".join(["[global]", *lines, ""]), "ca": ca}]
