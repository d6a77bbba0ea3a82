"""Which nightly the workers get, on workers below tmp_path, from an index on this machine."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.servers.index import ALWAYS, Fault, Index, wheel

ROOT = Path(__file__).parents[2]
ANSIBLE = Path(sys.executable).with_name("ansible-playbook")
OLD, NEW = "20250928", "20250929"
# Every worker has a directory of its own here. One that --limit leaves out is an item of a loop.
PLAY = """
- hosts: tpu_workers
  gather_facts: false
  tasks:
    - ansible.builtin.include_role: {name: nightly, tasks_from: "{{ part }}"}
      loop: "{{ entry.split() }}"
      loop_control: {loop_var: part}
      vars: {nightly_worker_dir: "{{ directory }}/{{ item | default(inventory_hostname) }}"}
    - ansible.builtin.debug: {msg: "the day is {{ nightly__date | default('forgotten') }}"}
"""


@pytest.fixture
def index() -> Iterator[Index]:
    with Index() as index:
        for day in (OLD, NEW):
            tag = "cp311-cp311-linux_x86_64"
            index.put("nightly", wheel("torch", f"2.9.0.dev{day}+cpu", tag))
            index.put("tpuvm", wheel("torch_xla", f"2.9.0.dev{day}", tag))
        yield index


@pytest.fixture
def play(index: Index, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return what runs the role's tasks on the workers w0 and w1."""
    (tmp_path / "play.yml").write_text(PLAY)

    def run(entry: str, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        hosts = ["w0", "w1"]
        wheels = "torch_xla-{version}.dev{date}-{python}-{python}-linux_x86_64.whl"
        variables = {
            "ansible_connection": "local",
            "ansible_python_interpreter": sys.executable,
            "directory": str(tmp_path),
            "entry": entry,
            "nightly_workers": hosts,
            "nightly_sources": {
                "TORCH_INDEX": f"http://ada:secret@{index.host}/nightly",
                "TORCH_XLA_WHEEL": f"http://ada:secret@{index.host}/tpuvm/{wheels}",
            },
        } | variables
        groups = {"hosts": dict.fromkeys(hosts), "vars": variables}
        (tmp_path / "hosts.yml").write_text(json.dumps({"tpu_workers": groups}))
        environment = os.environ | {
            "ANSIBLE_NOCOLOR": "1",
            "ANSIBLE_ROLES_PATH": str(ROOT / "roles"),
            "ANSIBLE_REMOTE_TEMP": str(tmp_path / "remote"),
            "NO_PROXY": "127.0.0.1",
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_RETRIES": "0",
        }
        environment.pop("PIP_FIND_LINKS", None)
        ran = subprocess.run(
            [ANSIBLE, "-i", tmp_path / "hosts.yml", tmp_path / "play.yml", *words],
            cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert "secret" not in ran.stdout + ran.stderr
        return ran

    return run


def told(ran: subprocess.CompletedProcess[str], day: str) -> bool:
    """Return whether a play has ended well, and both workers with this day."""
    return ran.returncode == 0 and ran.stdout.count(f"the day is {day}") == 2


def noted(tmp_path: Path) -> list[str]:
    return [file.read_text().strip() for file in sorted(tmp_path.glob("w*/nightly_date"))]


def test_the_newest_is_asked_for_once_and_kept_from_then_on(play, index, tmp_path):
    index.login = "ada:secret"
    ran = play("main record", "--check", "-vvv")
    assert told(ran, NEW), ran.stdout + ran.stderr
    assert not noted(tmp_path)
    assert told(play("main record"), NEW)
    assert noted(tmp_path) == [NEW, NEW]
    assert index.asked("GET /nightly/torch/") == 2

    # From now on the slice itself says it, whatever is new.
    index.faults.append(Fault("/", times=ALWAYS))
    again = play("main record")
    assert told(again, NEW)
    assert "changed=0" in again.stdout
    assert told(play("read"), NEW)


def test_a_worker_that_was_made_anew_gets_what_the_others_have(play, index, tmp_path):
    (tmp_path / "w0").mkdir()
    (tmp_path / "w0/nightly_date").write_text(f"{OLD}\n")
    ran = play("main record", "--limit", "w1")
    assert ran.returncode == 0, ran.stdout
    assert noted(tmp_path) == [OLD, OLD]
    assert not index.requests


def test_a_day_that_is_asked_for_is_taken_and_asks_nobody(play, index, tmp_path):
    assert told(play("main record", nightly_requested_date=NEW), NEW)
    assert told(play("main record", nightly_requested_date=OLD), OLD)
    assert noted(tmp_path) == [OLD, OLD]
    assert not index.requests
    refused = play("main record", nightly_requested_date="2025-09-28")
    assert "2025-09-28 is no day of a nightly" in refused.stdout


def test_workers_with_different_days_are_refused(play, tmp_path):
    for worker, day in {"w0": OLD, "w1": NEW}.items():
        (tmp_path / worker).mkdir()
        (tmp_path / worker / "nightly_date").write_text(f"{day}\n")
    ran = play("read")
    assert ran.returncode == 2
    assert f"different nightlies: {OLD}, {NEW}" in ran.stdout


def test_a_run_on_workers_that_know_none_is_sent_to_site(play, index):
    ran = play("read")
    assert ran.returncode == 2
    assert "ansible-playbook site.yml -e stack=nightly comes first" in " ".join(ran.stdout.split())
    assert not index.requests


def test_an_index_that_is_down_ends_it_and_its_login_is_not_shown(play, index, tmp_path):
    index.faults.append(Fault("/", times=ALWAYS))
    ran = play("main")
    assert ran.returncode == 2
    assert f"http://***@{index.host}/nightly lists no nightly torch" in " ".join(ran.stdout.split())
    assert not noted(tmp_path)


def test_a_reset_forgets_it(play, tmp_path):
    assert told(play("main record", nightly_requested_date=OLD), OLD)
    assert told(play("reset"), "forgotten")
    assert not noted(tmp_path)
