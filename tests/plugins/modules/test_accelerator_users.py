"""The module that looks for open files, against real processes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

MODULE = Path(__file__).parents[3] / "plugins/modules/accelerator_users.py"


@pytest.fixture
def device(tmp_path):
    path = tmp_path / "accel0"
    path.touch()
    return path


def look(*patterns):
    result = subprocess.run(
        [sys.executable, MODULE],
        input=json.dumps({"ANSIBLE_MODULE_ARGS": {"paths": list(map(str, patterns))}}),
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(result.stdout)["users"]


def test_nobody_holds_what_nobody_has_open(device):
    assert look(device.parent / "accel*") == []


def test_a_process_is_found_by_the_file_that_it_holds(device):
    with (
        device.open() as held,
        subprocess.Popen(["/bin/sleep", "60"], stdin=held) as holder,
    ):
        users = look(device.parent / "accel*", device.parent / "vfio/[0-9]*")
        holder.kill()
    path = str(device)
    assert {"pid": holder.pid, "command": "/bin/sleep 60", "path": path} in users
    assert {user["path"] for user in users} == {path}


def test_a_link_to_the_device_is_the_device(device):
    link = device.parent / "link"
    link.symlink_to(device)
    with (
        link.open() as held,
        subprocess.Popen(["/bin/sleep", "60"], stdin=held) as holder,
    ):
        users = look(link)
        holder.kill()
    assert holder.pid in [user["pid"] for user in users]
