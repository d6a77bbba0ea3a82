"""A long command through a real playbook on this machine."""

import os
import subprocess

import pytest
from ansible_collections.mixtral.tpu.plugins.action import run_with_progress

from tests.playbook import Playbook, run_playbook, write_inventory, write_play


@pytest.fixture
def play(tmp_path):
    """Run one task with ``run_with_progress``."""

    def run(*options: str, **arguments: object) -> Playbook:
        task = {
            "name": "Work",
            "mixtral.tpu.run_with_progress": {"would": "work hard", **arguments},
        }
        task["environment"] = {"COLOUR": "deep blue"}
        return run_playbook(
            write_play(tmp_path, task),
            *options,
            inventory=write_inventory(tmp_path, {"here": {}}),
            environment={"ANSIBLE_REMOTE_TMP": str(tmp_path / "remote directory")},
        )

    return run


def test_files_private_files_and_environment_arrive_and_go(play, tmp_path):
    (tmp_path / "tree/deep").mkdir(parents=True)
    (tmp_path / "tree/deep/run.sh").write_text("#!/bin/sh\necho ran\n")
    (tmp_path / "tree/deep/run.sh").chmod(0o700)
    (tmp_path / "tree/not-sent").touch()
    ran = play(
        root=str(tmp_path / "tree"),
        files=["deep/run.sh"],
        private={"password": "open sesame"},
        cmd=f"(files/deep/run.sh; ls files; cat private/password; echo; echo $COLOUR;"
        f" stat -c %a .) > {tmp_path}/seen",
    )
    assert ran.code == 0
    assert "changed=1" in ran.screen
    assert (tmp_path / "seen").read_text() == "ran\ndeep\nopen sesame\ndeep blue\n700\n"
    assert list((tmp_path / "remote directory").iterdir()) == []
    assert "sesame" not in ran.screen


def test_a_failure_shows_the_last_lines(play, tmp_path):
    ran = play(cmd="seq 100; echo 'no space left' >&2; exit 7")
    assert ran.code == 2
    assert "exit code 7" in ran.screen
    assert "no space left" in ran.screen
    assert "\n        90" in ran.screen
    assert "\n        70" not in ran.screen
    assert list((tmp_path / "remote directory").iterdir()) == []


def test_a_killed_command_is_not_waited_for(play):
    # The shell that runs the command is the parent's child: both die, as when memory runs out.
    ran = play(cmd="echo going; kill -9 $PPID $$")
    assert ran.code == 2
    assert "ended without an exit code" in ran.screen
    assert "going" in ran.screen


def test_progress_is_the_log_s_last_line(monkeypatch, tmp_path):
    def shell_out(directory: str, command: str) -> str:
        return subprocess.check_output(["sh", "-c", command], cwd=directory, text=True)

    lines = []
    monkeypatch.setattr(run_with_progress, "SHOW_SECONDS", 0.1)
    monkeypatch.setattr(run_with_progress, "show", lines.append)
    action = run_with_progress.ActionModule.__new__(run_with_progress.ActionModule)
    monkeypatch.setattr(action, "_shell_out", shell_out)
    (tmp_path / "pid").write_text(str(os.getpid()))
    (tmp_path / "log").write_text("starting\ndownloading\n")
    with subprocess.Popen(["sh", "-c", "sleep 0.5; echo 0 > exit"], cwd=tmp_path):
        assert action._follow(str(tmp_path), "here") == 0
    assert lines[0] == "  [here] 0:00  downloading"


def test_check_mode_says_what_it_would_do(play, tmp_path):
    ran = play("--check", cmd=f"touch {tmp_path}/seen")
    assert "[here] would work hard" in ran.screen
    assert "changed=1" in ran.screen
    assert not (tmp_path / "seen").exists()
