"""What does not answer once it was started: the last word is why, and what to do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
ANSIBLE = Path(sys.executable).with_name("ansible-playbook")


@pytest.mark.parametrize(
    ("tasks", "variables", "words"),
    [
        (
            "docker_engine/tasks/install.yml",
            {"docker_engine_log": "{{ log }}", "docker_engine_start_seconds": 1},
            "ansible-playbook site.yml",
        ),
        (
            "tensorboard/tasks/start.yml",
            {"tensorboard__log": "{{ log }}", "tensorboard__address": "http://127.0.0.1:9"},
            "ansible-playbook tensorboard.yml",
        ),
    ],
)
def test_the_log_has_the_last_word(tmp_path, tasks, variables, words) -> None:
    (tmp_path / "log").write_text("the disk is full\n")
    # What has to be installed and started before is left out.
    all_tasks = yaml.safe_load((ROOT / "roles" / tasks).read_text())
    first = next(i for i, task in enumerate(all_tasks) if task["name"].startswith("Wait"))
    waiting = [{**task, "become": False} for task in all_tasks[first:]]
    waiting[0] |= {"retries": 1, "delay": 0}
    play = {"hosts": "localhost", "gather_facts": False, "tasks": waiting, "vars": variables}
    (tmp_path / "play.yml").write_text(yaml.safe_dump([play]))
    ran = subprocess.run(
        [ANSIBLE, tmp_path / "play.yml", "-e", f"log={tmp_path}/log"],
        cwd=ROOT,
        env=os.environ | {"ANSIBLE_NOCOLOR": "1", "DOCKER_HOST": f"unix://{tmp_path}/none"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.returncode == 2
    table = ran.stdout.partition("PLAY RECAP")[2]
    assert "the disk is full" in table
    assert words in table
