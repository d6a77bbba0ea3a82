"""Where the token for the hub is found, and what is none."""

import pytest
from ansible.errors import AnsibleLookupError
from ansible.parsing.dataloader import DataLoader
from ansible.parsing.vault import VaultLib, VaultSecret
from ansible_collections.mixtral.tpu.plugins.lookup.hub_token import cleaned, find

TOKEN = "hf_for-this-test"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "token"
    path.write_text("of the file\n")
    return str(path)


def test_the_first_place_that_has_one_counts(file, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "of the environment")
    loader = DataLoader()
    assert find("of the variable", file, loader) == ("of the variable", "the variable hf_token")
    assert find("", file, loader) == ("of the file\n", f"the file {file}")
    assert find("", "", loader)[0] == "of the environment"


@pytest.mark.parametrize("value", [None, ""])
def test_no_token_is_fine(value, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    if value is not None:
        monkeypatch.setenv("HF_TOKEN", value)
    assert find("", "", DataLoader()) == ("", "")


def test_a_file_may_be_a_vault(tmp_path):
    secret = VaultSecret(b"of this test")
    loader = DataLoader()
    loader.set_vault_secrets([("default", secret)])
    path = tmp_path / "token"
    path.write_bytes(VaultLib([("default", secret)]).encrypt(TOKEN))
    assert find("", str(path), loader)[0] == TOKEN


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(AnsibleLookupError, match="on the controller there is no file /"):
        find("", str(tmp_path / "none"), DataLoader())


def test_the_end_of_the_line_is_no_part_of_it():
    assert cleaned(f"{TOKEN}\n", "here", ["@vars.yml", "gmm=true"]) == TOKEN


@pytest.mark.parametrize(
    ("token", "word"),
    [
        (" \n", "is empty"),
        (f"{TOKEN}\n{TOKEN}", "has white space in it"),
        (f"{TOKEN} x", "has white space in it"),
        (f"{TOKEN}\0", "allowed is printable ASCII"),
        (f"{TOKEN}é", "allowed is printable ASCII"),
    ],
)
def test_what_can_be_no_token_is_refused_without_repeating_it(token, word):
    with pytest.raises(AnsibleLookupError, match=word) as refused:
        cleaned(token, "the file x", [])
    assert "The Hugging Face token in the file x" in str(refused.value)
    assert TOKEN not in str(refused.value)


@pytest.mark.parametrize("words", [f"hf_token={TOKEN}", f'{{"hf_token": "{TOKEN}"}}'])
def test_one_that_everybody_has_seen_is_refused(words):
    with pytest.raises(AnsibleLookupError, match="Revoke the token") as refused:
        cleaned(TOKEN, "the variable hf_token", [words])
    assert TOKEN not in str(refused.value)
