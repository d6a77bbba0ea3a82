"""Lookup for the Hugging Face hub's token, from the first source that has one."""

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
short_description: The token for the Hugging Face hub
description:
  - The sources are a variable, a file, and the controller's environment variable E(HF_TOKEN), in
    this order.
  - Fails for a text that cannot be a token, and for a token on the command line of
    C(ansible-playbook), where every user of the controller can read it.
options:
  variable:
    description: The value of the variable C(hf_token).
    type: str
    default: ""
  file:
    description: >-
      The path on the controller of a file with the token, which may be encrypted by ansible-vault.
    type: str
    default: ""
"""

EXAMPLES = """
huggingface__token: "{{ lookup('mixtral.tpu.hub_token', file='~/.hf_token') }}"
"""

RETURN = """
_list:
  description: One dictionary.
  type: list
  elements: dict
  contains:
    value:
      description: The token. Empty if no source has one.
      type: str
    source:
      description: Where the token was found. Empty likewise.
      type: str
"""


def find(variable: str, file: str, loader: DataLoader) -> tuple[str, str]:
    """Return the token and where it was found, two empty strings if there is none.

    Raises AnsibleLookupError if ``file`` is given and does not exist.
    """
    if variable:
        return variable, "the variable hf_token"
    if file:
        path = Path(file).expanduser().absolute()
        if not path.is_file():
            raise AnsibleLookupError(
                f"hf_token_file is {file!r}, but on the controller there is no file {path}. Store "
                "the token there, or leave hf_token_file out to go on without a token"
            )
        return loader.get_text_file_contents(str(path)), f"the file {path}"
    if value := os.environ.get("HF_TOKEN"):
        return value, "the environment variable HF_TOKEN"
    return "", ""


def cleaned(token: str, source: str, command_line: Iterable[str]) -> str:
    """Return the token without surrounding white space.

    ``command_line`` has the values of ``-e``. Raises AnsibleLookupError, with a message that does
    not contain the token, for a text that cannot be a token and for one on the command line.
    """
    token = token.strip()
    where = f"The Hugging Face token in {source}"
    again = "Copy the token again from the page settings/tokens of the hub"
    if not token:
        raise AnsibleLookupError(f"{where} is empty. {again}, or go on without a token")
    if any(character.isspace() for character in token):
        raise AnsibleLookupError(f"{where} has white space in it; allowed is one word. {again}")
    if not (token.isascii() and token.isprintable()):
        raise AnsibleLookupError(
            f"{where} has characters that no token has; allowed is printable ASCII. {again}"
        )
    if any(token in words for words in command_line if not words.startswith("@")):
        raise AnsibleLookupError(
            f"{where} is on the command line, where every user of this machine can read it. Revoke "
            "the token, create another one, and give that in the environment variable HF_TOKEN, "
            "with hf_token_file, or in a file of variables encrypted by ansible-vault (-e @FILE)"
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
