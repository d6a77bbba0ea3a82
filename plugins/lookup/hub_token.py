"""The token for the Hugging Face hub, from the first place that has one."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ansible import context
from ansible.errors import AnsibleLookupError
from ansible.parsing.dataloader import DataLoader
from ansible.plugins.lookup import LookupBase

DOCUMENTATION = """
name: hub_token
short_description: the token for the Hugging Face hub
description:
  - Takes the first that is there of a variable's value, a file, and the controller's C(HF_TOKEN).
  - Refuses what cannot be a token, and one that stands on the command line of C(ansible-playbook),
    where every user of the controller sees it.
options:
  _terms:
    description: none
    type: list
  variable:
    description: the value of C(hf_token)
    type: str
    default: ""
  file:
    description: path on the controller of a file that holds the token, which may be a vault
    type: str
    default: ""
"""

RETURN = """
_list:
  description: one dictionary
  type: list
  elements: dict
  contains:
    value:
      description: the token; empty where there is none
      type: str
    source:
      description: where it was
      type: str
"""


def find(variable: str, file: str, loader: DataLoader) -> tuple[str, str]:
    """Return the token and where it was found, two empty strings where there is none.

    Raises AnsibleLookupError where there is no ``file``.
    """
    if variable:
        return variable, "the variable hf_token"
    if file:
        path = Path(file).expanduser().absolute()
        if not path.is_file():
            raise AnsibleLookupError(
                f"hf_token_file is {file!r}, but on the controller there is no file {path}. Put "
                "the token there, or leave the variable out to go without"
            )
        return loader.get_text_file_contents(str(path)), f"the file {path}"
    if value := os.environ.get("HF_TOKEN"):
        return value, "the environment variable HF_TOKEN"
    return "", ""


def cleaned(token: str, source: str, command_line: Iterable[str]) -> str:
    """Return the token without the white space around it.

    ``command_line`` are the values of ``-e``. Raises AnsibleLookupError, in words that do not hold
    the token, if it is none.
    """
    token = token.strip()
    where = f"The Hugging Face token in {source}"
    again = "Copy it anew from the page settings/tokens of the hub"
    if not token:
        raise AnsibleLookupError(f"{where} is empty. {again}, or leave it out to go without")
    if any(character.isspace() for character in token):
        raise AnsibleLookupError(f"{where} has white space in it; a token is one word. {again}")
    if not (token.isascii() and token.isprintable()):
        raise AnsibleLookupError(
            f"{where} has characters in it that no token has; allowed is printable ASCII. {again}"
        )
    if any(token in words for words in command_line if not words.startswith("@")):
        raise AnsibleLookupError(
            f"{where} stands on the command line, where every user of this machine can read it. "
            "Revoke it, make another one, and give that in HF_TOKEN, with hf_token_file, or in a "
            "file of variables encrypted by ansible-vault (-e @FILE)"
        )
    return token


class LookupModule(LookupBase):
    """The lookup ``hub_token``."""

    def run(self, terms: list[str], variables: Any = None, **kwargs: Any) -> list[dict[str, str]]:
        """Return one dictionary with ``value`` and ``source``."""
        self.set_options(var_options=variables, direct=kwargs)
        token, source = find(
            self.get_option("variable"), self.get_option("file"), self._loader or DataLoader()
        )
        if source:
            token = cleaned(token, source, context.CLIARGS.get("extra_vars") or ())
        return [{"value": token, "source": source}]
