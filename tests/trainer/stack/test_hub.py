"""The guide's names against a hub, by the libraries that ask it, on its good and its bad days."""

import functools
import io
import random
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
from huggingface_hub import constants, file_download
from huggingface_hub.utils import _http, close_session

from tests.servers.faults import Fault
from tests.servers.hub import Hub, sha256
from tests.servers.hub_content import tokenizer, wikitext
from trainer.arguments import Arguments
from trainer.data import load_tokenizer
from trainer.flags import BadInput
from trainer.text_sources import load_texts
from trainer.validation import parse

DATASET, TOKENIZER = "Salesforce/wikitext", "mistralai/Mixtral-8x7B-v0.1"
TRAIN = "wikitext-2-raw-v1/train-00000-of-00001.parquet"
# Too random to be packed into less than what the hub takes for large
TEXTS = ["", " = Title = \n", *(f"{random.Random(n).randbytes(400).hex()}\n" for n in range(4000))]


def parquet(texts: list[str]) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), file)
    return file.getvalue()


@functools.cache
def dataset() -> dict[str, bytes]:
    return wikitext(train=parquet(TEXTS), other=parquet(["another\n"]))


@pytest.fixture
def hub(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Hub]:
    """The hub, as it is on a good day, with nothing of it in a cache."""
    hub = request.config.hub
    hub.add(DATASET, dataset(), kind="dataset")
    hub.moved["wikitext"] = DATASET
    hub.add(TOKENIZER, tokenizer(), gated=True)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    close_session()
    yield hub
    for changed in (hub.repositories, hub.moved, hub.faults, hub.requests):
        changed.clear()
    close_session()


@pytest.fixture
def login(hub: Hub, tmp_path: Path) -> Callable[..., None]:
    """Put a token where the trainer reads it."""

    def put(token: str) -> None:
        (tmp_path / "token").write_text(token)

    return put


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that huggingface_hub has waited for, without anybody waiting."""
    waited: list[float] = []
    for module in (_http, file_download):
        clock = SimpleNamespace(sleep=waited.append, time=module.time.time)
        monkeypatch.setattr(module, "time", clock)
    return waited


@pytest.fixture
def guides(argv: list[str], tmp_path: Path) -> Callable[..., Arguments]:
    """Return the guide's flags for data, with some changed."""

    def flags(dataset: str = "wikitext", tokenizer: str = TOKENIZER) -> Arguments:
        names = ("--dataset_name", dataset, "--dataset_config_name", "wikitext-2-raw-v1")
        cache = ("--cache_dir", str(tmp_path / "cache"))
        return parse([*argv, *names, "--tokenizer_name", tokenizer, *cache])

    return flags


def refused(load: Callable[[], object]) -> str:
    """Return what is said of something that cannot be loaded; one line, as a log ends with it."""
    with pytest.raises(BadInput) as caught:
        load()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["wikitext", DATASET])
def test_the_dataset_has_an_old_and_a_new_name(hub: Hub, guides, name: str) -> None:
    assert list(load_texts(guides(name))) == TEXTS


def test_the_tokenizer_is_for_those_who_are_logged_in(hub: Hub, guides, login) -> None:
    login(hub.token(reads=[TOKENIZER]))
    loaded = load_tokenizer(guides(), TEXTS)
    line = " = Title = \n"
    ids = loaded(line)["input_ids"]
    assert loaded.convert_ids_to_tokens(ids) == ["<s>", "▁", *line[:-1].replace(" ", "▁"), "<0x0A>"]


def test_a_tokenizer_that_has_moved_is_found(hub: Hub, guides) -> None:
    hub.add("org/open", tokenizer())
    hub.moved["open"] = "org/open"
    assert len(load_tokenizer(guides(tokenizer="open"), TEXTS)) == 354


def test_a_download_that_breaks_off_is_taken_up_again(hub: Hub, guides, waits) -> None:
    file = dataset()[TRAIN]
    hub.faults.append(Fault(f"GET /{sha256(file)}", after=len(file) // 2))
    assert list(load_texts(guides())) == TEXTS
    assert hub.asked(f"GET /{sha256(file)}") == 2


def test_a_download_that_always_breaks_off_is_given_up(hub: Hub, guides, waits) -> None:
    file = dataset()[TRAIN]
    hub.faults.append(Fault(f"GET /{sha256(file)}", after=1000, times=1000))
    said = refused(lambda: load_texts(guides()))
    assert f"{hub.endpoint} was not reached, or it broke off (" in said
    assert "--dataset_name python-help needs no hub" in said


@pytest.mark.parametrize("where", ["GET /api/datasets/wikitext", "HEAD .*/README.md"])
def test_a_busy_hub_is_waited_for_as_it_says(hub: Hub, guides, waits, where: str) -> None:
    hub.faults.append(Fault(where, 429, {"Retry-After": "40"}, times=2))
    assert list(load_texts(guides())) == TEXTS
    assert set(waits) == {41}  # a second more than it asked for, against rounding


@pytest.mark.parametrize("where", ["GET /api/datasets/wikitext", f"GET /api/datasets/{DATASET}"])
def test_a_hub_that_stays_busy_is_left_alone(hub: Hub, guides, waits, where: str) -> None:
    hub.faults.append(Fault(where, 429, {"Retry-After": "40"}, times=1000))
    said = refused(lambda: load_texts(guides()))
    assert f"{hub.endpoint} was asked too often (429). Wait 40 s and start again" in said


@pytest.mark.parametrize("expired", [True, False])
def test_a_token_that_is_none_any_more(hub: Hub, guides, login, expired: bool) -> None:
    login(hub.token(expired=True) if expired else "hf_of-nobody")
    for load in (lambda: load_texts(guides()), lambda: load_tokenizer(guides(), TEXTS)):
        said = refused(load)
        assert f"{hub.endpoint} does not take the token (401), which is wrong or has" in said
        assert f"{hub.endpoint}/settings/tokens, and log in with it (HF_TOKEN" in said


def test_a_gate_without_a_login(hub: Hub, guides) -> None:
    hub.add("org/gated", dataset(), kind="dataset", gated=True)
    for page, load in [
        (TOKENIZER, lambda: load_tokenizer(guides(), TEXTS)),
        ("datasets/org/gated", lambda: load_texts(guides("org/gated"))),
    ]:
        said = refused(load)
        assert "(401), and this worker is not logged in" in said
        assert f"{hub.endpoint}/{page} and a token at" in said


def test_a_gate_that_does_not_open(hub: Hub, guides, login) -> None:
    hub.add("org/gated", dataset(), kind="dataset", gated=True)
    login(hub.token())
    for page, load in [
        (TOKENIZER, lambda: load_tokenizer(guides(), TEXTS)),
        ("datasets/org/gated", lambda: load_texts(guides("org/gated"))),
    ]:
        assert f"(403). Ask for access at {hub.endpoint}/{page};" in refused(load)


@pytest.mark.parametrize("name", ["org/none", "none"])
def test_what_is_not_there(hub: Hub, guides, login, name: str) -> None:
    login(hub.token())
    said = f"{hub.endpoint} has none of that name, or it is private (404). Check the name"
    assert said in refused(lambda: load_texts(guides(name)))
    assert said in refused(lambda: load_tokenizer(guides(tokenizer=name), TEXTS))


def test_a_configuration_that_is_not_there(hub: Hub, guides, argv: list[str]) -> None:
    arguments = parse([*argv, "--dataset_name", "wikitext", "--dataset_config_name", "wikitext-3"])
    said = refused(lambda: load_texts(arguments))
    assert "check it, and its configuration 'wikitext-3': " in said
    assert "wikitext-103-raw-v1" in said


def test_a_hub_that_is_not_to_be_asked(hub: Hub, guides, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert f"{hub.endpoint} was not reached, or" in refused(lambda: load_texts(guides()))
    assert "offline mode is enabled" in refused(lambda: load_texts(guides()))
    assert not hub.requests


def test_a_hub_that_is_down(hub: Hub, guides, waits, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        nowhere = f"http://127.0.0.1:{server.getsockname()[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", nowhere)
    said = refused(lambda: load_texts(guides()))
    assert f"{nowhere} was not reached, or it broke off ([Errno 111] Connection refused)" in said
    assert len(waits) == 5
