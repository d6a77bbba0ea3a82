"""What playbooks refuse at their beginning, where else they would succeed and do nothing."""

from pathlib import Path

import pytest

from tests.playbook import Playbook, run_playbook

WORKERS = "[tpu_workers]\nw0\nw1\n[tpu_workers:vars]\nansible_connection=local\n"


@pytest.fixture
def play(tmp_path: Path):
    """Run a playbook on an inventory of this text."""

    def run(inventory: str, *words: str) -> Playbook:
        path = tmp_path / "hosts.ini"
        path.write_text(inventory)
        return run_playbook(*words, inventory=path)

    return run


@pytest.mark.parametrize("playbook", ["slice.yml", "tensorboard.yml"])
def test_what_works_on_the_controller_is_not_limited_to_a_worker(play, playbook) -> None:
    refused = play(WORKERS, playbook, "-e", "state=absent", "--limit", "w0")
    assert refused.code == 2
    assert "--limit w0 leaves it out: run it without --limit" in refused.words


def test_the_controller_may_be_what_it_is_limited_to(play) -> None:
    limited = play(WORKERS, "tensorboard.yml", "--check", "--limit", "localhost,w0")
    assert limited.code == 0


@pytest.mark.parametrize("inventory", ["", "[tpu_worker]\nw0\n"])
def test_an_inventory_without_workers_is_refused(play, inventory) -> None:
    refused = play(inventory, "status.yml")
    assert refused.code == 2
    assert "No host is in the group tpu_workers of" in refused.screen


@pytest.mark.parametrize("limit", [[], ["--limit=w0"]])
def test_with_workers_the_controller_is_not_in_the_recap(play, limit) -> None:
    passed = play(WORKERS, "playbooks/check_workers.yml", *limit)
    assert passed.code == 0
    assert "localhost" not in passed.screen
