"""A controller or a network that goes: a short gap is survived, and a long one leaves nothing."""

import signal
import time
from collections.abc import Callable
from pathlib import Path

from tests.slices.simulated_slice import WORKERS, Playbook, Runs, Worker, wait_until

Start = Callable[..., Playbook]
LEASE_SECONDS = 30
# From the end of a lease to that of its trainer, which is asked first
GRACE_SECONDS = 90
# What the small model takes about a minute for
MANY_STEPS = 500


def assert_ends_by_its_lease(worker: Worker) -> None:
    end = time.monotonic() + LEASE_SECONDS + GRACE_SECONDS
    while worker.trainers():
        assert time.monotonic() < end, f"{worker.name} still trains"
        time.sleep(1)
    assert "was not renewed" in worker.run("docker logs --tail 5 mixtral-trainer 2>&1")


def test_ctrl_c(training: Start, runs: Runs, w0: Worker, w1: Worker) -> None:
    run = training(train_lease_seconds=LEASE_SECONDS)
    run.signal(signal.SIGINT)
    assert run.end() != 0
    for worker in (w0, w1):
        assert_ends_by_its_lease(worker)
        assert runs.steps(worker.name)


def test_a_killed_controller_and_a_second_one(training: Start, train: Start, runs: Runs) -> None:
    first = training(max_steps=MANY_STEPS)
    first.signal(signal.SIGKILL)
    first.end()
    half = runs.steps("sim-w0")
    assert half
    assert len(half) < MANY_STEPS
    second = train(max_steps=MANY_STEPS)
    runs.assert_healthy(second, MANY_STEPS)
    assert runs.number() == 1


def test_half_a_minute_without_network(
    training: Start, playbook: Start, runs: Runs, w1: Worker
) -> None:
    run = training()
    directory = f"/home/tpu/mixtral-trainer/runs/{(runs.directory / 'latest').resolve().name}"
    with w1.cut_off():
        time.sleep(30)
        trained = int(w1.run(f"wc -l < {directory}/metrics.jsonl"))
        assert len(runs.steps("sim-w1")) < trained
    wait_until(lambda: len(runs.steps("sim-w1")) > trained, "what was trained in the meantime")
    assert playbook("stop.yml").end() == 0
    assert run.end() != 0
    for name in WORKERS:
        assert runs.end(name)["error"] is None
        assert runs.steps(name) == list(range(len(runs.steps(name))))


def test_a_network_that_is_gone_for_longer_than_the_lease(
    training: Start, runs: Runs, w1: Worker
) -> None:
    run = training(train_lease_seconds=LEASE_SECONDS)
    with w1.cut_off():
        assert_ends_by_its_lease(w1)
        assert run.end() != 0
    assert "sim-w0 stopped, because sim-w1 failed" in run.table
    assert "what happened lost: no answer for" in run.table
    runs.assert_survivor("sim-w0", culprit="sim-w1")


def test_a_run_after_a_dead_run_is_left_to_itself(
    train: Start, playbook: Start, tmp_path: Path, w1: Worker
) -> None:
    w1.run("docker rm --force mixtral-trainer || true")
    w1.run("docker create --name mixtral-trainer --label run_id=dead mixtral-trainer:release")
    w1.run("touch /tmp/libtpu_lockfile")
    detached = train(max_steps=MANY_STEPS, detach=True)
    assert detached.end() == 0
    for task in (
        "Remove the container of an earlier run",
        "Remove the libtpu lock of a dead process",
    ):
        heading = f"TASK [mixtral.tpu.train : {task}]"
        said = detached.screen.partition(heading)[2].partition("TASK")[0]
        assert "changed: [sim-w1]" in said
    status = playbook("status.yml")
    assert status.end() == 0
    assert status.screen.count("detached, not collected") == 2
    other = train(max_steps=MANY_STEPS + 1)
    assert other.end() != 0
    assert f"with other variables (--max_steps {MANY_STEPS})" in other.table
    # From a controller that has nothing of the run
    elsewhere = Runs(tmp_path / "elsewhere")
    follower = train(max_steps=MANY_STEPS, runs_dir=str(elsewhere.directory))
    elsewhere.assert_healthy(follower, MANY_STEPS)
    assert elsewhere.number() == 1
