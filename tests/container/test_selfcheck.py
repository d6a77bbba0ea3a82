"""The comparison of lock files with what is installed."""

import importlib.metadata

from container.selfcheck import wrong_versions

PYTEST = importlib.metadata.version("pytest")


def test_what_is_installed_as_pinned_is_right():
    assert wrong_versions(f"# a comment\npytest=={PYTEST} \\\n    --hash=sha256:0\n") == []


def test_another_version_and_a_missing_package_are_named():
    assert wrong_versions("pytest==1.0 \\\n    --hash=sha256:0\nno-such_package.x==2.0\n") == [
        f"pytest: pinned 1.0, installed {PYTEST}",
        "no-such_package.x: pinned 2.0, installed missing",
    ]


def test_a_local_version_is_the_public_one(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.9.1+cpu")
    assert wrong_versions("torch==2.9.1\n") == []
    assert wrong_versions("torch==2.9\n") != []
