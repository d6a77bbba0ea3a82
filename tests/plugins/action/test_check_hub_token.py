"""What the hub says about a token, and what the user is told."""

import socket

import pytest
from ansible_collections.mixtral.tpu.plugins.action import check_hub_token
from ansible_collections.mixtral.tpu.plugins.action.check_hub_token import (
    ATTEMPTS,
    TokenError,
    check_endpoint,
    is_repository,
    owner,
    unreadable,
)
from huggingface_hub import HfApi

from tests.servers.faults import Fault
from tests.servers.hub import Hub
from tests.servers.hub_client import fresh_client


@pytest.fixture
def waits(monkeypatch):
    """The seconds that were waited for, without anybody waiting."""
    waited = []
    monkeypatch.setattr(check_hub_token.time, "sleep", waited.append)
    return waited


@pytest.fixture
def hub(monkeypatch):
    with fresh_client(monkeypatch), Hub() as hub:
        yield hub


def api(hub, token: str) -> HfApi:
    return HfApi(endpoint=hub.endpoint, token=token)


def test_a_token_that_the_hub_knows_has_an_owner(hub):
    assert owner(api(hub, hub.token("grace")), "HF_TOKEN") == "grace"


@pytest.mark.parametrize(("expired", "word"), [(True, "expired"), (False, "wrong")])
def test_an_expired_or_wrong_token_is_refused(hub, expired, word):
    token = hub.token(expired=True) if expired else "hf_unknown"
    with pytest.raises(
        TokenError, match=f"^The Hugging Face token in the file x is {word}:"
    ) as said:
        owner(api(hub, token), "the file x")
    assert f"{hub.endpoint}/settings/tokens" in str(said.value)
    assert hub.asked("whoami") == 1


def test_readable_repositories_are_no_complaint(hub):
    token = hub.token(reads=["org/gated"])
    hub.add("org/gated", {}, gated=True)
    hub.add("org/texts", {}, kind="dataset")
    hub.moved["texts"] = "org/texts"
    asked = {"model": ["org/gated", "/a/path", "./b"], "dataset": ["org/texts", "texts"]}
    assert not list(unreadable(api(hub, token), "ada", "HF_TOKEN", asked))


def test_everything_that_may_not_be_read_is_named_with_its_page(hub):
    hub.add("org/gated", {}, gated=True)
    hub.add("org/texts", {}, gated=True, kind="dataset")
    hub.add("org/own", {}, private=True)
    hub.add("org/odd", {})
    hub.add("org/lost", {})
    hub.faults += [Fault("org/odd/auth-check", 403), Fault("org/lost/auth-check", 418)]
    asked = {
        "model": ["org/gated", "org/own", "org/odd", "org/lost"],
        "dataset": ["org/texts"],
    }
    gated, own, odd, lost, texts = unreadable(api(hub, hub.token()), "ada", "HF_TOKEN", asked)
    assert "is unauthorised for the gated model org/gated" in gated
    assert f"{hub.endpoint}/org/gated" in gated
    assert "cannot find the model org/own" in own
    assert "is unauthorised for the model org/odd" in odd
    assert "answers 403" in odd
    assert "cannot read the model org/lost" in lost
    assert "is unauthorised for the gated dataset org/texts" in texts
    assert f"{hub.endpoint}/datasets/org/texts" in texts


@pytest.mark.parametrize(
    ("status", "headers", "waited"),
    [
        (429, {"Retry-After": "7"}, [7, 7]),
        (429, {"Retry-After": "86400"}, [60, 60]),
        (429, {"Retry-After": "Fri, 31 Dec 1999 23:59:59 GMT"}, [1, 2]),
        (503, {}, [1, 2]),
    ],
)
def test_a_busy_hub_is_asked_again(hub, waits, status, headers, waited):
    hub.faults.append(Fault("whoami", status, headers, times=2))
    assert owner(api(hub, hub.token("grace")), "HF_TOKEN") == "grace"
    assert waits == waited


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_hub_that_stays_busy_is_given_up(hub, waits, status):
    hub.faults.append(Fault("whoami", status, times=100))
    with pytest.raises(TokenError, match=f"hub at {hub.endpoint} answers {status}"):
        owner(api(hub, hub.token()), "HF_TOKEN")
    assert hub.asked("whoami") == ATTEMPTS
    assert waits == [1, 2, 4]


def test_a_hub_that_breaks_off_is_asked_again(hub, waits):
    hub.faults.append(Fault("whoami", after=10))
    assert owner(api(hub, hub.token("grace")), "HF_TOKEN") == "grace"
    assert waits == [1]


def test_a_hub_that_is_not_there_is_named(hub, waits):
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
    with pytest.raises(TokenError, match=f"hub at {endpoint} is unreachable") as said:
        owner(HfApi(endpoint=endpoint, token="hf_x"), "HF_TOKEN")
    assert "HF_ENDPOINT" in str(said.value)
    assert waits == [1, 2, 4]


def test_a_server_that_is_no_hub_is_named(hub):
    hub.faults.append(Fault("whoami", 404))
    with pytest.raises(TokenError, match="answers 404 to the question whom the token in HF_TOKEN"):
        owner(api(hub, "hf_x"), "HF_TOKEN")


@pytest.mark.parametrize(
    "endpoint", ["hub.example", "ftp://hub.example", "https://", "http://hub:port"]
)
def test_an_invalid_address_is_refused(endpoint):
    with pytest.raises(TokenError, match="HF_ENDPOINT"):
        check_endpoint(endpoint)


def test_another_hub_may_be_named():
    check_endpoint("http://127.0.0.1:8000/hub")


@pytest.mark.parametrize(
    ("name", "can_be"), [("org/model", True), ("wikitext", True), ("/a/b", False), ("./a", False)]
)
def test_a_path_is_no_repository(name, can_be):
    assert is_repository(name) == can_be
