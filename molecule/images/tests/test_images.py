"""Three ways of one image to the workers, and what happens when there is nothing to bring."""

import json
import subprocess
from collections.abc import Callable

import pytest

from tests.simulated_slice import SMALL_IMAGE, WORKERS, Playbook, Worker

IMAGE = "mixtral-trainer-small:release"
LABEL = "mixtral-trainer.inputs"

Start = Callable[..., Playbook]


def inspect(worker: str) -> dict:
    (image,) = json.loads(Worker(worker).run(f"docker image inspect {IMAGE}"))
    return image


@pytest.fixture
def bring(playbook: Start) -> Start:
    """Bring the small image; it must be there afterwards, the same on every worker."""

    def to_its_end(source: str, *options: str, **variables: object) -> Playbook:
        run = playbook("site.yml", *options, image_source=source, **(SMALL_IMAGE | variables))
        assert run.end() == 0
        return run

    return to_its_end


@pytest.fixture
def _fresh_workers(bring: Start) -> None:
    """Provision the workers, less the image."""
    bring("ship")
    for name in WORKERS:
        Worker(name).run(f"docker rmi --force {IMAGE} && docker image prune --force")


@pytest.fixture
def registry() -> Callable[[str], list[str]]:
    """What the registry was asked for, by the beginning of its requests."""
    began = subprocess.run(["date", "+%s"], capture_output=True, text=True, check=True).stdout

    def requests(beginning: str) -> list[str]:
        log = subprocess.run(
            ["docker", "logs", "--since", began.strip(), "sim-registry"],
            capture_output=True,
            text=True,
            check=True,
        )
        return [line for line in (log.stdout + log.stderr).splitlines() if beginning in line]

    return requests


@pytest.mark.usefixtures("_fresh_workers")
@pytest.mark.parametrize("source", ["ship", "registry", "build"])
def test_an_image_comes_once(bring: Start, source: str) -> None:
    checked = bring(source, "--check")
    assert "changed=0" not in checked.table
    assert not any(Worker(name).answers(f"docker image inspect {IMAGE}") for name in WORKERS)
    bring(source)
    labels = {inspect(name)["Config"]["Labels"][LABEL] for name in WORKERS}
    assert len(labels) == 1
    again = bring(source)
    assert again.table.count("changed=0") == len(WORKERS)


@pytest.mark.usefixtures("_fresh_workers")
def test_a_worker_pulls_by_digest_and_only_what_it_lacks(bring: Start, registry: Callable) -> None:
    bring("registry")
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


@pytest.mark.usefixtures("_fresh_workers")
def test_an_image_is_shipped_only_where_it_is_not(bring: Start) -> None:
    bring("ship")
    Worker("sim-w1").run(f"docker rmi --force {IMAGE}")
    run = bring("ship")
    (summary,) = [line for line in run.screen.splitlines() if line.startswith("sim-w0 ")]
    assert "changed=0" in summary
    assert inspect("sim-w1")["Config"]["Labels"][LABEL]
