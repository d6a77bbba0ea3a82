"""make once with playbooks that are scripts: whatever happens, the slice is deleted."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Notes what it was asked for, and what is to happen there is a file of that name: a shell script.
PLAYBOOK = """#!/bin/bash
words="${*:3}"
echo "$words" >> calls
name=${words%% *}
case $words in
  *state=present*) touch there; rm -f preempted ;;
  *state=absent*) name=down; rm -f there ;;
esac
if [ -e "$name" ]; then source "./$name"; fi
"""
INVENTORY = """#!/bin/bash
if [ -e preempted ]; then echo "my-tpu is PREEMPTED: left out"; exit 1; fi
if [ -e there ]; then echo @all; else echo "there is no TPU slice my-tpu in z of p"; exit 1; fi
"""
ANSIBLE = """#!/bin/bash
[ -e mounted ]
"""
Start = Callable[..., subprocess.Popen]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Start it in a directory where the commands are these scripts."""
    for name, text in {
        "ansible-playbook": PLAYBOOK, "ansible-inventory": INVENTORY, "ansible": ANSIBLE,
    }.items():  # fmt: skip
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    (tmp_path / "playbooks").mkdir()
    script = tmp_path / "playbooks/train_and_delete.sh"
    script.write_bytes((ROOT / "playbooks/train_and_delete.sh").read_bytes())

    def run(**variables: str) -> subprocess.Popen:
        env = os.environ | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
        env |= {"TPU_NAME": "my-tpu", "ZONE": "z", "PROJECT": "p"} | variables
        return subprocess.Popen(
            ["bash", script], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
            # As in a terminal; what runs in the background of a script ignores Ctrl-C.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip

    return run


def playbooks(tmp_path: Path) -> list[str]:
    return [line.split(" ")[0] for line in commands(tmp_path)]


def commands(tmp_path: Path) -> list[str]:
    path = tmp_path / "calls"
    return path.read_text().splitlines() if path.exists() else []


def test_a_slice_is_made_trained_on_and_deleted(start: Start, tmp_path: Path) -> None:
    once = start(SLICE="-e accelerator_type=v5p-16", TRAIN="-e gmm=true")
    assert once.wait(20) == 0, once.stdout.read()
    assert commands(tmp_path) == [
        "slice.yml -e state=present -e max_hours=24 -e accelerator_type=v5p-16",
        "site.yml -e gmm=true",
        "train.yml -e gmm=true",
        "slice.yml -e state=absent",
    ]


@pytest.mark.parametrize("name", ["slice.yml", "site.yml", "train.yml"])
def test_after_an_error_the_slice_is_gone_and_the_error_is_told(
    start: Start, tmp_path: Path, name: str
) -> None:
    (tmp_path / name).write_text("exit 4")
    assert start().wait(20) == 4
    assert commands(tmp_path)[-1] == "slice.yml -e state=absent"
    assert not (tmp_path / "there").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_after_a_signal_the_slice_is_gone(start: Start, tmp_path: Path, number: int) -> None:
    (tmp_path / "train.yml").write_text("trap 'echo ended >> calls; exit 1' INT; sleep 30 & wait")
    # A second Ctrl-C does not keep it from being deleted.
    (tmp_path / "down").write_text("touch going; sleep 1")
    once = start()
    wait_for(lambda: "train.yml" in playbooks(tmp_path))
    once.send_signal(number)
    wait_for((tmp_path / "going").exists)
    os.killpg(once.pid, signal.SIGINT)
    assert once.wait(20) == 128 + number
    assert commands(tmp_path)[-2:] == ["ended", "slice.yml -e state=absent"]


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_slice_that_cannot_be_deleted_is_said_to_cost_money(start: Start, tmp_path: Path) -> None:
    (tmp_path / "down").write_text("exit 2")
    (tmp_path / "bin/sleep").write_text("#!/bin/bash\n")
    (tmp_path / "bin/sleep").chmod(0o755)
    once = start()
    assert once.wait(20) == 1
    assert "could not be deleted and COSTS MONEY" in once.stdout.read()
    assert playbooks(tmp_path).count("slice.yml") == 4


def test_a_preempted_slice_is_made_anew_and_the_run_goes_on(start: Start, tmp_path: Path) -> None:
    (tmp_path / "mounted").touch()
    (tmp_path / "train.yml").write_text("rm train.yml; touch preempted; exit 2")
    assert start(RESTARTS="2", WORKER_DIR="/mnt/runs", RUN_NAME="r").wait(20) == 0
    parts = ["slice.yml", "site.yml", "train.yml"]
    assert playbooks(tmp_path) == [*parts, *parts, "slice.yml"]
    trained = [line for line in commands(tmp_path) if line.startswith("train.yml")]
    assert trained[0] == trained[1]
    assert "-e run_name=r" in trained[0]
    assert '"worker_dir": "/mnt/runs/{{ inventory_hostname }}"' in trained[0]


def test_what_is_saved_in_a_bucket_needs_no_disk(start: Start, tmp_path: Path) -> None:
    (tmp_path / "train.yml").write_text("rm train.yml; touch preempted; exit 2")
    train = "-e save_strategy=steps -e checkpoint_bucket=gs://my-bucket/runs"
    assert start(RESTARTS="1", TRAIN=train, RUN_NAME="r").wait(20) == 0
    trained = [line for line in commands(tmp_path) if line.startswith("train.yml")]
    assert trained == [f"train.yml {train} -e run_name=r"] * 2


def test_restarts_come_to_an_end_and_are_for_preemption_alone(start: Start, tmp_path: Path) -> None:
    (tmp_path / "mounted").touch()
    (tmp_path / "train.yml").write_text("touch preempted; exit 2")
    assert start(RESTARTS="2", WORKER_DIR="/mnt/runs").wait(20) == 2
    assert playbooks(tmp_path).count("train.yml") == 3
    (tmp_path / "calls").unlink()
    (tmp_path / "preempted").unlink()
    (tmp_path / "train.yml").write_text("exit 2")
    assert start(RESTARTS="2", WORKER_DIR="/mnt/runs").wait(20) == 2
    assert playbooks(tmp_path).count("train.yml") == 1


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"TPU_NAME": ""}, "the slice is not named: export TPU_NAME"),
        ({"RESTARTS": "many"}, "RESTARTS is many and must be a number"),
        ({"RESTARTS": "1"}, "RESTARTS=1 needs a place for checkpoints that outlives the slice"),
    ],
)
def test_missing_or_wrong_settings_are_refused_before_anything_is_made(
    start: Start, tmp_path: Path, variables: dict, words: str
) -> None:
    once = start(**variables)
    assert once.wait(20) == 2
    assert words in once.stdout.read()
    assert not commands(tmp_path)


def test_a_slice_that_exists_already_is_left_alone(start: Start, tmp_path: Path) -> None:
    (tmp_path / "there").touch()
    once = start()
    assert once.wait(20) == 2
    assert "must not be there in the beginning. The inventory says: @all" in once.stdout.read()
    assert not commands(tmp_path)


def test_a_disk_that_dies_with_the_slice_is_refused(start: Start, tmp_path: Path) -> None:
    once = start(RESTARTS="1", WORKER_DIR="/home/me")
    assert once.wait(20) == 2
    assert "/home/me is on the worker's own disk" in once.stdout.read()
    assert playbooks(tmp_path) == ["slice.yml", "slice.yml"]
