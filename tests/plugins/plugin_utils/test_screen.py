"""Lines for people do not spoil what programs read."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ansible import constants as C
from ansible_collections.mixtral.tpu.plugins.plugin_utils.screen import stdout_is_for_people

from tests.playbook import ROOT, write_play
from tests.plugins.runs import write_run


@pytest.mark.parametrize("callback", ["ansible.posix.json", "json", "ansible.posix.jsonl"])
def test_a_callback_that_prints_json_has_stdout_to_itself(tmp_path: Path, callback: str) -> None:
    tasks = [
        {"mixtral.tpu.run_with_progress": {"cmd": "true", "would": "work hard"}},
        {"ansible.builtin.set_stats": {"data": {"train_run_dir": str(write_run(tmp_path))}}},
        {"ansible.builtin.fail": {"msg": "no such thing"}},
    ]
    ran = subprocess.run(
        [
            Path(sys.executable).with_name("ansible-playbook"),
            "--inventory=inventory/local",
            "--check",
            write_play(tmp_path, *tasks),
        ],
        cwd=ROOT,
        env=os.environ | {"ANSIBLE_STDOUT_CALLBACK": callback},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 2
    documents = ran.stdout.splitlines() if callback.endswith("jsonl") else [ran.stdout]
    assert "no such thing" in str([json.loads(document) for document in documents])
    # People still read these lines.
    assert "[localhost] would work hard" in ran.stderr
    assert "RUN 20260102-030405: failed ***" in ran.stderr


def test_every_other_plugin_leaves_stdout_alone() -> None:
    printing = {
        str(path.relative_to(ROOT / "plugins"))
        for path in ROOT.glob("plugins/*/*.py")
        if re.search(r"\bprint\(|\.display\(|\.banner\(|stdout\.write", path.read_text())
    }
    assert printing == {"plugin_utils/screen.py"}


@pytest.mark.parametrize(
    ("callback", "for_people"),
    [("default", True), ("ansible.posix.debug", True), ("community.general.null", False)],
)
def test_other_callbacks_are_for_people_if_they_derive_from_the_default_one(
    monkeypatch: pytest.MonkeyPatch, callback: str, for_people: bool
) -> None:
    monkeypatch.setattr(C, "DEFAULT_STDOUT_CALLBACK", callback)
    stdout_is_for_people.cache_clear()
    assert stdout_is_for_people() == for_people
    stdout_is_for_people.cache_clear()
