"""The module that looks at a worker, run as Ansible runs it, against an engine that speaks HTTP."""

import base64
import datetime
import json
import os
import socketserver
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from ansible_collections.mixtral.tpu.plugins.modules.trainer_state import ended_with_engine

MODULE = Path(__file__).parents[3] / "plugins/modules/trainer_state.py"
STATE = {
    "Status": "running",
    "Running": True,
    "ExitCode": 0,
    "OOMKilled": False,
    "Error": "",
    "StartedAt": "2026-01-02T03:04:05Z",
    "FinishedAt": "0001-01-01T00:00:00Z",
}


class Server(socketserver.ThreadingUnixStreamServer):
    answers: dict[str, bytes]


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        body = self.server.answers.get(self.path.partition("?")[0])
        self.send_response(404 if body is None else 200)
        self.send_header("Content-Length", str(len(body or b"")))
        self.end_headers()
        self.wfile.write(body or b"")

    def address_string(self):
        return "socket"

    def log_message(self, *_):
        pass


@pytest.fixture
def engine(tmp_path):
    with Server(str(tmp_path / "docker.sock"), Handler) as server:
        server.answers = {}
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def look(tmp_path):
    def run(**arguments):
        arguments = {
            "container": "mixtral-trainer",
            "socket": str(tmp_path / "docker.sock"),
            "runs_dir": str(tmp_path),
        } | arguments
        result = subprocess.run(
            [sys.executable, MODULE],
            input=json.dumps({"ANSIBLE_MODULE_ARGS": arguments}),
            capture_output=True,
            text=True,
            check=False,
        )
        return json.loads(result.stdout)

    return run


def container(**state):
    config = {
        "Labels": {"run_id": "run-1", "started_by": "me@here", "detached": "false"},
        "Cmd": ["python", "-m", "trainer", "--gmm"],
        "Env": ["PJRT_DEVICE=CPU", "XLA_FLAGS=--a=b"],
    }
    return json.dumps({"State": STATE | state, "Config": config}).encode()


def test_a_missing_engine_is_told(look):
    answer = look()
    assert (answer["engine"], answer["state"]) == (False, None)


def test_without_a_container_there_is_no_state(look, engine):
    answer = look()
    assert (answer["engine"], answer["state"]) == (True, None)


def test_the_state_is_the_engine_s(look, engine):
    engine.answers["/containers/mixtral-trainer/json"] = container(ExitCode=7, Running=False)
    state = look()["state"]
    assert (state["run_id"], state["exit_code"], state["running"]) == ("run-1", 7, False)
    assert state["command"] == ["python", "-m", "trainer", "--gmm"]
    assert state["environment"] == {"PJRT_DEVICE": "CPU", "XLA_FLAGS": "--a=b"}
    assert state["detached"] is False


def test_files_are_read_from_the_offset_on_and_no_further_than_the_limit(look, engine, tmp_path):
    engine.answers["/containers/mixtral-trainer/json"] = container()
    (tmp_path / "run-1").mkdir()
    (tmp_path / "run-1/trainer.log").write_bytes(b"0123456789")
    answer = look(appended={"trainer.log": 4, "metrics.jsonl": 0}, max_bytes=3)
    inode = (tmp_path / "run-1/trainer.log").stat().st_ino
    assert answer["files"] == {
        "trainer.log": {"data": base64.b64encode(b"456").decode(), "offset": 7, "inode": inode}
    }
    # What was replaced since is read from its beginning.
    for known, said in ((inode, b"456"), (inode + 1, b"012")):
        again = look(appended={"trainer.log": 4}, inodes={"trainer.log": known}, max_bytes=3)
        assert base64.b64decode(again["files"]["trainer.log"]["data"]) == said


def test_a_checkpoint_counts_when_it_is_complete(look, engine, tmp_path):
    assert (look()["exists"], look()["checkpoint"]) == (False, None)
    engine.answers["/containers/mixtral-trainer/json"] = container()
    (tmp_path / "run-1").mkdir()
    assert (look()["exists"], look()["checkpoint"]) == (True, None)
    for name in ("checkpoint-8", "checkpoint-12", ".checkpoint-16", "checkpoint-x"):
        (tmp_path / "run-1" / name).mkdir()
    assert look()["checkpoint"] == 12
    assert look(run_id="mine")["exists"] is False


def test_a_negative_offset_counts_from_the_end(look, engine, tmp_path):
    engine.answers["/containers/mixtral-trainer/json"] = container()
    (tmp_path / "run-1").mkdir()
    (tmp_path / "run-1/trainer.log").write_bytes(b"0123456789")
    for offset, expected in ((-3, b"789"), (-100, b"0123456789")):
        data = look(appended={"trainer.log": offset})["files"]["trainer.log"]["data"]
        assert base64.b64decode(data) == expected


def test_the_lease_is_renewed_only_when_asked(look, engine, tmp_path):
    engine.answers["/containers/mixtral-trainer/json"] = container()
    (tmp_path / "run-1").mkdir()
    lease = tmp_path / "run-1/lease"
    lease.touch()
    os.utime(lease, (1000, 1000))
    look()
    assert lease.stat().st_mtime == 1000
    look(renew_lease=True)
    assert lease.stat().st_mtime > 1000


def test_a_detached_run_has_no_lease_to_renew(look, engine, tmp_path):
    engine.answers["/containers/mixtral-trainer/json"] = container()
    (tmp_path / "run-1").mkdir()
    look(renew_lease=True)
    assert not (tmp_path / "run-1/lease").exists()


def test_it_tells_whether_somebody_has_brought_the_run_home(look, engine, tmp_path):
    engine.answers["/containers/mixtral-trainer/json"] = container()
    (tmp_path / "run-1").mkdir()
    assert look()["collected"] is False
    (tmp_path / "run-1/collected").touch()
    assert look()["collected"] is True


@pytest.mark.parametrize(
    ("started", "finished", "with_engine"),
    [
        # The engine's present life began at 12:00:00.
        ("11:00:00", "11:59:50", True),
        ("11:00:00", "12:00:05", True),
        ("11:00:00", "11:30:00", False),
        ("12:00:10", "12:00:20", False),
    ],
)
def test_an_end_with_the_engine_is_told_from_its_own(tmp_path, started, finished, with_engine):
    pid_file = tmp_path / "docker.pid"
    pid_file.touch()
    noon = datetime.datetime(2026, 1, 2, 12, tzinfo=datetime.UTC).timestamp()
    os.utime(pid_file, (noon, noon))
    state = STATE | {
        "Running": False,
        "StartedAt": f"2026-01-02T{started}.123456789Z",
        "FinishedAt": f"2026-01-02T{finished}.123456789Z",
    }
    assert ended_with_engine(state, str(pid_file)) is with_engine


def test_output_is_what_the_engine_kept_of_a_trainer_that_has_ended(look, engine):
    engine.answers["/containers/mixtral-trainer/json"] = container(Running=False)
    # The engine's framing: stream, three zeros, length, text.
    engine.answers["/containers/mixtral-trainer/logs"] = (
        b"\x01\0\0\0\0\0\0\x06hello\n\x02\0\0\0\0\0\0\x04bye\n"
    )
    assert look()["output"] == "hello\nbye\n"


PROCESS = {
    "run_id": "run-2",
    "started_by": "me@here",
    "detached": False,
    "command": ["venv/bin/python", "-m", "trainer", "--gmm"],
    "environment": {"PJRT_DEVICE": "CPU"},
}


@pytest.fixture
def process(tmp_path):
    """Write down what is known of a trainer without a container."""

    def known(**state):
        directory = tmp_path / "run"
        directory.mkdir(exist_ok=True)
        (directory / "process.json").write_text(json.dumps(PROCESS))
        if state:
            (directory / "state.json").write_text(json.dumps(state).ljust(511) + "\n")
        return str(directory)

    return known


@pytest.fixture
def sleeper():
    """A process, and when it began."""
    with subprocess.Popen(["sleep", "60"]) as one:
        fields = Path(f"/proc/{one.pid}/stat").read_text().rpartition(")")[2].split()
        yield {"pid": one.pid, "began": int(fields[19])}
        one.kill()


def test_a_process_that_was_not_started_yet_has_its_command_and_no_start(look, process):
    state = look(process_dir=process())["state"]
    assert (state["run_id"], state["running"], state["started"]) == ("run-2", False, None)
    assert state["command"] == PROCESS["command"]


def test_a_process_that_runs_needs_no_engine(look, process, sleeper):
    answer = look(process_dir=process(started="2026-01-02T03:04:05Z", **sleeper))
    assert answer["engine"] is False
    assert (answer["state"]["runtime"], answer["state"]["running"]) == ("native", True)


def test_a_process_that_has_ended_has_its_exit_code(look, process, sleeper):
    known = {"started": "2026-01-02T03:04:05Z", "finished": "2026-01-02T03:05:05Z"}
    state = look(process_dir=process(**known, **sleeper, exit_code=7, oom_killed=False))["state"]
    assert (state["running"], state["exit_code"], state["error"]) == (False, 7, "")


def test_a_process_whose_id_is_another_s_by_now_counts_as_killed(look, process, sleeper):
    known = {"started": "2026-01-02T03:04:05Z", "pid": sleeper["pid"]}
    state = look(process_dir=process(began=sleeper["began"] - 1, **known))["state"]
    assert (state["running"], state["exit_code"]) == (False, 137)
    assert state["error"] == "the trainer's supervisor was killed, or the worker was restarted"


def test_what_runs_comes_before_what_was_started_later(look, engine, process, sleeper):
    engine.answers["/containers/mixtral-trainer/json"] = container(
        Running=False, StartedAt="2026-01-03T00:00:00Z"
    )
    running = process(started="2026-01-02T03:04:05Z", **sleeper)
    assert look(process_dir=running)["state"]["run_id"] == "run-2"


def test_of_what_has_ended_the_later_one_counts(look, engine, process):
    engine.answers["/containers/mixtral-trainer/json"] = container(Running=False)
    for day, expected in ((1, "run-1"), (3, "run-2")):
        known = {"pid": 1, "began": 0, "exit_code": 0, "oom_killed": False}
        directory = process(started=f"2026-01-0{day}T00:00:00Z", **known)
        assert look(process_dir=directory)["state"]["run_id"] == expected
