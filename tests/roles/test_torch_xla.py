"""The stack on a worker: what an interrupted playbook leaves, and what a missing one says."""

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from ansible.parsing.dataloader import DataLoader
from ansible.template import Templar

from tests.playbook import ROOT, run_playbook, write_play

ROLE = ROOT / "roles/torch_xla"
# Makes an environment whose Python notes what it was called with, and takes its time.
PYTHON = """#!/bin/sh
mkdir -p "$3/bin"
printf '#!/bin/sh\\necho "$@" >> "$CALLS"; sleep 0.3\\n' > "$3/bin/python"
chmod +x "$3/bin/python"
"""
Install = Callable[[], subprocess.Popen]


@pytest.fixture
def install(tmp_path: Path) -> Install:
    """Start the long command that installs the stack, in a directory of its own each time."""
    loader = DataLoader()
    tasks = loader.load_from_file(str(ROLE / "tasks/install.yml"), trusted_as_template=True)
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    (tmp_path / "stacks").mkdir()
    of_role = loader.load_from_file(str(ROLE / "vars/main.yml"), trusted_as_template=True)
    variables = tasks[-1]["vars"] | {
        "torch_xla__doctor_files": of_role["torch_xla__doctor_files"],
        "torch_xla_stack": "release",
        "torch_xla_accelerator_type": "v5p-8",
        "torch_xla__dir": str(tmp_path),
        "torch_xla__name": "release-1",
        "torch_xla__venv": str(tmp_path / "stacks/release-1"),
        "torch_xla__python": str(python),
    }
    command = Templar(loader, variables=variables).template(
        tasks[-1]["mixtral.tpu.run_with_progress"]["cmd"]
    )

    def start() -> subprocess.Popen:
        directory = tmp_path / f"command-{time.monotonic_ns()}"
        for path in ("doctor.py", "topologies.json", "requirements/release.txt"):
            path = f"files/runtime/{path}"
            (directory / path).parent.mkdir(parents=True, exist_ok=True)
            (directory / path).touch()
        process = subprocess.Popen(
            ["/bin/sh", "-c", command],
            cwd=directory,
            env=os.environ | {"CALLS": str(tmp_path / "calls")},
        )
        process.directory = directory
        return process

    return start


@pytest.mark.parametrize("ends", ["well", "without its files"])
def test_what_an_interrupted_playbook_has_left_is_waited_for(install, tmp_path, ends) -> None:
    first = install()
    while not (tmp_path / "calls").exists():
        time.sleep(0.02)
    second = install()
    if ends != "well":
        (first.directory / "files/runtime/doctor.py").unlink()
    assert (first.wait(20) == 0) == (ends == "well")
    assert second.wait(20) == 0
    assert (tmp_path / "stack/complete").exists()
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls.count("files/runtime/stack.py torch release") == (1 if ends == "well" else 2)


def test_where_there_is_no_stack_the_doctor_says_what_to_do(tmp_path: Path) -> None:
    entry = {"name": "mixtral.tpu.torch_xla", "tasks_from": "doctor.yml"}
    play = write_play(tmp_path, {"ansible.builtin.import_role": entry})
    run = run_playbook(play, torch_xla_worker_dir=str(tmp_path))
    assert run.code == 2
    assert f"localhost has no stack release in {tmp_path}/stacks/release-" in run.words
    assert "site.yml -e runtime=native -e stack=release first" in run.words
