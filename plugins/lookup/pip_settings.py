"""How the controller's pip reaches its index, in a form that holds inside an image build."""

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
short_description: the controller's way to its package index, for an image build
description:
  - Reads C(pip config list), so configuration files and C(PIP_*) variables alike.
  - Keeps what says where packages are and how to get there. A local directory or a C(file://) index
    does not exist inside a build and is left out.
  - The result can hold an index's password. Pass it on as a build secret.
options:
  _terms:
    description: none
    type: list
  ca_path:
    description: where the build finds the certificate bundle
    type: str
    required: true
"""

RETURN = """
_list:
  description: one dictionary
  type: list
  elements: dict
  contains:
    pip:
      description: the text of a C(pip.conf)
      type: str
    ca:
      description: the certificates that pip, or else this machine, trusts; empty where none are
      type: str
"""

ADDRESSES = ("index-url", "extra-index-url", "find-links")
WORDS = ("trusted-host", "proxy", "timeout", "default-timeout", "retries")
# Sections that hold for `pip install`, the weakest first.
SECTIONS = ("global", "install", ":env:")
SYSTEM_BUNDLE = "/etc/ssl/certs/ca-certificates.crt"


def parse(listing: str) -> dict[str, str]:
    """Return the settings that hold for ``pip install`` from the output of ``pip config list``."""
    sections: dict[str, dict[str, str]] = {name: {} for name in SECTIONS}
    for line in listing.splitlines():
        name, _, value = line.partition("=")
        section, _, key = name.rpartition(".")
        if section in sections:
            sections[section][key] = ast.literal_eval(value)
    return {key: value for section in sections.values() for key, value in section.items()}


def portable(settings: Mapping[str, str]) -> dict[str, str]:
    """Return what of ``settings`` means the same on another machine."""
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
    """Return the bundle that pip is told to use, else the one this machine trusts, else nothing."""
    named = [settings.get("cert")]
    named += [environment.get(name) for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")]
    for path in filter(None, named):
        try:
            return Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise AnsibleLookupError(
                f"cannot read the certificate bundle {path}: {error.strerror}. pip's settings, "
                "SSL_CERT_FILE or REQUESTS_CA_BUNDLE name it: correct them"
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
            raise AnsibleLookupError(f"pip config list failed: {listing.stderr.strip()}")
        settings = parse(listing.stdout)
        ca = certificates(settings, os.environ)
        lines = [f"{key} = {value}" for key, value in portable(settings).items()]
        if ca:
            lines.append(f"cert = {self.get_option('ca_path')}")
        return [{"pip": "\n".join(["[global]", *lines, ""]), "ca": ca}]
