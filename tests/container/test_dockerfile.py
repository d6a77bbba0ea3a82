"""The image's identity covers what it is built from, and nothing that the controller runs."""

import re
from pathlib import Path

import pytest
import yaml

from plugins.lookup.build_context import list_files

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def covered() -> list[str]:
    """Every file whose change gives the image another identity."""
    defaults = yaml.safe_load((ROOT / "roles/trainer_image/defaults/main.yml").read_text())
    return list_files(ROOT, defaults["trainer_image_source_paths"])


def test_every_file_that_is_copied_is_covered(covered: list[str]) -> None:
    instructions = (ROOT / "container/Dockerfile").read_text().replace("\\\n", " ")
    sources = [
        source
        for line in re.findall(r"^COPY (.*)", instructions, re.MULTILINE)
        for source in line.split()[:-1]
    ]
    assert "trainer" in sources
    rooms = {path.partition("/")[0] for path in covered}
    assert {source.partition("/")[0] for source in sources} <= rooms


def test_what_runs_on_the_controller_is_not(covered: list[str]) -> None:
    rooms = {path.partition("/")[0] for path in covered}
    assert not rooms & {"report", "playbooks", "roles", "plugins", "docs", "tests"}
