"""What a follower writes down and says, without a worker."""

import base64
import json
import os

import pytest
from ansible_collections.mixtral.tpu.plugins.action.follow_run import (
    ActionModule,
    Mirror,
    exit_record,
    exits,
    failed_worker,
    failure_text,
    laggards,
    screen_lines,
    signal_name,
)


def piece(data: bytes, offset: int, inode: int = 1) -> dict[str, object]:
    return {"data": base64.b64encode(data).decode(), "offset": offset, "inode": inode}


def test_the_mirror_is_the_worker_s_file_byte_for_byte(tmp_path):
    # Cut in the middle of a character, as a poll may do.
    whole = "Schritt 1 … ok\n".encode()
    mirror = Mirror(tmp_path)
    assert mirror.take({"trainer.log": piece(whole[:11], 11)})
    assert mirror.take({"trainer.log": piece(whole[11:], len(whole))})
    assert not mirror.take({"trainer.log": piece(b"", len(whole))})
    assert (tmp_path / "trainer.log").read_bytes() == whole
    assert mirror.offsets == {"trainer.log": len(whole), "metrics.jsonl": 0}


def test_a_run_that_is_followed_again_is_still_the_same(tmp_path):
    first, second = Mirror(tmp_path), Mirror(tmp_path)
    first.take({"trainer.log": piece(b"one\ntwo\n", 8)})
    second.take({"trainer.log": piece(b"one\n", 4)})
    first.take({"trainer.log": piece(b"three\n", 14)})
    second.take({"trainer.log": piece(b"two\nthree\n", 14)})
    assert (tmp_path / "trainer.log").read_bytes() == b"one\ntwo\nthree\n"


def test_steps_that_a_resumed_trainer_has_dropped_are_dropped_here(tmp_path):
    mirror = Mirror(tmp_path)
    mirror.take({"metrics.jsonl": piece(b'{"step": 0}\n{"step": 1}\n{"step": 2}\n', 36)})
    assert mirror.take({"metrics.jsonl": piece(b'{"step": 0}\n{"step": 1}\n', 24, inode=2)})
    assert mirror.last_steps() == [{"step": 0}, {"step": 1}]
    assert mirror.offsets["metrics.jsonl"] == 24
    assert mirror.inodes == {"metrics.jsonl": 2}


def test_a_file_that_is_written_anew_is_replaced(tmp_path):
    mirror = Mirror(tmp_path)
    mirror.take({"summary.json": piece(b'{"max_steps": 5, "more": 1}', 27)})
    mirror.take({"summary.json": piece(b'{"max_steps": 7}', 16)})
    assert mirror.max_steps() == 7
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


def test_the_newest_step_is_the_last_whole_line(tmp_path):
    mirror = Mirror(tmp_path)
    assert mirror.last_steps() == []
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}\n{"st')
    assert mirror.last_steps() == [{"step": 0}, {"step": 1}]


def test_a_progress_bar_is_the_line_it_last_showed(tmp_path):
    text = "loading\n\n 10%\r 20%\r 30%\r\nTraceback:\n  boom\n"
    assert screen_lines(text) == ["loading", " 30%", "Traceback:", "  boom"]
    # Over SSH and from a file alike
    (tmp_path / "trainer.log").write_bytes(text.encode())
    assert Mirror(tmp_path).last_lines() == screen_lines(text)


def test_who_lags_is_named_with_how_far():
    assert laggards({"w0": 100, "w1": 97}, tolerance=3) == ""
    assert laggards({"w0": 100, "w1": 96}, tolerance=3) == "w1 is 4 steps behind"
    assert laggards({"w0": 9, "w1": 2, "w2": -1}, tolerance=3) == "w2 is 10 steps behind and 1 more"
    assert laggards({"w0": 1, "w1": 50}, tolerance=3) == ""


@pytest.mark.parametrize(
    ("code", "name"), [(0, None), (1, None), (137, "SIGKILL"), (143, "SIGTERM"), (None, None)]
)
def test_a_signal_is_read_from_the_exit_code(code, name):
    assert signal_name(code) == name


def test_the_exit_is_recorded_from_the_engine_s_state():
    state = {
        "exit_code": 137,
        "oom_killed": True,
        "error": "",
        "started": "2026-01-02T03:04:05Z",
        "finished": "2026-01-02T03:14:05Z",
        "status": "exited",
    }
    assert exit_record(state, "", ["last"]) == {
        "exit_code": 137,
        "signal": "SIGKILL",
        "oom_killed": True,
        "started": "2026-01-02T03:04:05Z",
        "finished": "2026-01-02T03:14:05Z",
        "error": None,
        "last_lines": ["last"],
    }


def test_a_lost_worker_has_no_exit_code():
    record = exit_record(None, "no answer for 5:01", [])
    assert record["exit_code"] is None
    assert record["error"] == "no answer for 5:01"


@pytest.fixture
def workers(tmp_path):
    def ended(worker, code, error=None):
        (tmp_path / worker).mkdir()
        record = {"exit_code": code, "error": error}
        (tmp_path / worker / "exit.json").write_text(json.dumps(record))

    ended.path = tmp_path
    return ended


def test_a_worker_that_failed_ends_the_others(workers):
    workers("w0", 0)
    workers("w2", 1)
    assert failed_worker(exits(workers.path, 0), "w1") == "w2"


def test_a_lost_worker_ends_the_others(workers):
    workers("w0", None, "no answer")
    assert failed_worker(exits(workers.path, 0), "w1") == "w0"


def test_what_an_earlier_follower_has_left_counts_for_nothing(workers):
    workers("w0", None, "no answer")
    path = workers.path / "w0/exit.json"
    os.utime(path, (1000, 1000))
    assert exits(workers.path, 1001) == {}
    assert exits(workers.path, 1000).keys() == {"w0"}


def test_nobody_is_ended_by_success_by_itself_or_by_one_that_was_ended(workers):
    workers("w0", 0)
    workers("w1", 1)
    workers("w2", 143, "stopped, because w1 failed")
    assert failed_worker(exits(workers.path, 0), "w1") is None
    assert failed_worker(exits(workers.path, 0), "w0") == "w1"


def test_a_failure_is_said_with_the_trainer_s_last_words(tmp_path):
    record = exit_record({"exit_code": 1}, "", ["Traceback:", "  RuntimeError: boom"])
    said = failure_text(record, tmp_path / "trainer.log")
    assert "exit code 1" in said
    assert "RuntimeError: boom" in said
    assert str(tmp_path / "trainer.log") in said


RUNNING = {"engine": True, "files": {}, "output": "", "state": {"run_id": "r", "running": True}}
ENDED = RUNNING | {"state": {"run_id": "r", "running": False, "exit_code": 0}}
SILENT = "connection refused"


@pytest.fixture
def follow(workers):
    """Follow a worker that gives these answers, one at each poll; a text is why it gave none."""

    def run(*answers, lease_seconds=60):
        follower = ActionModule.__new__(ActionModule)
        follower.host, follower.workers = "w0", workers.path
        follower.mirror = Mirror(workers.path)
        follower.args = {
            "run_id": "r",
            "lease_seconds": lease_seconds,
            "poll_seconds": 0,
            "since": 0,
            "workers": [],
        }
        follower.stops, follower.renewals, left = 0, [], list(answers)

        def inspect(renew_lease):
            follower.renewals.append(renew_lease)
            answer = left.pop(0)
            return ({}, answer) if isinstance(answer, str) else (answer, "")

        def stop(_state):
            follower.stops += 1

        follower.inspect, follower.stop = inspect, stop
        return follower, follower.follow()

    return run


def test_a_short_silence_is_survived(follow):
    _, (state, error, _) = follow(RUNNING, SILENT, SILENT, RUNNING, ENDED)
    assert (state, error) == (ENDED["state"], "")


def test_a_silence_is_said_while_it_lasts(follow, capsys):
    # A warning would go elsewhere, and in a task wait for its end.
    follow(RUNNING, SILENT, SILENT, RUNNING, ENDED)
    assert capsys.readouterr().out.count("w0: no answer for 0:00: connection refused") == 2


def test_a_silence_longer_than_the_lease_loses_the_worker(follow):
    _, (state, error, _) = follow(RUNNING, SILENT, lease_seconds=-1)
    assert state is None
    assert "connection refused" in error


@pytest.mark.parametrize("state", [None, {"run_id": "another", "running": True}])
def test_a_container_that_is_not_of_this_run_is_gone(follow, state):
    _, (found, error, _) = follow(RUNNING, RUNNING | {"state": state})
    assert (found, error) == (
        None,
        "the trainer's container, or the record of its process, is gone",
    )


def test_a_failure_elsewhere_stops_the_worker_once_and_ends_its_lease(follow, workers):
    workers("w1", 1)
    follower, (state, error, _) = follow(RUNNING, RUNNING, ENDED)
    assert (state, error) == (ENDED["state"], "stopped, because w1 failed")
    assert follower.stops == 1
    assert follower.renewals == [True, False, False]


def test_a_worker_that_has_ended_by_itself_was_not_stopped(follow, workers):
    workers("w1", 1)
    follower, (_, error, _) = follow(ENDED)
    assert (follower.stops, error) == (0, "")


def test_the_log_is_read_to_its_end(follow, workers):
    late = ENDED | {"files": {"trainer.log": piece(b"last words\n", 11)}}
    done = ENDED | {"files": {"trainer.log": piece(b"", 11)}}
    follow(RUNNING, late, done)
    assert (workers.path / "trainer.log").read_text() == "last words\n"
