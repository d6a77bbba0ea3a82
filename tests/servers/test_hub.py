"""The hub of these tests against the client that everybody uses."""

import random
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import close_session

from tests.servers.authority import certify
from tests.servers.faults import Fault
from tests.servers.hub import Hub, sha256
from tests.servers.hub_client import fresh_client

WEIGHTS = random.Random(7).randbytes(12_000_000)
FILES = {"config.json": b"{}\n", "onnx/small.bin": b"x" * 1000, "onnx/model.bin": WEIGHTS}


@pytest.fixture
def hub(monkeypatch):
    """A hub with an open and a gated model. The client asks nobody else, and keeps to itself."""
    with fresh_client(monkeypatch), Hub() as hub:
        hub.add("org/open", FILES)
        hub.add("org/gated", FILES, gated=True)
        yield hub


@pytest.fixture
def download(hub, tmp_path):
    """Return what downloads one file of a repository and returns its content."""

    def content(name: str, path: str, token: str | bool = False, **options: str) -> bytes:
        options |= {"endpoint": hub.endpoint, "cache_dir": tmp_path}
        return Path(hf_hub_download(name, path, token=token, **options)).read_bytes()

    return content


def test_a_snapshot_is_the_repository(hub, tmp_path):
    def snapshot() -> Path:
        options = {"endpoint": hub.endpoint, "cache_dir": tmp_path, "token": False}
        return Path(snapshot_download("org/open", **options))

    directory = snapshot()
    assert directory.name == hub.repositories["model", "org/open"].commit
    found = {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }
    assert found == FILES
    before = hub.asked("resolve")
    assert snapshot() == directory
    assert hub.asked("resolve") == before


def test_a_large_file_comes_from_elsewhere_and_the_token_does_not_go_there(hub, download):
    token = hub.token(reads=["org/gated"])
    assert download("org/gated", "onnx/model.bin", token=token) == WEIGHTS
    assert hub.asked(f"^GET /{sha256(WEIGHTS)}$") == 1
    link, headers = hub.link(sha256(WEIGHTS)), {"Authorization": f"Bearer {token}"}
    assert httpx2.get(link, headers=headers, trust_env=False).status_code == 400
    assert httpx2.get(link.partition("?")[0], trust_env=False).status_code == 403


def test_a_dataset_and_a_model_may_have_the_same_name(hub, download):
    hub.add("org/open", {"data.txt": b"text"}, kind="dataset")
    assert download("org/open", "data.txt", repo_type="dataset") == b"text"
    with pytest.raises(RemoteEntryNotFoundError):
        download("org/open", "data.txt")


def test_a_renamed_repository_is_found(hub, download):
    hub.moved["old"] = "org/open"
    assert download("old", "config.json") == FILES["config.json"]


def test_a_gated_repository_is_read_by_those_on_its_list(hub, download):
    assert download("org/gated", "config.json", token=hub.token(reads=["org/gated"])) == b"{}\n"
    for token, status in [(False, 401), (hub.token(), 403)]:
        with pytest.raises(
            GatedRepoError, match="Access to model org/gated is restricted"
        ) as found:
            download("org/gated", "onnx/small.bin", token=token)
        assert found.value.response.status_code == status


def test_a_private_repository_is_not_found_by_others(hub, download):
    hub.add("ada/private", FILES, private=True)
    assert download("ada/private", "config.json", token=hub.token(reads=["ada/private"]))
    for name in ("ada/private", "ada/none"):
        for token in (False, hub.token()):
            with pytest.raises(RepositoryNotFoundError):
                download(name, "onnx/small.bin", token=token)


def test_what_does_not_exist_is_named(download):
    with pytest.raises(RemoteEntryNotFoundError):
        download("org/open", "none.bin")
    with pytest.raises(RevisionNotFoundError):
        download("org/open", "config.json", revision="v9")


def test_a_token_has_an_owner(hub):
    assert HfApi(endpoint=hub.endpoint).whoami(hub.token("grace"))["name"] == "grace"


@pytest.mark.parametrize("expired", [True, False])
def test_an_expired_or_unknown_token_is_refused_everywhere(hub, expired):
    token = hub.token(expired=True) if expired else "hf_never"
    api = HfApi(endpoint=hub.endpoint, token=token)
    for question in (api.whoami, lambda: api.model_info("org/open")):
        with pytest.raises(HfHubHTTPError) as found:
            question()
        assert found.value.response.status_code == 401
        assert ("is expired" in found.value.response.text) == expired


def test_a_broken_download_goes_on_where_it_was(hub, download):
    hub.faults.append(Fault(f"GET /{sha256(WEIGHTS)}", after=11_000_000))
    assert download("org/open", "onnx/model.bin") == WEIGHTS
    # The client takes pieces of this size, and loses one that is not whole.
    assert hub.asked(f"GET /{sha256(WEIGHTS)} bytes={constants.DOWNLOAD_CHUNK_SIZE}-") == 1


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_hub_is_asked_again(hub, download, status):
    where = "/resolve/main/config.json"
    hub.faults.append(Fault(f"HEAD .*{where}", status, {"Retry-After": "0"}, times=2))
    assert download("org/open", "config.json") == b"{}\n"
    assert hub.asked(f"HEAD .*{where}") == 3


def test_it_speaks_tls_to_those_who_trust_its_authority(monkeypatch, tmp_path):
    tls, trusted = certify(tmp_path)
    with fresh_client(monkeypatch), Hub(tls) as hub:
        api = HfApi(endpoint=hub.endpoint, token=hub.token("grace"))
        monkeypatch.setenv("SSL_CERT_FILE", str(trusted))
        close_session()
        assert api.whoami()["name"] == "grace"
        monkeypatch.delenv("SSL_CERT_FILE")
        close_session()
        with pytest.raises(httpx2.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            api.whoami()


def test_reads_are_recorded_with_their_user(hub, download):
    download("org/gated", "config.json", token=hub.token("grace", reads=["org/gated"]))
    download("org/open", "config.json")
    assert hub.reads == [("grace", "org/gated/config.json"), (None, "org/open/config.json")]
