"""What a worker that does not fit is told."""

from pathlib import Path

import pytest

from tests.playbook import Playbook, run_playbook, write_inventory, write_play

# A worker for everything that can be wrong, with what makes it so and what is said about it
UNFIT = {
    "disk": (
        {"worker_preflight_install_gib": 100_000, "worker_preflight_image": "no/such:image"},
        "GiB of disk are free for /var/lib/docker; 100000.0 are needed to build the image",
    ),
    "memory": ({"worker_preflight_memory_gib": 100_000}, "GiB of memory; 100000 are needed"),
    "clock": ({"worker_preflight_clock_seconds": -1}, "at most -1 s are allowed"),
    "accelerator": (
        {"worker_preflight_accelerator": True},
        "there is neither /dev/accel* nor /dev/vfio/*",
    ),
}


def check(directory: Path, hosts: dict[str, dict], **variables: object) -> Playbook:
    play = write_play(directory, roles=["mixtral.tpu.worker_preflight"])
    inventory = write_inventory(directory, hosts)
    return run_playbook(play, "--check", inventory=inventory, pjrt_device="CPU", **variables)


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> Playbook:
    """One run on all of them: a worker that is refused does not keep the others from the rest."""
    hosts = {name: variables for name, (variables, _) in UNFIT.items()}
    return check(tmp_path_factory.mktemp("preflight"), hosts)


@pytest.mark.parametrize("worker", UNFIT)
def test_a_worker_that_does_not_fit_is_refused(refused: Playbook, worker: str) -> None:
    assert refused.code == 2
    assert UNFIT[worker][1] in refused.failure(worker)


def test_a_distribution_that_is_not_supported_is_refused(tmp_path: Path) -> None:
    run = check(tmp_path, {"w0": {}}, worker_preflight__distributions={"Debian": "99"})
    assert run.code == 2
    assert "Supported, on x86_64: Debian 99 or newer" in run.failure("w0")
