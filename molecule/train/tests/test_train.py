"""Two workers train, each on its own devices: what the user sees, and what there is afterwards."""

import json
from collections.abc import Callable
from functools import partial

import pytest
import yaml

from tests.slices.simulated_slice import SMALL_MODEL, WORKERS, Playbook, Runs, Worker

STEPS = 10


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def finished(finished: Callable[..., Playbook], runs: Runs) -> Callable[..., Playbook]:
    return partial(finished, runs_dir=str(runs.directory))


@pytest.fixture(scope="module")
def run(finished: Callable[..., Playbook]) -> Playbook:
    """The run of the inventory's own model, which ended well."""
    run = finished("train.yml", gmm=True, max_steps=STEPS, per_device_train_batch_size=4)
    assert run.code == 0
    return run


@pytest.fixture(scope="module")
def report(run: Playbook, runs: Runs) -> dict:
    return json.loads((runs.directory / "latest/report.json").read_text())


def test_both_workers_bring_home_what_they_made(report: dict, runs: Runs) -> None:
    for name in WORKERS:
        assert runs.steps(name) == list(range(STEPS))
        assert runs.end(name)["exit_code"] == 0
        assert (runs.worker(name) / "trainer.log").stat().st_size
        assert list(runs.worker(name).glob("profile/**/*.xplane.pb"))


def test_the_report_has_a_row_for_each(report: dict) -> None:
    assert report["status"] == "succeeded"
    assert report["experts"]["mode"] == "gmm"
    assert [(row["host"], row["status"]) for row in report["workers"]] == [
        (name, "succeeded") for name in WORKERS
    ]
    assert all(row["step_time_s"] > 0 for row in report["workers"])


def test_both_learn_the_same(report: dict, runs: Runs) -> None:
    # Same text, same seed: two slices of one worker each, as no CPU joins them to one mesh.
    losses = [
        [json.loads(line)["loss"] for line in (runs.worker(name) / "metrics.jsonl").open()]
        for name in WORKERS
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < losses[0][0]


def test_progress_is_worker_0s_and_the_table_comes_last(run: Playbook, report: dict) -> None:
    assert any(
        line.startswith("sim-w0") and " step " in line and "loss" in line and "s/step" in line
        for line in run.screen.splitlines()
    )
    assert f"{report['loss']['last']:.3f}" in run.table


def test_all_containers_are_created_before_one_is_started(run: Playbook) -> None:
    times = "docker inspect mixtral-trainer --format '{{.Created}} {{.State.StartedAt}}'"
    created, started = zip(*(Worker(name).run(times).split() for name in WORKERS), strict=True)
    assert max(created) < min(started)


def test_what_it_was_started_with_is_written_down(report: dict, runs: Runs) -> None:
    variables = yaml.safe_load((runs.directory / "latest/variables.yml").read_text())
    assert variables["train_gmm"] is True
    assert variables["train_max_steps"] == STEPS


def test_the_doctor_finds_the_stack_whole(finished: Callable[..., Playbook]) -> None:
    run = finished("doctor.yml", "--limit=sim-w0")
    assert run.code == 0
    said = "kernels compile for v5p: gmm forward, gmm backward, flash attention forward,"
    assert said in " ".join(run.screen.split())


def test_the_launch_is_not_for_a_part_of_a_slice(finished: Callable[..., Playbook]) -> None:
    run = finished("train.yml", "--limit=sim-w1")
    assert run.code != 0
    assert "sim-w0 would be left out: run train.yml without --limit" in run.table


def test_every_worker_needs_a_fork(finished: Callable[..., Playbook]) -> None:
    run = finished("train.yml", "--forks=1")
    assert run.code != 0
    assert "There are 2 workers, but Ansible has only 1 forks: run with --forks 2" in run.table


def test_check_mode_starts_nothing(
    finished: Callable[..., Playbook], report: dict, runs: Runs
) -> None:
    before = runs.number()
    assert finished("train.yml", "--check", gmm=True, max_steps=STEPS).code == 0
    assert runs.number() == before


def test_the_status_of_a_part_of_the_slice(finished: Callable[..., Playbook], report: dict) -> None:
    run = finished("status.yml", "--limit=sim-w1")
    assert run.code == 0
    assert f"step {STEPS} of {STEPS}" in " ".join(run.screen.split())
    assert "[sim-w0]" not in run.screen


def test_stopping_what_does_not_run_changes_nothing(
    finished: Callable[..., Playbook], report: dict
) -> None:
    run = finished("stop.yml")
    assert run.code == 0
    assert run.screen.count("changed=0") == len(WORKERS)


def test_a_run_is_stopped_on_every_worker_and_resumed(
    playbook: Callable[..., Playbook], finished: Callable[..., Playbook], runs: Runs
) -> None:
    refused = finished("train.yml", gmm=True, max_steps=STEPS, resume="must")
    assert refused.code != 0
    assert "resume is must, and this worker has no checkpoint of" in refused.table
    flags = SMALL_MODEL | {"gmm": True, "save_strategy": "steps", "run_name": "interrupted"}
    run = playbook("train.yml", runs_dir=str(runs.directory), max_steps=1_000_000, **flags)
    run.wait_for(" step ")
    assert finished("stop.yml").code == 0
    assert run.end() != 0
    assert "stopped" in run.table
    assert "the trainer was told to end" in run.table
    done = {name: runs.steps(name)[-1] + 1 for name in WORKERS}
    # The workers of this slice step by themselves, and each goes on from where it was.
    resumed = finished("train.yml", **flags, max_steps=max(done.values()) + 3, resume="must")
    assert resumed.code == 0
    for name in WORKERS:
        log = (runs.directory / "interrupted/workers" / name / "trainer.log").read_text()
        assert f"checkpoint-{done[name]}, after step {done[name]}" in log
        assert runs.steps(name) == list(range(max(done.values()) + 3))
