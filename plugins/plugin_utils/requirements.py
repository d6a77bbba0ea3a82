"""What the controller needs in Python: requirements.txt, against the Python that runs Ansible.

Imports nothing that a fresh installation of ansible-core lacks.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

REQUIREMENTS = Path(__file__).resolve().parents[2] / "requirements.txt"


def unmet(file: Path) -> Iterator[str]:
    """Yield every requirement in ``file`` that this Python does not meet, and what it has."""
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        requirement = Requirement(line)
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            yield str(requirement)
        else:
            if not requirement.specifier.contains(version, prereleases=True):
                yield f"{requirement} (installed: {version})"


def unmet_requirements(file: Path = REQUIREMENTS) -> str:
    """Return one line on what this Python lacks of ``file`` and how to install it, or ``""``."""
    lacking = ", ".join(unmet(file))
    if not lacking:
        return ""
    install = shlex.join([sys.executable, "-m", "pip", "install", "-r", str(file)])
    return f"Ansible runs in {sys.executable}, which lacks {lacking}. Install it: {install}"
