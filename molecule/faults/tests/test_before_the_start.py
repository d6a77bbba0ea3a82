"""A worker that is not ready: it is named, with the cause and what to do, and nothing starts."""

import time
from collections.abc import Callable, Iterator

import docker
import pytest

from tests.slices.simulated_slice import REGISTRY, SMALL_IMAGE, Playbook, Runs, Worker

# An Ansible that cannot connect tries three times, for ten seconds each.
SSH_SECONDS = 45

Start = Callable[..., Playbook]


@pytest.fixture(autouse=True)
def _nothing_starts(runs: Runs) -> Iterator[None]:
    yield
    assert not runs.number()


def test_a_worker_that_is_switched_off(train: Start, w1: Worker) -> None:
    w1.machine.kill()
    try:
        began = time.monotonic()
        run = train()
        code = run.end()
        assert time.monotonic() - began < SSH_SECONDS
    finally:
        w1.power_on()
    assert code != 0
    assert "worker sim-w1" in run.table
    assert "ssh: connect to host" in run.table
    assert "what to do check that the worker is up" in run.table
    assert "worker sim-w0" not in run.table


def test_a_foreign_process_that_holds_the_accelerator(train: Start, w0: Worker, w1: Worker) -> None:
    # A device that exists here stands in for the TPU's.
    for worker in (w0, w1):
        worker.run("mknod /dev/accel0 c 1 3")
    w1.run("exec 3< /dev/accel0; exec sleep 600", detach=True)
    (pid,) = w1.processes("sleep 600")
    try:
        run = train(pjrt_device="TPU")
        code = run.end()
    finally:
        w1.run(f"kill {pid}")
        for worker in (w0, w1):
            worker.run("rm /dev/accel0")
    assert code != 0
    assert "worker sim-w1" in run.table
    assert f"Process {pid} (sleep 600) holds /dev/accel0" in run.table
    assert f"sudo kill {pid}" in run.table
    assert "worker sim-w0" not in run.table


def test_a_configuration_that_differs(train: Start, w1: Worker) -> None:
    # The playbook pushes both files; skipped, it must not train on two different models.
    w1.run("echo >> /home/tpu/config.json")
    run = train("--skip-tags=config", model="mixtral-tiny")
    assert run.end() != 0
    assert "worker sim-w1" in run.table
    assert "/home/tpu/config.json is not the same as" in run.table
    assert "site.yml --tags config" in run.table


def test_an_image_of_another_identity(train: Start, w1: Worker) -> None:
    w1.run(
        "docker tag mixtral-trainer:release right && "
        "printf 'FROM right\\nLABEL mixtral-trainer.inputs=of-another-tree\\n' "
        "| docker build --tag mixtral-trainer:release -"
    )
    try:
        run = train()
        code = run.end()
    finally:
        w1.run("docker tag right mixtral-trainer:release && docker rmi right")
    assert code != 0
    assert "worker sim-w1" in run.table
    assert "of-another-t" in run.table
    assert "Install the controller's image: ansible-playbook site.yml" in run.table
    assert "worker sim-w0" not in run.table


def test_a_disk_that_is_full(train: Start, w1: Worker) -> None:
    with w1.small_disk():
        run = train()
        code = run.end()
    assert code != 0
    assert "worker sim-w1" in run.table
    assert "0.06 GiB of disk are free for the run's files; 1 are needed" in run.table
    assert "worker sim-w0" not in run.table


def test_half_a_run(train: Start, playbook: Start, w1: Worker) -> None:
    w1.run(
        "docker rm --force mixtral-trainer; "
        "docker run --detach --init --name mixtral-trainer --label run_id=half "
        "--label started_by=me@here --entrypoint sleep mixtral-trainer:release 600"
    )
    run = train()
    assert run.end() != 0
    assert "Run half, started by me@here" in run.table
    assert "but not on sim-w0" in run.table
    assert playbook("stop.yml").end() == 0


def test_a_registry_that_is_down(playbook: Start, w1: Worker) -> None:
    # Layers outlive a slice, and whoever has the image needs no registry.
    w1.run("docker rmi --force mixtral-trainer-small:release 2> /dev/null || true")
    registry = docker.from_env().containers.get(REGISTRY)
    registry.stop()
    before = w1.run("docker images --quiet --all")
    try:
        run = playbook("site.yml", "--tags=image", image_source="registry", **SMALL_IMAGE)
        assert run.end() != 0
    finally:
        registry.start()
    (network,) = registry.attrs["NetworkSettings"]["Networks"].values()
    assert f"{network['IPAddress']}:5000" in run.table
    assert w1.run("docker images --quiet --all") == before
