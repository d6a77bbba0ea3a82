"""huggingface_hub's client in a test's own process, for a hub on this machine."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session


@contextmanager
def fresh_client(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the client ask nobody else, and keep no connection of or for another test."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    close_session()
    try:
        yield
    finally:
        close_session()
