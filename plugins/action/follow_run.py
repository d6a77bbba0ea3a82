"""Follow one worker's run to its end.

At every poll, one call of the module trainer_state renews the run's lease, mirrors what the
worker's log and metrics gained into the run's directory on the controller, and tells whether the
trainer still runs. What a killed controller leaves behind is therefore complete up to the last
poll, and the lease ends the run that nobody follows any more.

Each worker has a follower, a process of its own. What one has to tell the others is in the run's
directory: metrics.jsonl says how far its worker is, exit.json that and how its worker has ended.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from ansible import constants as C
from ansible.errors import AnsibleConnectionFailure
from ansible.plugins.action import ActionBase
from ansible.plugins.loader import filter_loader
from ansible.utils.display import Display

APPENDED = ("trainer.log", "metrics.jsonl")
REWRITTEN = ("summary.json",)
LAST_LINES = 20
STOPPED = "stopped, because"
QUIET_SECONDS = 15
# What status.yml says, too
clock = filter_loader.get("clock").j2_function
last_steps = filter_loader.get("last_steps").j2_function
progress = filter_loader.get("progress").j2_function

display = Display()


class Mirror:
    """The copy of a worker's files in ``directory``, byte for byte.

    Every byte has its place, so it does no harm when a run is followed again, or twice. A file that
    the worker has replaced, as a resumed trainer does with its metrics, is replaced here.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.offsets = dict.fromkeys(APPENDED, 0)
        self.inodes: dict[str, int] = {}

    def take(self, files: dict[str, dict[str, Any]]) -> bool:
        """Write down what trainer_state returned as ``files``; tell whether a file has grown."""
        grown = False
        for name, piece in files.items():
            data = base64.b64decode(piece["data"])
            if name in self.offsets:
                path = self.directory / name
                path.touch()
                with path.open("r+b") as file:
                    if self.inodes.setdefault(name, piece["inode"]) != piece["inode"]:
                        file.truncate(0)
                    file.seek(piece["offset"] - len(data))
                    file.write(data)
                grown |= bool(data)
                self.offsets[name], self.inodes[name] = piece["offset"], piece["inode"]
            else:
                replace(self.directory / name, data)
        return grown

    def last_lines(self) -> list[str]:
        """Return the last lines of the trainer's log."""
        return screen_lines(tail(self.directory / "trainer.log"))

    def last_steps(self) -> list[dict[str, Any]]:
        """Return the newest whole lines of the metrics, none before the first."""
        return last_steps(tail(self.directory / "metrics.jsonl"))

    def max_steps(self) -> int | None:
        """Return how many steps the trainer itself says it will make, None before it has."""
        path = self.directory / "summary.json"
        return (
            json.loads(path.read_text(encoding="utf-8")).get("max_steps") if path.exists() else None
        )


def tail(path: Path, size: int = 65536) -> str:
    """Return the last ``size`` bytes of a file as text, nothing where there is no file."""
    if not path.exists():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - size))
        return file.read().decode(errors="replace")


def screen_lines(text: str) -> list[str]:
    """Return the last lines that are not empty. A progress bar is the line it last showed."""
    lines = [line.split("\r")[-1] for line in text.replace("\r\n", "\n").split("\n")]
    return [line for line in lines if line.strip()][-LAST_LINES:]


def replace(path: Path, data: bytes) -> None:
    """Write a file so that a reader sees the old one or the new one, and nothing between."""
    new = path.with_name(f".{path.name}")
    new.write_bytes(data)
    new.replace(path)


def exit_record(state: dict[str, Any] | None, error: str, last_lines: list[str]) -> dict[str, Any]:
    """Return the content of exit.json from the engine's ``state`` of the container.

    ``error`` is what the follower knows and the engine does not. Without a state there is no exit
    code.
    """
    state = state or {}
    code = state.get("exit_code")
    return {
        "exit_code": code,
        "signal": signal_name(code),
        "oom_killed": state.get("oom_killed"),
        "started": state.get("started"),
        "finished": state.get("finished"),
        "error": error or state.get("error") or None,
        "last_lines": last_lines,
    }


def signal_name(exit_code: int | None) -> str | None:
    """Return the name of the signal that ended a process, by the shell's 128 + n."""
    try:
        return signal.Signals((exit_code or 0) - 128).name
    except ValueError:
        return None


def exits(workers: Path, since: float) -> dict[str, dict[str, Any]]:
    """Return the exit.json of every worker that has ended, less what earlier followers have left.

    ``since`` is when those of today began, in seconds since 1970.
    """
    return {
        path.parent.name: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(workers.glob("*/exit.json"))
        if path.stat().st_mtime >= since
    }


def failed_worker(ended: dict[str, dict[str, Any]], own: str) -> str | None:
    """Return a worker other than ``own`` that has failed by itself, by the records of ends."""
    for worker, record in ended.items():
        by_itself = not (record["error"] or "").startswith(STOPPED)
        if worker != own and record["exit_code"] != 0 and by_itself:
            return worker
    return None


def laggards(steps: dict[str, int], tolerance: float) -> str:
    """Return who is more than ``tolerance`` steps behind the first of the workers, and how far.

    ``steps`` is the newest step of each worker.
    """
    ahead, *_ = steps.values()
    behind = {worker: ahead - step for worker, step in steps.items() if ahead - step > tolerance}
    if not behind:
        return ""
    worker = max(behind, key=behind.__getitem__)
    others = f" and {len(behind) - 1} more" if len(behind) > 1 else ""
    return f"{worker} is {behind[worker]} steps behind{others}"


def verdict(record: dict[str, Any], log: Path) -> str:
    """Return in one line what to say about a trainer that has failed."""
    last_words = record["error"] or "".join(record["last_lines"][-1:]).strip()
    return f"the trainer failed (exit code {record['exit_code']}): {last_words}. Its log: {log}"


class ActionModule(ActionBase):
    """``follow_run``: see roles/train/tasks/main.yml for its arguments."""

    _VALID_ARGS = frozenset(
        (
            "container",
            "lease_seconds",
            "local_dir",
            "max_steps",
            "poll_seconds",
            "process_dir",
            "run_id",
            "runs_dir",
            "since",
            "stop_seconds",
            "workers",
        )
    )

    def run(
        self, tmp: str | None = None, task_vars: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return when the trainer has ended; fail unless it succeeded."""
        super().run(tmp, task_vars)
        self.args, self.task_vars = self._task.args, task_vars
        self.host = task_vars["inventory_hostname"]
        self.workers = Path(self.args["local_dir"]) / "workers"
        self.mirror = Mirror(self.workers / self.host)
        self.shown = time.monotonic()
        self.line = ""
        state, error, output = self.follow()
        if not error and state and state["ended_with_engine"]:
            error = "its Docker engine, or the whole worker, was restarted"
        # The engine has the output also where the worker's disk had no room for the log.
        lines = screen_lines(output) or self.mirror.last_lines()
        record = exit_record(state, error, lines)
        replace(
            self.mirror.directory / "exit.json",
            json.dumps(record, indent=2, ensure_ascii=False).encode() + b"\n",
        )
        failed = record["exit_code"] != 0
        log = self.mirror.directory / "trainer.log"
        return {
            "changed": True,
            "failed": failed,
            "lost": state is None,
            "msg": verdict(record, log) if failed else "the trainer has finished",
        }

    def follow(self) -> tuple[dict[str, Any] | None, str, str]:
        """Poll until the trainer has ended.

        Returns the engine's last state of the container, why the run ended if the engine cannot
        know it, and what the engine kept of the output.
        """
        heard, stopping, controller = time.monotonic(), "", os.getppid()
        while True:
            if os.getppid() != controller:
                # ansible-playbook was killed, and this fork of it was not: left alone, it would go
                # on renewing the lease of a run that nobody follows.
                os._exit(1)
            look, trouble = self.look(renew_lease=not stopping)
            state = look.get("state")
            if trouble:
                silence = time.monotonic() - heard
                complaint = f"no answer for {clock(silence)}: {trouble}"
                # A warning would be held back until the task ends.
                display.display(f"{self.host}: {complaint}", color=C.COLOR_WARN)
                if silence > self.args["lease_seconds"]:
                    return None, complaint, ""
            elif not state or state["run_id"] != self.args["run_id"]:
                return None, "its container, or its record, is gone", ""
            else:
                heard = time.monotonic()
                grown = self.mirror.take(look["files"])
                ended = exits(self.workers, self.args["since"])
                self.show(ended)
                if not state["running"]:
                    if not grown:
                        return state, stopping, look["output"]
                    continue
                if not stopping and (culprit := failed_worker(ended, self.host)):
                    stopping = f"{STOPPED} {culprit} failed"
                    self.stop(state)
            time.sleep(self.args["poll_seconds"])

    def look(self, renew_lease: bool) -> tuple[dict[str, Any], str]:
        """Return what the worker says, or why it said nothing."""
        arguments = {
            "container": self.args["container"],
            "process_dir": self.args["process_dir"],
            "runs_dir": self.args["runs_dir"],
            "run_id": self.args["run_id"],
            "renew_lease": renew_lease,
            "appended": self.mirror.offsets,
            "inodes": self.mirror.inodes,
            "rewritten": list(REWRITTEN),
        }
        try:
            answer = self._execute_module("trainer_state", arguments, task_vars=self.task_vars)
        except AnsibleConnectionFailure as error:
            return {}, f"SSH: {error}"
        # Without an engine there may be a process, but no container.
        state = answer.get("state") or {}
        if answer.get("failed") or not (answer["engine"] or state.get("runtime") == "native"):
            return {}, str(answer.get("msg", "the Docker engine does not answer"))
        return answer, ""

    def stop(self, state: dict[str, Any]) -> None:
        """Ask the trainer to end; the next looks tell when it has.

        Where nobody hears it, the lease, which is not renewed any more, does the same a little
        later.
        """
        if state["runtime"] == "native":
            module, arguments = "ansible.builtin.command", {"_raw_params": f"kill {state['pid']}"}
        else:
            module = "community.docker.docker_container"
            arguments = {
                "name": self.args["container"],
                "state": "stopped",
                # The supervisor needs its own grace before the engine loses patience.
                "stop_timeout": self.args["stop_seconds"] + 10,
                "comparisons": {"*": "ignore"},
            }
        with contextlib.suppress(AnsibleConnectionFailure):
            self._execute_module(module, arguments, task_vars=self.task_vars)

    def show(self, ended: dict[str, dict[str, Any]]) -> None:
        """Put a line on the screen when there is news, or when it has been quiet for long.

        The first of the workers that have not ended speaks for all; ``ended`` are the others.
        """
        running = [worker for worker in self.args["workers"] if worker not in ended]
        if running[:1] != [self.host]:
            return
        steps = self.mirror.last_steps()
        if steps:
            line = progress(steps, self.mirror.max_steps() or self.args["max_steps"])
            newest = {
                worker: last_steps(tail(self.workers / worker / "metrics.jsonl"))[-1:]
                for worker in running
            }
            # Two polls may have been up to two pauses apart.
            tolerance = 1 + 2 * self.args["poll_seconds"] / max(steps[-1]["step_time_s"], 1e-3)
            numbers = {worker: it[0]["step"] if it else -1 for worker, it in newest.items()}
            line = "   ".join(filter(None, [line, laggards(numbers, tolerance)]))
        else:
            line = (self.mirror.last_lines()[-1:] or ["starting"])[0].strip()[:100]
        now = time.monotonic()
        if line != self.line or now - self.shown > QUIET_SECONDS:
            passed = clock(time.time() - self.args["since"])
            display.display(f"{self.host}   {passed:>5}   {line}")
            self.line, self.shown = line, now
