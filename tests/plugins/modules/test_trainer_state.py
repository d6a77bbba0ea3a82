"""The module that looks at a worker, run as Ansible runs it, against an engine that speaks HTTP."""

import base64
import json
import os
import socketserver
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

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
    labels = {"run_id": "run-1", "started_by": "me@here"}
    return json.dumps({"State": STATE | state, "Config": {"Labels": labels}}).encode()


def test_without_an_engine_it_says_so(look):
    answer = look()
    assert (answer["engine"], answer["state"]) == (False, None)


def test_without_a_container_there_is_no_state(look, engine):
    answer = look()
    assert (answer["engine"], answer["state"]) == (True, None)


def test_the_state_is_the_engine_s(look, engine):
    engine.answers["/containers/mixtral-trainer/json"] = container(ExitCode=7, Running=False)
    state = look()["state"]
    assert (state["run_id"], state["exit_code"], state["running"]) == ("run-1", 7, False)


def test_files_are_read_from_the_offset_on_and_no_further_than_the_limit(look, engine, tmp_path):
    engine.answers["/containers/mixtral-trainer/json"] = container()
    (tmp_path / "run-1").mkdir()
    (tmp_path / "run-1/trainer.log").write_bytes(b"0123456789")
    answer = look(appended={"trainer.log": 4, "metrics.jsonl": 0}, max_bytes=3)
    assert answer["files"] == {
        "trainer.log": {"data": base64.b64encode(b"456").decode(), "offset": 7}
    }


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


@pytest.mark.parametrize("log", [None, b""])
def test_output_is_the_engine_s_where_the_trainer_left_no_log(look, engine, tmp_path, log):
    if log is not None:
        (tmp_path / "run-1").mkdir()
        (tmp_path / "run-1/trainer.log").write_bytes(log)
    engine.answers["/containers/mixtral-trainer/json"] = container(Running=False)
    # The engine's framing: stream, three zeros, length, text.
    engine.answers["/containers/mixtral-trainer/logs"] = (
        b"\x01\0\0\0\0\0\0\x06hello\n\x02\0\0\0\0\0\0\x04bye\n"
    )
    assert look()["output"] == "hello\nbye\n"
