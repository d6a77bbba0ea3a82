"""The collection, installed where there is no checkout and run by its full name from /."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.slices.simulated_slice import ROOT, SMALL_MODEL, WORKERS, Playbook, Runs, Worker

STEPS = 3


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a user has: the collection from the tarball that would be published, and no settings."""
    home = tmp_path_factory.mktemp("home")
    (home / "ansible.cfg").touch()
    environment = {
        "ANSIBLE_COLLECTIONS_PATH": str(home / "collections"),
        "ANSIBLE_CONFIG": str(home / "ansible.cfg"),
        "HOME": str(home),
    }
    galaxy = [Path(sys.executable).with_name("ansible-galaxy"), "collection"]
    run = partial(subprocess.run, cwd="/", env=os.environ | environment, check=True)
    run([*galaxy, "build", f"--output-path={home}", ROOT])
    # The package ansible has what the collection depends on.
    options = ["--no-deps", f"--collections-path={home}/collections"]
    run([*galaxy, "install", *options, *home.glob("*.tar.gz")])
    return environment


@pytest.fixture(scope="module")
def installed(
    finished: Callable[..., Playbook], environment: dict[str, str]
) -> Callable[..., Playbook]:
    """Run playbooks by their full names to their end."""
    inventory = ROOT / "inventory/simulated"
    return partial(finished, directory="/", inventory=inventory, environment=environment)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def run(installed: Callable[..., Playbook], runs: Runs) -> Playbook:
    """A short run that ended well."""
    wanted = {"gmm": True, "max_steps": STEPS, "runs_dir": str(runs.directory)}
    run = installed("mixtral.tpu.train", **SMALL_MODEL, **wanted)
    assert run.code == 0
    return run


def images() -> list[str]:
    """The image of every worker."""
    inspect = "docker image inspect mixtral-trainer:release --format '{{.Id}}'"
    return [Worker(name).run(inspect) for name in WORKERS]


def test_it_describes_the_state_that_the_checkout_has_brought(
    finished: Callable[..., Playbook], installed: Callable[..., Playbook]
) -> None:
    assert finished("site.yml").code == 0
    before = images()
    run = installed("mixtral.tpu.site")
    assert run.code == 0
    assert not run.changed
    assert images() == before


def test_a_run_leaves_its_report_where_it_was_told_to(run: Playbook, runs: Runs) -> None:
    assert run.recap.count("failed=0") == len(WORKERS)
    # No callback of ours is enabled here, so a task shows the table.
    assert "step time" in run.screen.partition("PLAY RECAP")[0]
    assert f" {runs.directory}/" in run.screen
    report = json.loads((runs.directory / "latest/report.json").read_text())
    assert report["status"] == "succeeded"
    assert [runs.steps(name) for name in WORKERS] == [list(range(STEPS))] * len(WORKERS)
    assert (runs.directory / "latest/report.html").stat().st_size


@pytest.mark.usefixtures("run")
def test_it_says_what_every_worker_does(installed: Callable[..., Playbook]) -> None:
    status = installed("mixtral.tpu.status")
    assert status.code == 0
    assert status.words.count(f"step {STEPS} of {STEPS}") == len(WORKERS)
