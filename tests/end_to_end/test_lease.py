"""A run whose controller is gone ends by itself. Needs the image."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import docker
import pytest

ROOT = Path(__file__).resolve().parents[2]
LEASE_SECONDS = 10


@pytest.fixture
def controller() -> Iterator[subprocess.Popen]:
    """Start a long run and wait for its first step."""
    command = ["ansible-playbook", "train.yml", "-e", f"train_lease_seconds={LEASE_SECONDS}"]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as run:
        try:
            assert any(" step " in line for line in run.stdout), "it never came to a step"
            yield run
        finally:
            if run.poll() is None:
                run.kill()
            subprocess.run(["ansible-playbook", "stop.yml"], cwd=ROOT, check=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "killed"])
def test_the_trainer_ends_with_its_controller(
    controller: subprocess.Popen, number: signal.Signals
) -> None:
    container = docker.from_env().containers.get("mixtral-trainer")
    os.killpg(controller.pid, number)
    end = time.monotonic() + LEASE_SECONDS + 30
    while container.status == "running" and time.monotonic() < end:
        time.sleep(1)
        container.reload()
    assert container.status == "exited"
    log = (ROOT / "runs/latest/workers/localhost/metrics.jsonl").read_text(encoding="utf-8")
    assert '"step"' in log
