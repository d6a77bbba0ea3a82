"""Which nightly the workers get, on workers below tmp_path, from an index on this machine."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.playbook import Playbook, run_playbook, write_inventory, write_play
from tests.servers.faults import ALWAYS, Fault
from tests.servers.index import Index, wheel

OLD, NEW = "20250928", "20250929"
# Every worker has a directory of its own here. One that --limit leaves out is an item of a loop.
DIRECTORY = "{{ directory }}/{{ item | default(inventory_hostname) }}"
TELL = {"ansible.builtin.debug": {"msg": "the day is {{ nightly__date | default('forgotten') }}"}}


@pytest.fixture
def index() -> Iterator[Index]:
    with Index() as index:
        for day in (OLD, NEW):
            tag = "cp311-cp311-linux_x86_64"
            index.put("nightly", wheel("torch", f"2.9.0.dev{day}+cpu", tag))
            index.put("tpuvm", wheel("torch_xla", f"2.9.0.dev{day}", tag))
        yield index


@pytest.fixture
def play(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Playbook]:
    """Return what runs the role's tasks on the workers w0 and w1."""
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    wheels = "torch_xla-{version}.dev{date}-{python}-{python}-linux_x86_64.whl"
    sources = {
        "TORCH_INDEX": f"http://ada:secret@{index.host}/nightly",
        "TORCH_XLA_WHEEL": f"http://ada:secret@{index.host}/tpuvm/{wheels}",
    }
    workers = {"w0": {}, "w1": {}}
    inventory = write_inventory(
        tmp_path,
        workers,
        directory=str(tmp_path),
        nightly_workers=list(workers),
        nightly_sources=sources,
    )

    def run(parts: str, *words: str, **variables: str) -> Playbook:
        tasks = []
        for part in parts.split():
            role = {"name": "mixtral.tpu.nightly", "tasks_from": part}
            day = {"nightly_worker_dir": DIRECTORY}
            tasks += [{"ansible.builtin.include_role": role, "vars": day}, TELL]
        ran = run_playbook(
            write_play(tmp_path, *tasks),
            *words,
            inventory=inventory,
            environment={
                "ANSIBLE_REMOTE_TEMP": str(tmp_path / "remote"),
                "NO_PROXY": "127.0.0.1",
                "PIP_CONFIG_FILE": os.devnull,
                "PIP_RETRIES": "0",
            },
            **variables,
        )
        assert "secret" not in ran.screen
        return ran

    return run


def agrees(ran: Playbook, day: str, parts: int = 1) -> bool:
    """Return whether a play has ended well, and each of its parts with this day on both workers."""
    return ran.code == 0 and ran.screen.count(f"the day is {day}") == 2 * parts


def write_days(directory: Path, **days: str) -> None:
    """Write down which day a worker has."""
    for worker, day in days.items():
        (directory / worker).mkdir()
        (directory / worker / "nightly_date").write_text(f"{day}\n")


def days(tmp_path: Path) -> list[str]:
    return [file.read_text().strip() for file in sorted(tmp_path.glob("w*/nightly_date"))]


def test_the_newest_is_asked_for_once_and_kept_from_then_on(play, index, tmp_path):
    index.login = "ada:secret"
    ran = play("main record", "--check", "-vvv")
    assert agrees(ran, NEW, parts=2)
    assert not days(tmp_path)
    assert agrees(play("main record"), NEW, parts=2)
    assert days(tmp_path) == [NEW, NEW]
    assert index.asked("GET /nightly/torch/") == 2

    # From now on the slice itself says it, whatever is new.
    index.faults.append(Fault("/", times=ALWAYS))
    again = play("read main record")
    assert agrees(again, NEW, parts=3)
    assert not again.changed


def test_a_worker_that_was_made_anew_gets_what_the_others_have(play, index, tmp_path):
    write_days(tmp_path, w0=OLD)
    ran = play("main record", "--limit", "w1")
    assert ran.code == 0
    assert days(tmp_path) == [OLD, OLD]
    assert not index.requests


def test_a_day_that_is_asked_for_is_taken_and_asks_nobody(play, index, tmp_path):
    assert agrees(play("main", nightly_requested_date=NEW), NEW)
    write_days(tmp_path, w0=NEW, w1=NEW)
    assert agrees(play("main record", nightly_requested_date=OLD), OLD, parts=2)
    assert days(tmp_path) == [OLD, OLD]
    assert not index.requests
    refused = play("main", nightly_requested_date="2025-09-28")
    assert "2025-09-28 is no day of a nightly" in refused.screen


def test_workers_with_different_days_are_refused(play, tmp_path):
    write_days(tmp_path, w0=OLD, w1=NEW)
    ran = play("read")
    assert ran.code == 2
    assert f"different nightlies: {OLD}, {NEW}" in ran.screen


def test_a_run_on_workers_that_know_none_is_sent_to_site(play, index):
    ran = play("read")
    assert ran.code == 2
    assert "ansible-playbook site.yml -e stack=nightly comes first" in ran.words
    assert not index.requests


def test_an_index_that_is_down_ends_it_and_its_login_is_not_shown(play, index, tmp_path):
    index.faults.append(Fault("/", times=ALWAYS))
    ran = play("main")
    assert ran.code == 2
    assert f"http://***@{index.host}/nightly lists no nightly torch" in ran.words
    assert not days(tmp_path)


def test_a_reset_forgets_the_day(play, tmp_path):
    write_days(tmp_path, w0=OLD, w1=OLD)
    assert agrees(play("reset"), "forgotten")
    assert not days(tmp_path)
