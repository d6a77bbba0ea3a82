"""The login as users make it, against a hub on this machine, on a worker below tmp_path."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.servers.hub import Hub

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
MODEL, DATASET = "org/gated-model", "org/gated-dataset"
IN = ["site.yml", "--tags=login", "-vvv", "--diff"]
OUT = ["reset.yml", "--tags=login", "-e", "confirm=true"]


class Run:
    """What an ansible-playbook has printed, and how it ended."""

    def __init__(self, process: subprocess.CompletedProcess[str]) -> None:
        self.code = process.returncode
        self.screen = process.stdout + process.stderr
        # Without the line ends and the indentation that YAML gives a text
        self.text = " ".join(self.screen.split())

    def changed(self) -> bool:
        return "changed=0" not in self.screen.partition("PLAY RECAP")[2]


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        hub.add(MODEL, {}, gated=True)
        hub.add(DATASET, {}, gated=True, kind="dataset")
        yield hub


@pytest.fixture
def good(hub: Hub) -> str:
    return hub.token("ada", reads=[MODEL, DATASET])


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """Where the worker keeps the token."""
    return tmp_path / "worker/hf/token"


@pytest.fixture
def play(hub: Hub, tmp_path: Path) -> Callable[..., Run]:
    """Return what runs a playbook with its secrets in a file, as users should."""

    def run(
        *words: str, workers: str = "w0,", environment: dict[str, str] | None = None, **secrets: Any
    ) -> Run:
        hosts = {name: None for name in workers.split(",") if name}
        (tmp_path / "hosts.yml").write_text(
            json.dumps(
                {
                    "tpu_workers": {
                        "hosts": hosts,
                        "vars": {
                            "ansible_connection": "local",
                            "ansible_python_interpreter": sys.executable,
                            "worker_dir": str(tmp_path / "worker"),
                            "tokenizer_name": MODEL,
                            "dataset_name": DATASET,
                        },
                    }
                }
            )
        )
        variables = tmp_path / "variables.yml"
        variables.write_text(json.dumps(secrets))
        here = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        here |= {"HOME": str(tmp_path), "TMPDIR": str(tmp_path), "ANSIBLE_NOCOLOR": "1"}
        here |= {"ANSIBLE_REMOTE_TEMP": str(tmp_path / "remote")}
        here |= {"HF_ENDPOINT": hub.endpoint, "NO_PROXY": "127.0.0.1"} | (environment or {})
        command = [BIN / "ansible-playbook", "-i", tmp_path / "hosts.yml", "-e", f"@{variables}"]
        return Run(
            subprocess.run(
                [*command, *(words or IN)],
                cwd=ROOT, env=here, capture_output=True, text=True, timeout=60, check=False,
            )
        )  # fmt: skip

    return run


@contextlib.contextmanager
def watch(word: str) -> Iterator[set[str]]:
    """Yield the processes that show ``word``, in their arguments or their environment."""
    seen: set[str] = set()
    over = threading.Event()

    def look() -> None:
        while not over.is_set():
            for process in filter(str.isdigit, os.listdir("/proc")):
                for name in ("cmdline", "environ"):
                    # Some have gone by now.
                    with contextlib.suppress(OSError):
                        if word.encode() in Path("/proc", process, name).read_bytes():
                            seen.add(name)
            time.sleep(0.03)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield seen
    finally:
        over.set()
        watcher.join()


def holders(word: str, directory: Path) -> set[Path]:
    """The files below a directory that hold ``word``."""
    files = (path for path in directory.rglob("*") if path.is_file() and not path.is_symlink())
    return {path for path in files if word.encode() in path.read_bytes()}


def mode(path: Path) -> str:
    return f"{path.stat().st_mode & 0o777:o}"


def test_check_mode_asks_once_for_all_workers_and_stores_nothing(play, hub, good, stored):
    run = play(*IN, "--check", workers="w0,w1", hf_token=good)
    assert run.code == 0, run.screen
    assert run.changed()
    assert good not in run.screen
    assert not stored.parents[1].exists()
    assert hub.asked("whoami") == 1
    assert hub.asked("auth-check") == 2


def test_a_good_token_is_stored_once_and_shown_nowhere(play, hub, good, stored, tmp_path):
    file = tmp_path / "secret"
    file.write_text(f"{good}\n")
    with watch(good) as seen:
        first, second = play(hf_token_file=str(file)), play(hf_token=good)
    assert (first.code, second.code) == (0, 0), first.screen + second.screen
    assert stored.read_text() == good
    assert (mode(stored), mode(stored.parent)) == ("600", "700")
    assert first.changed()
    assert not second.changed()
    assert good not in first.screen + second.screen
    assert not seen
    assert holders(good, tmp_path) == {stored, file, tmp_path / "variables.yml"}

    # A bad one does not take its place, another good one does, and a log-out leaves neither.
    assert play(hf_token="hf_of-nobody").code == 2
    assert stored.read_text() == good
    other = hub.token("grace", reads=[MODEL, DATASET])
    assert play(environment={"HF_TOKEN": other}).changed()
    assert stored.read_text() == other
    (stored.parents[1] / "runs").mkdir()
    assert play(*OUT).changed()
    assert [path.name for path in stored.parents[1].iterdir()] == ["runs"]
    assert not play(*OUT).changed()


@pytest.mark.parametrize(
    ("owner", "words"),
    [
        ({"expired": True}, ["is expired", "/settings/tokens"]),
        ({"reads": [DATASET]}, [f"is unauthorised for the gated model {MODEL}", f"/{MODEL}"]),
        (
            {"reads": [MODEL]},
            [f"is unauthorised for the gated dataset {DATASET}", f"/datasets/{DATASET}"],
        ),
        (None, ["is wrong", "/settings/tokens"]),
    ],
)
def test_a_bad_token_is_stored_nowhere(play, hub, stored, owner, words):
    token = hub.token(**owner) if owner else "hf_of-nobody"
    run = play(hf_token=token)
    assert run.code == 2
    for word in words:
        assert word in run.text
    assert "The token was not sent to any worker" in run.text
    assert token not in run.screen
    assert not stored.exists()


def test_a_hub_that_is_not_there_is_named(play, good, stored):
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
    run = play(hf_token=good, environment={"HF_ENDPOINT": endpoint})
    assert run.code == 2
    assert f"hub at {endpoint} is unreachable" in run.text
    assert good not in run.screen
    assert not stored.exists()


def test_what_can_be_no_token_is_refused(play, hub, stored):
    run = play(hf_token="hf_two words")
    assert run.code == 2
    assert "The Hugging Face token in the variable hf_token has white space in it" in run.text
    assert "two words" not in run.screen
    assert not hub.requests
    assert not stored.exists()


def test_a_token_on_the_command_line_is_refused(play, hub, good, stored):
    with watch(good) as seen:
        run = play(*IN, "-e", f"hf_token={good}")
    assert seen == {"cmdline"}
    assert run.code == 2
    assert "is on the command line, where every user of this machine can read it" in run.text
    assert good not in run.screen
    assert not hub.requests
    assert not stored.exists()


def test_without_a_token_nothing_is_asked_and_nothing_changes(play, hub, stored):
    run = play()
    assert run.code == 0, run.screen
    assert not run.changed()
    assert not hub.requests
    assert not stored.parents[1].exists()
