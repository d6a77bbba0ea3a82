"""What playbooks refuse at their beginning, where else they would succeed and do nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WORKERS = "[tpu_workers]\nw0\nw1\n[tpu_workers:vars]\nansible_connection=local\n"


@pytest.fixture
def play(tmp_path: Path):
    """Run a playbook on an inventory of this text."""

    def run(inventory: str, *words: str) -> subprocess.CompletedProcess[str]:
        path = tmp_path / "hosts.ini"
        path.write_text(inventory)
        return subprocess.run(
            [Path(sys.executable).with_name("ansible-playbook"), "-i", path, *words],
            cwd=ROOT,
            env=os.environ | {"ANSIBLE_NOCOLOR": "1"},
            capture_output=True,
            text=True,
            check=False,
        )

    return run


@pytest.mark.parametrize("playbook", ["slice.yml", "tensorboard.yml"])
def test_what_works_on_the_controller_is_not_limited_to_a_worker(play, playbook) -> None:
    refused = play(WORKERS, playbook, "-e", "state=absent", "--limit", "w0")
    assert refused.returncode == 2
    assert "--limit w0 leaves it out: run it without --limit" in " ".join(refused.stdout.split())


def test_the_controller_may_be_what_it_is_limited_to(play) -> None:
    limited = play(WORKERS, "tensorboard.yml", "--check", "--limit", "localhost,w0")
    assert limited.returncode == 0, limited.stdout


@pytest.mark.parametrize("inventory", ["", "[tpu_worker]\nw0\n"])
def test_an_inventory_without_workers_is_refused(play, inventory) -> None:
    refused = play(inventory, "status.yml")
    assert refused.returncode == 2
    assert "No host is in the group tpu_workers of" in refused.stdout


@pytest.mark.parametrize("limit", [[], ["--limit=w0"]])
def test_with_workers_the_controller_is_not_in_the_recap(play, limit) -> None:
    passed = play(WORKERS, "playbooks/check_workers.yml", *limit)
    assert passed.returncode == 0, passed.stdout
    assert "localhost" not in passed.stdout
