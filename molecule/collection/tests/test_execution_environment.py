"""A run in the execution environment, started as AWX starts it.

The project imports the collection's playbook. ansible-runner adds inventory, key and variables.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.slices.simulated_slice import KEY, ROOT, SMALL_MODEL, WORKERS, Playbook, Runs

STEPS = 3
IDENT = "train"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What AWX gives to a job: a project, an inventory, a credential and variables."""
    directory = tmp_path_factory.mktemp("job")
    shutil.copytree(ROOT / "inventory/simulated", directory / "inventory")
    project, env = directory / "project", directory / "env"
    for made in (project, env):
        made.mkdir()
    (project / "train.yml").write_text("- import_playbook: mixtral.tpu.train\n")
    (project / "ansible.cfg").write_text("[defaults]\ncallbacks_enabled = mixtral.tpu.run_report\n")
    model = shutil.copy(SMALL_MODEL["model"], project)
    (env / "ssh_key").write_text(KEY.read_text())
    variables = SMALL_MODEL | {
        "model": f"/runner/project/{Path(model).name}",
        "gmm": True,
        "max_steps": STEPS,
        "runs_dir": "/runs",
    }
    (env / "extravars").write_text(json.dumps(variables))
    return directory


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def screen(finished: Callable[..., Playbook], project: Path, runs: Runs) -> str:
    """What the run in the execution environment has printed; it ended well."""
    assert finished("molecule/collection/execution_environment.yml").code == 0
    runner = Path(sys.executable).with_name("ansible-runner")
    isolation = ["--process-isolation", "--process-isolation-executable=docker"]
    container = ["--container-image=mixtral-tpu-ee", "--container-option=--network=host"]
    volume = f"--container-volume-mount={runs.directory}:/runs"
    job = ["--playbook=train.yml", f"--ident={IDENT}", project]
    ran = subprocess.run(
        [runner, "run", *isolation, *container, volume, *job],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(ran.stdout)
    assert ran.returncode == 0
    return ran.stdout


def test_the_job_has_its_end_and_its_events(screen: str, project: Path) -> None:
    artifacts = project / "artifacts" / IDENT
    assert (artifacts / "rc").read_text() == "0"
    assert (artifacts / "status").read_text() == "successful"
    events = [json.loads(path.read_text()) for path in artifacts.glob("job_events/*-*.json")]
    (stats,) = [it["event_data"] for it in events if it["event"] == "playbook_on_stats"]
    assert set(WORKERS) <= stats["ok"].keys()
    assert not stats["failures"]
    assert not stats["dark"]


def test_the_run_is_on_the_volume_and_its_table_in_the_output(screen: str, runs: Runs) -> None:
    assert "succeeded" in screen.partition("PLAY RECAP")[2]
    report = json.loads((runs.directory / "latest/report.json").read_text())
    assert report["status"] == "succeeded"
    assert [runs.steps(name) for name in WORKERS] == [list(range(STEPS))] * len(WORKERS)
    assert (runs.directory / "latest/report.html").stat().st_size
