"""A worker that fails while all train: the others are stopped, and the table names the cause."""

import re
from collections.abc import Callable

from tests.slices.simulated_slice import Playbook, Runs, Worker

Start = Callable[..., Playbook]
LEASE_SECONDS = 15


def assert_blames_w1(run: Playbook, runs: Runs, *words: str) -> None:
    """The run failed, and the table says that of w1 which ``words`` say."""
    assert run.end() != 0
    assert ": failed ***" in run.table
    assert "sim-w0 stopped, because sim-w1 failed" in run.table
    assert "worker sim-w1" in run.table
    for word in words:
        assert word in run.table
    runs.assert_survivor("sim-w0", culprit="sim-w1")


def test_a_trainer_that_gets_sigkill(training: Start, runs: Runs, w1: Worker) -> None:
    run = training()
    w1.run(f"kill -9 {' '.join(map(str, w1.trainers()))}")
    assert_blames_w1(run, runs, "ended by SIGKILL", "what killed the trainer")
    assert runs.end("sim-w1")["exit_code"] == 137
    assert not runs.end("sim-w1")["oom_killed"]


def test_memory_that_runs_out(training: Start, runs: Runs, w1: Worker) -> None:
    run = training()
    # Hardly more than the trainer has, so that the kernel ends the trainer and not what comes next.
    used = w1.run("docker stats --no-stream --format '{{.MemUsage}}' mixtral-trainer").split()[0]
    number, unit = re.fullmatch(r"([0-9.]+)([MG])iB", used).groups()
    limit = f"{int(float(number) * (1024 if unit == 'G' else 1)) + 32}m"
    w1.run(f"docker update --memory {limit} --memory-swap {limit} mixtral-trainer")
    hog = "python -c 'import time; x = b\"x\" * (1 << 28); time.sleep(60)'"
    w1.machine.exec_run(["sh", "-c", f"docker exec mixtral-trainer {hog}"])
    assert_blames_w1(run, runs, "out of memory", "a smaller per_device_train_batch_size")
    assert runs.end("sim-w1")["oom_killed"]


def test_an_engine_that_is_restarted(training: Start, runs: Runs, w1: Worker) -> None:
    run = training()
    w1.run("systemctl restart docker")
    assert_blames_w1(run, runs, "the worker, or its Docker engine, was restarted", "journalctl")


def test_a_disk_that_gets_full(training: Start, runs: Runs, w1: Worker) -> None:
    with w1.small_disk() as path:
        run = training(train_free_gib=0)
        w1.run(f"cat /dev/zero > {path}/full 2> /dev/null || true")
        assert_blames_w1(run, runs, "exit code 1: No space left on device", "free disk")


def test_a_worker_that_is_switched_off(training: Start, runs: Runs, w1: Worker) -> None:
    run = training(train_lease_seconds=LEASE_SECONDS)
    w1.machine.kill()
    try:
        assert_blames_w1(run, runs, "lost: no answer for", "check that the worker is up")
    finally:
        w1.power_on()
    assert runs.end("sim-w1")["exit_code"] is None
