"""A release of a copy of this tree: what it makes, and what it refuses."""

import json
import subprocess
import tarfile
from pathlib import Path

import pytest
import yaml

from tests.playbook import ROOT

VERSION = "100.0.0"


def git(checkout: Path, *arguments: str | Path) -> str:
    command = ["git", "-C", checkout, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def release(checkout: Path, version: str) -> subprocess.CompletedProcess[str]:
    # The copy has no .venv to make: the tools are those of this environment.
    command = ["make", "--assume-old=.venv/ready", "release", f"VERSION={version}"]
    return subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this tree, also of what is not committed, of which VERSION is released."""
    checkout = tmp_path_factory.mktemp("checkout")
    git(checkout, "init", "--quiet")
    git(checkout, "config", "user.name", "Somebody")
    git(checkout, "config", "user.email", "somebody@example.com")
    git(checkout, "--git-dir", checkout / ".git", "--work-tree", ROOT, "add", "--all", ROOT)
    git(checkout, "checkout-index", "--all")
    fragment = checkout / "changelogs/fragments/something.yml"
    fragment.parent.mkdir(exist_ok=True)
    fragment.write_text("bugfixes: [something - The answer is 42.]\n")
    git(checkout, "add", "--all")
    git(checkout, "commit", "--quiet", "--no-verify", "--message", "Copy the tree")
    made = release(checkout, VERSION)
    assert made.returncode == 0, made.stdout + made.stderr
    return checkout


def test_version_changelog_tag_and_archive_of_a_release_agree(released: Path) -> None:
    assert git(released, "tag", "--points-at", "HEAD").split() == [VERSION]
    assert git(released, "status", "--porcelain") == ""
    assert yaml.safe_load((released / "galaxy.yml").read_text())["version"] == VERSION
    changes = yaml.safe_load((released / "changelogs/changelog.yaml").read_text())["releases"]
    assert "something - The answer is 42." in changes[VERSION]["changes"]["bugfixes"]
    page = (released / "CHANGELOG.md").read_text().replace("\\", "")
    newest, *_ = page.partition(f"\n## v{VERSION}\n")[2].partition("\n## ")
    assert "* something - The answer is 42." in newest
    with tarfile.open(released / f"mixtral-tpu-{VERSION}.tar.gz") as archive:
        manifest = json.load(archive.extractfile("MANIFEST.json"))
    assert manifest["collection_info"]["version"] == VERSION


def test_what_is_released_is_not_released_again(released: Path) -> None:
    assert not list(released.glob("changelogs/fragments/*"))
    refused = release(released, "101.0.0")
    assert refused.returncode
    assert "changelogs/fragments is empty" in refused.stderr


@pytest.mark.parametrize(
    ("version", "said"),
    [
        ("", "without a version: the version has to be three numbers"),
        ("v101.0.0", "v101.0.0: the version has to be three numbers"),
        ("101.0", "101.0: the version has to be three numbers"),
        ("100.0.0", "100.0.0: it has to be greater than 100.0.0"),
        ("99.9.9", "99.9.9: it has to be greater than 100.0.0"),
        (
            "101.0.0",
            "these files are not committed. Commit them or remove them:  M LICENSE",
        ),
    ],
)
def test_a_release_that_is_refused_changes_nothing(released: Path, version: str, said: str) -> None:
    license_ = released / "LICENSE"
    committed = license_.read_bytes()
    license_.write_text("Uncommitted")
    before = git(released, "status", "--porcelain"), git(released, "show-ref")
    refused = release(released, version)
    assert refused.returncode
    assert said in refused.stderr
    assert (git(released, "status", "--porcelain"), git(released, "show-ref")) == before
    license_.write_bytes(committed)
