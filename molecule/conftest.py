"""What the tests of all scenarios start from.

By hand, with a slice that is up (make simulated-slice) and provisioned (site.yml):

pytest --capture=no molecule/faults -k sigkill
"""

import json
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from xdist.scheduler import LoadScopeScheduling

from tests.servers.authority import certify
from tests.servers.hub import Hub
from tests.servers.hub_content import tokenizer, wikitext
from tests.slices.simulated_slice import SMALL_MODEL, WORKERS, Playbook, Worker, forwarded

# Those that bring a small image, and the one that shows that no image came: all have this machine's
# engine in common.
ONE_AFTER_THE_OTHER = {
    "test_images.py",
    "test_reset.py",
    "test_before_the_start.py",
    "test_secrets.py",
}

# Read by the trainer's image, which has what parquet needs.
PARQUET = """
import json, pyarrow, pyarrow.parquet, sys
table = pyarrow.table({"text": json.load(sys.stdin)})
pyarrow.parquet.write_table(table, sys.stdout.buffer, compression="none")
"""


class OneSliceForEach(LoadScopeScheduling):
    """All tests of a file are run on one slice, and never beside those that they disturb."""

    def _split_scope(self, nodeid: str) -> str:
        file = Path(nodeid.partition("::")[0]).name
        return "small image" if file in ONE_AFTER_THE_OTHER else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> LoadScopeScheduling:
    return OneSliceForEach(config, log)


@pytest.fixture
def w0() -> Worker:
    return Worker("sim-w0")


@pytest.fixture
def w1() -> Worker:
    return Worker("sim-w1")


@pytest.fixture
def playbook() -> Iterator[Callable[..., Playbook]]:
    """Start playbooks; those that a failed test leaves behind are ended."""
    started = []

    def start(name: str, *options: str, **variables: object) -> Playbook:
        started.append(Playbook(name, *options, **variables))
        return started[-1]

    yield start
    for one in started:
        one.abort()


@pytest.fixture(scope="module")
def finished() -> Iterator[Callable[..., Playbook]]:
    """Run playbooks to their end."""
    started = []

    def run(name: str, *options: str, **variables: object) -> Playbook:
        started.append(Playbook(name, *options, **variables))
        started[-1].end()
        return started[-1]

    yield run
    for one in started:
        one.abort()


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """What wikitext holds: lines of ASCII, too random to be packed to what is not a large file."""
    pages = [f"{random.Random(number).randbytes(400).hex()} \n" for number in range(1600)]
    return ["", " = Title = \n", *pages]


@pytest.fixture(scope="session")
def parquet() -> Callable[[list[str]], bytes]:
    """Return a table of texts as a file, made where the trainer would read it."""

    def table(texts: list[str]) -> bytes:
        command = ["docker", "run", "--rm", "--interactive", "--entrypoint=python"]
        made = subprocess.run(
            [*command, "mixtral-trainer:release", "-c", PARQUET],
            input=json.dumps(texts).encode(),
            stdout=subprocess.PIPE,
            check=True,
        )
        return made.stdout

    return table


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """What the hub speaks TLS with, and the file of the authority that signed it."""
    return certify(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def hub(authority: tuple, texts: list[str], parquet: Callable[[list[str]], bytes]) -> Iterator[Hub]:
    """A hub that controller and workers reach under one address; no worker has anything of it."""
    cache = "/home/tpu/mixtral-trainer/cache/container"
    for name in WORKERS:
        Worker(name).run(f"rm -rf {cache}/models--mistralai--* {cache}/Salesforce___wikitext")
    with Hub(authority[0]) as hub, forwarded(*hub.ports):
        files = wikitext(train=parquet(texts), other=parquet(["another\n"]))
        hub.add("Salesforce/wikitext", files, kind="dataset")
        hub.moved["wikitext"] = "Salesforce/wikitext"
        hub.add("mistralai/Mixtral-8x7B-v0.1", tokenizer(), gated=True)
        yield hub


@pytest.fixture(scope="module")
def guides() -> dict[str, object]:
    """The guide's names, and a small model."""
    return SMALL_MODEL | {
        "dataset_name": "wikitext",
        "dataset_config_name": "wikitext-2-raw-v1",
        "tokenizer_name": "mistralai/Mixtral-8x7B-v0.1",
        "max_steps": 3,
    }
