"""What the controller's Python lacks, in real environments."""

import os
import subprocess
import sys
import venv
from importlib.metadata import distribution, version
from pathlib import Path

import pytest
from ansible_collections.mixtral.tpu.plugins.plugin_utils.requirements import (
    REQUIREMENTS,
    unmet_requirements,
)

from tests.playbook import ROOT

# What `pip install ansible-core` brings
ANSIBLE_CORE = [
    "ansible-core", "cffi", "cryptography", "jinja2", "markupsafe", "packaging", "pycparser",
    "pyyaml", "resolvelib",
]  # fmt: skip


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a virtual environment that has nothing but ansible-core."""
    directory = tmp_path_factory.mktemp("bare")
    venv.create(directory)
    (packages,) = directory.glob("lib/python*/site-packages")
    for name in ANSIBLE_CORE:
        for entry in distribution(name).files:
            target = packages / entry.parts[0]
            if entry.parts[0] != ".." and not target.exists():
                target.symlink_to(distribution(name).locate_file(entry.parts[0]))
    return directory / "bin/python"


def file(directory: Path, *lines: str) -> Path:
    path = directory / "requirements.txt"
    path.write_text("\n".join(["# A comment", "", *lines]) + "\n")
    return path


def test_the_developers_environment_lacks_nothing():
    assert REQUIREMENTS == ROOT / "requirements.txt"
    assert unmet_requirements() == ""


@pytest.mark.parametrize("line", ["pytest", "PyTest>=1"])
def test_what_is_met_is_not_complained_of(tmp_path, line):
    assert unmet_requirements(file(tmp_path, line)) == ""


def test_one_line_names_what_is_missing_the_python_and_the_command(tmp_path):
    asked = file(tmp_path, "pytest", "no-such-package>=3", "packaging<1")
    assert unmet_requirements(asked) == (
        f"Ansible runs in {sys.executable}, which lacks no-such-package>=3, "
        f"packaging<1 (installed: {version('packaging')}). "
        f"Install it: {sys.executable} -m pip install -r {asked}"
    )


def test_the_command_can_be_pasted_where_paths_have_blanks(tmp_path):
    directory = tmp_path / "my files"
    directory.mkdir()
    # No package is fetched: pip shows the command line that it has understood.
    command = unmet_requirements(file(directory, "no-such-package")).partition("Install it: ")[2]
    ran = subprocess.run(
        ["sh", "-c", command + " --no-index"], capture_output=True, text=True, check=False
    )
    assert "No matching distribution found for no-such-package" in ran.stderr


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("playbook", ["status.yml", "--inventory=inventory/local"]),
        ("inventory", ["--list", "--inventory=inventory/gcp"]),
    ],
)
def test_ansible_says_it_where_only_ansible_core_is_installed(bare, command, arguments):
    ran = subprocess.run(
        [bare, "-m", "ansible", command, *arguments],
        cwd=ROOT, env=os.environ | {"PROJECT": "p", "ZONE": "z"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    said = f"{ran.stdout}{ran.stderr}"
    assert ran.returncode
    assert f"Ansible runs in {bare}, which lacks " in said
    assert f"Install it: {bare} -m pip install -r {ROOT}/requirements.txt" in said
    assert "google-cloud-tpu" in said
    assert "ansible-core>" not in said
    assert "Traceback" not in said
