"""An archive on its way into an engine that is a script, through a real playbook."""

import os
import subprocess
from pathlib import Path

import pytest
from ansible_collections.mixtral.tpu.plugins.action import stream_image

from tests.playbook import Playbook, run_playbook, write_inventory, write_play

MIB = 1 << 20


def script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def load(tmp_path):
    """Load an archive of three MiB with a docker that does this; return the finished playbook."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "archive").write_bytes(bytes(range(256)) * (3 * MIB // 256))

    def run(docker: str, *options: str, **variables: object) -> Playbook:
        script(tmp_path / "bin/docker", docker)
        task = {"name": "Load", "mixtral.tpu.stream_image": {"archive": str(tmp_path / "archive")}}
        return run_playbook(
            write_play(tmp_path, task),
            *options,
            inventory=write_inventory(tmp_path, {"here": variables}),
            environment={"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"},
        )

    return run


def test_every_byte_arrives(load, tmp_path):
    ran = load(f'echo "$@" > {tmp_path}/arguments; cat > {tmp_path}/arrived')
    assert ran.code == 0
    assert "changed=1" in ran.screen
    assert (tmp_path / "arguments").read_text() == "load --quiet\n"
    assert (tmp_path / "arrived").read_bytes() == (tmp_path / "archive").read_bytes()


def test_a_failure_is_told_in_docker_s_words(load):
    ran = load("dd bs=1M count=1 > /dev/null 2>&1; echo 'no space left on device' >&2; exit 1")
    assert ran.code == 2
    assert "was not loaded: no space left on device. 1 of 3 MiB were sent" in ran.screen


def test_it_takes_ansible_s_own_connection_and_sudo(load, tmp_path):
    # The last argument is the command for the worker, and there sudo is.
    script(tmp_path / "ssh", f'echo "$@" >> {tmp_path}/ways; for it; do :; done; exec sh -c "$it"')
    script(
        tmp_path / "sudo",
        f'touch {tmp_path}/became; until [ "$1" = -u ]; do shift; done; "$3" "$4" "$5"',
    )
    ran = load(
        f"cat > {tmp_path}/arrived",
        ansible_connection="ssh",
        ansible_ssh_executable=str(tmp_path / "ssh"),
        ansible_host="192.0.2.7",
        ansible_port=2222,
        ansible_user="tpu",
        ansible_ssh_common_args="-o ProxyCommand=hop",
        ansible_become=True,
        ansible_become_exe=str(tmp_path / "sudo"),
    )
    assert ran.code == 0
    way = (tmp_path / "ways").read_text().splitlines()[-1]
    for part in ("Port=2222", 'User="tpu"', "ProxyCommand=hop", "ControlPersist", " 192.0.2.7 "):
        assert part in way
    assert (tmp_path / "became").exists()
    assert (tmp_path / "arrived").read_bytes() == (tmp_path / "archive").read_bytes()


def test_where_sudo_wants_a_password_it_says_what_to_do(load):
    ran = load(
        "exit 0",
        ansible_connection="ssh",
        ansible_ssh_executable="true",
        ansible_user="tpu",
        ansible_become=True,
        ansible_become_password="secret",
    )
    assert ran.code == 2
    assert "sudo asks for a password on this worker" in ran.screen
    assert "secret" not in ran.screen


def test_check_mode_loads_nothing(load, tmp_path):
    ran = load(f"touch {tmp_path}/seen", "--check")
    assert ran.code == 0
    assert not (tmp_path / "seen").exists()


def test_progress_is_shown_in_mib(monkeypatch, tmp_path):
    lines = []
    monkeypatch.setattr(stream_image, "SHOW_SECONDS", 0.2)
    monkeypatch.setattr(stream_image, "show", lines.append)
    (tmp_path / "archive").write_bytes(bytes(3 * MIB))
    with (tmp_path / "archive").open("rb") as archive:
        process = subprocess.Popen(
            ["sh", "-c", "dd bs=1M count=2 > /dev/null; sleep 0.5"], stdin=archive
        )
        action = stream_image.ActionModule.__new__(stream_image.ActionModule)
        assert action._follow(process, archive, "w0") == (2 * MIB, 3 * MIB)
    assert lines[0] == "  [w0] 0:00  2 of 3 MiB"


def test_once_all_is_sent_the_engine_is_said_to_work():
    assert stream_image.progress(125, 5 * MIB, 5 * MIB).startswith("2:05  all 5 MiB sent")
