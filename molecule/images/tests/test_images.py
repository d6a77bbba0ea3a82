"""Three ways of one image to the workers, and what happens when there is nothing to bring."""

import json
import subprocess
from collections.abc import Callable

import pytest

from tests.slices.simulated_slice import REGISTRY, SMALL_IMAGE, WORKERS, Playbook, Worker

IMAGE = "mixtral-trainer-small:release"
LABEL = "mixtral-trainer.inputs"

Finished = Callable[..., Playbook]


def inspect(worker: str) -> dict:
    (image,) = json.loads(Worker(worker).run(f"docker image inspect {IMAGE}"))
    return image


@pytest.fixture(scope="module", autouse=True)
def _provisioned_workers(finished: Finished) -> None:
    assert finished("site.yml", **SMALL_IMAGE).code == 0


@pytest.fixture(autouse=True)
def _without_the_image(_provisioned_workers: None) -> None:
    for name in WORKERS:
        Worker(name).run(f"docker rmi --force {IMAGE}; docker image prune --force")


@pytest.fixture
def bring(finished: Finished) -> Finished:
    """Bring the small image."""

    def well(source: str, *options: str) -> Playbook:
        run = finished("site.yml", "--tags=image", *options, image_source=source, **SMALL_IMAGE)
        assert run.code == 0
        return run

    return well


@pytest.fixture
def bring_once(bring: Finished) -> Callable[[str], None]:
    """Bring the small image, the same to every worker, after a look and before a second time."""

    def once(source: str) -> None:
        checked = bring(source, "--check")
        assert "changed=0" not in checked.table
        assert not any(Worker(name).answers(f"docker image inspect {IMAGE}") for name in WORKERS)
        bring(source)
        labels = {inspect(name)["Config"]["Labels"][LABEL] for name in WORKERS}
        assert len(labels) == 1
        again = bring(source)
        assert again.table.count("changed=0") == len(WORKERS)

    return once


@pytest.fixture
def registry() -> Callable[[str], list[str]]:
    """What the registry was asked for, by the beginning of its requests."""
    began = subprocess.run(["date", "+%s"], capture_output=True, text=True, check=True).stdout

    def requests(beginning: str) -> list[str]:
        log = subprocess.run(
            ["docker", "logs", "--since", began.strip(), REGISTRY],
            capture_output=True,
            text=True,
            check=True,
        )
        return [line for line in (log.stdout + log.stderr).splitlines() if beginning in line]

    return requests


def test_an_image_is_built_on_every_worker(bring_once: Callable[[str], None]) -> None:
    bring_once("build")


def test_an_image_is_shipped_only_where_it_is_not(
    bring: Finished, bring_once: Callable[[str], None]
) -> None:
    bring_once("ship")
    Worker("sim-w1").run(f"docker rmi --force {IMAGE}")
    run = bring("ship")
    (summary,) = [line for line in run.screen.splitlines() if line.startswith("sim-w0 ")]
    assert "changed=0" in summary
    assert inspect("sim-w1")["Config"]["Labels"][LABEL]


def test_a_worker_pulls_by_digest_and_only_what_it_lacks(
    bring: Finished, bring_once: Callable[[str], None], registry: Callable
) -> None:
    bring_once("registry")
    digests = {tuple(inspect(name)["RepoDigests"]) for name in WORKERS}
    assert len(digests) == 1
    ((digest,),) = digests
    assert "@sha256:" in digest
    # With its layers still there, the image moves without them.
    worker = Worker("sim-w1")
    worker.run(f"docker tag {IMAGE} kept && docker rmi {IMAGE}")
    try:
        before = len(registry('"GET /v2/mixtral-trainer-small/blobs/'))
        assert before
        bring("registry")
        assert len(registry('"GET /v2/mixtral-trainer-small/blobs/')) == before
    finally:
        worker.run("docker rmi kept")
