"""A small, valid set of flags and files, for tests to spoil one thing at a time."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PRESETS = Path(__file__).parents[2] / "trainer" / "presets"


@pytest.fixture
def presets() -> Path:
    return PRESETS


@pytest.fixture
def write_config(tmp_path: Path) -> Callable[..., Path]:
    """Write the tiny preset with changes as a config.json; a key set to ... is left out."""

    def write(**changes: Any) -> Path:
        config = json.loads((PRESETS / "mixtral-tiny.json").read_text()) | changes
        path = tmp_path / "config.json"
        path.write_text(json.dumps({key: config[key] for key in config if config[key] is not ...}))
        return path

    return write


@pytest.fixture
def argv(tmp_path: Path, write_config: Callable[..., Path]) -> list[str]:
    """Return flags that pass: the tiny model, to be trained on Python's help."""
    return [
        *("--do_train", "--output_dir", str(tmp_path / "out"), "--dataset_name", "python-help"),
        *("--config_name", str(write_config())),
    ]
