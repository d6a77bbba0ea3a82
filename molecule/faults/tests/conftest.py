"""A run that is quickly at its first step, and nothing left of it after the fault."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.slices.simulated_slice import SMALL_MODEL, WORKERS, Playbook, Runs, Worker, wait_until

Start = Callable[..., Playbook]


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path / "runs")


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Something to train on that is read in no time."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"Line {number} of a text to learn.\n" for number in range(2000)))
    return path


@pytest.fixture
def train(playbook: Start, runs: Runs, text: Path) -> Start:
    """Start train.yml with a Mixtral that is compiled in seconds."""

    def start(*options: str, **variables: object) -> Playbook:
        small = {
            "gmm": True,
            "train_file": str(text),
            "max_steps": 1_000_000,
            "runs_dir": str(runs.directory),
        }
        return playbook("train.yml", *options, **(SMALL_MODEL | small | variables))

    return start


@pytest.fixture
def training(train: Start, runs: Runs) -> Start:
    """Start train.yml, and return when every worker trains."""

    def start(**variables: object) -> Playbook:
        run = train(**variables)
        run.wait_for(" step ")
        wait_until(lambda: all(map(runs.steps, WORKERS)), "every first step")
        return run

    return start


@pytest.fixture(autouse=True)
def _nothing_is_left_running() -> Iterator[None]:
    yield
    for name in WORKERS:
        assert not Worker(name).trainers(), f"{name} still trains"
