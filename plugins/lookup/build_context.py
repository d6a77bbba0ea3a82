"""Lookup for the files that an image is built from, with one hash of all of them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleLookupError
from ansible.plugins.lookup import LookupBase

DOCUMENTATION = """
name: build_context
short_description: The files that an image is built from, and their hash
description:
  - Lists the files below some paths of the controller, without hidden files and without those that
    Python has compiled.
  - The hash covers nothing but every file's name, content and executable bit, so it is the same on
    every controller that has the same files.
options:
  _terms:
    description: Files and directories, relative to O(root).
    type: list
    elements: str
    required: true
  root:
    description: The directory that paths are relative to.
    type: path
    required: true
"""

EXAMPLES = """
context: "{{ lookup('mixtral.tpu.build_context', 'container', 'trainer', root='/src') }}"
"""

RETURN = """
_list:
  description: One dictionary.
  type: list
  elements: dict
  contains:
    files:
      description: The files, sorted, relative to O(root).
      type: list
      elements: str
    sha256:
      description: The hash.
      type: str
"""


def list_files(root: Path, paths: list[str]) -> list[str]:
    """Return the files at and below ``paths``, relative to ``root``, sorted.

    Raises AnsibleLookupError for a path that does not exist.
    """
    found = set()
    for path in paths:
        start = root / path
        if not start.exists():
            raise AnsibleLookupError(
                f"{path} is missing in {root}, and the image is built from it. Restore it: "
                f"git checkout -- {path}"
            )
        for file in [start] if start.is_file() else start.rglob("*"):
            parts = file.relative_to(root).parts
            left_out = any(part.startswith(".") or part == "__pycache__" for part in parts)
            if file.is_file() and not left_out and file.suffix != ".pyc":
                found.add("/".join(parts))
    return sorted(found)


def hash_files(root: Path, files: list[str]) -> str:
    """Return one SHA-256 of the names, contents and executable bits of ``files``."""
    digest = hashlib.sha256()
    for name in files:
        file = root / name
        executable = bool(file.stat().st_mode & 0o100)
        content = hashlib.sha256(file.read_bytes()).hexdigest()
        digest.update(f"{name}\0{executable:d}\0{content}\n".encode())
    return digest.hexdigest()


class LookupModule(LookupBase):
    """The lookup ``build_context``."""

    def run(self, terms: list[str], variables: Any = None, **kwargs: Any) -> list[dict[str, Any]]:
        """Return one dictionary with ``files`` and ``sha256``."""
        self.set_options(var_options=variables, direct=kwargs)
        root = Path(self.get_option("root")).resolve()
        files = list_files(root, terms)
        return [{"files": files, "sha256": hash_files(root, files)}]
