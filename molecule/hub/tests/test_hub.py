"""Two workers train on the guide's dataset with the guide's tokenizer, as a hub lets them."""

import json
from collections.abc import Callable, Iterator

import pytest

from tests.servers.faults import Fault
from tests.servers.hub import Hub, sha256
from tests.slices.simulated_slice import WORKERS, Playbook, Runs, Worker

DATASET, TOKENIZER = "Salesforce/wikitext", "mistralai/Mixtral-8x7B-v0.1"
TRAIN = "wikitext-2-raw-v1/train-00000-of-00001.parquet"
Start = Callable[..., Playbook]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def finished(finished: Start, hub: Hub, authority: tuple, guides: dict, runs: Runs) -> Start:
    """Run playbooks to their end, on a controller that trusts the hub's authority."""
    reach = {"HF_ENDPOINT": hub.endpoint, "SSL_CERT_FILE": str(authority[1])}

    def run(name: str, *options: str, token: str = "", **variables: object) -> Playbook:
        variables = {"runs_dir": str(runs.directory)} | guides | variables
        environment = reach | {"NO_PROXY": "127.0.0.1", "HF_TOKEN": token}
        return finished(name, *options, environment=environment, **variables)

    return run


@pytest.fixture(scope="module")
def token(hub: Hub, finished: Start) -> Iterator[str]:
    """A token that every worker is logged in with."""
    token = hub.token("ada", reads=[TOKENIZER])
    assert finished("site.yml", "--tags=login", token=token).code == 0
    yield token
    assert finished("reset.yml", "--tags=login", confirm=True).code == 0


@pytest.fixture(scope="module")
def run(hub: Hub, token: str, finished: Start) -> Playbook:
    """A run while the hub has a bad day: it breaks off, and is too busy at first."""
    file = hub.repositories["dataset", DATASET].files[TRAIN]
    hub.faults += [
        Fault(f"GET /{sha256(file)}", after=len(file) // 2, times=2),
        Fault("GET /api/datasets/wikitext", 429, {"Retry-After": "1"}, times=2),
    ]
    return finished("train.yml")


def test_the_guides_names_are_enough(run: Playbook, runs: Runs, texts: list[str]) -> None:
    runs.assert_healthy(run, 3)
    # The tokenizer makes one of each character, of the beginning, and of a space before it.
    tokens = sum(len(text) + 2 if text else 1 for text in texts)
    said = f"data: wikitext: {len(texts)} texts, {tokens} tokens, {tokens // 32} blocks of 32"
    for name in WORKERS:
        assert said in (runs.worker(name) / "trainer.log").read_text()


def test_what_is_gated_was_given_to_the_one_who_is_logged_in(run: Playbook, hub: Hub) -> None:
    assert hub.reads.count(("ada", f"{TOKENIZER}/tokenizer.json")) == len(WORKERS)


def test_what_broke_off_was_taken_up_again(run: Playbook, hub: Hub) -> None:
    file = hub.repositories["dataset", DATASET].files[TRAIN]
    assert hub.asked(f"GET /{sha256(file)}") == len(WORKERS) + 2


def test_a_hub_that_was_busy_was_asked_again(run: Playbook, hub: Hub) -> None:
    # Both refusals, both workers, and the way on from the old name to the new one
    assert hub.asked("GET /api/datasets/wikitext$") == len(WORKERS) + 2


def test_the_login_is_a_file_that_is_only_read(run: Playbook, token: str, w1: Worker) -> None:
    (container,) = json.loads(w1.run("docker inspect mixtral-trainer"))
    assert "HF_TOKEN_PATH=/hf/token" in container["Config"]["Env"]
    mounts = {mount["Destination"]: mount for mount in container["Mounts"]}
    assert mounts["/hf"]["Source"] == "/home/tpu/mixtral-trainer/hf"
    assert [mounts[path]["RW"] for path in ("/hf", "/ca.crt")] == [False, False]


def test_a_token_that_has_expired(finished: Start, hub: Hub, token: str) -> None:
    hub.tokens[token].expired = True
    run = finished("train.yml")
    assert run.code != 0
    assert f"{hub.endpoint} does not take the token (401), which is wrong or has" in run.table
    assert f"{hub.endpoint}/settings/tokens, and log in with it (HF_TOKEN" in run.table
