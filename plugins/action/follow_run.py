"""Follow one worker's run to its end.

At every poll, one call of the module trainer_state renews the run's lease, returns whether the
trainer still runs, and returns the new parts of the worker's log and metrics, which are added to
their copies on the controller. So the copies of a killed controller are complete up to the last
poll, and a run that is no longer followed ends with its lease.

Each worker has a follower, a process of its own. Followers exchange information through the run's
directory: a worker's metrics.jsonl has its last step, and its exit.json how it has ended.
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

from ..filter.progress import clock, last_steps, progress
from ..plugin_utils.screen import show

APPENDED = ("trainer.log", "metrics.jsonl")
REWRITTEN = ("summary.json",)
LAST_LINES = 20
STOPPED = "stopped, because"
QUIET_SECONDS = 15


class Mirror:
    """The copies of a worker's files in ``directory``, byte for byte.

    Each part is written at its offset, so a run may be followed again, or by two controllers. When
    the worker replaces a file, as a resumed trainer does with its metrics, so does the copy.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.offsets = dict.fromkeys(APPENDED, 0)
        self.inodes: dict[str, int] = {}

    def take(self, files: dict[str, dict[str, Any]]) -> bool:
        """Write the ``files`` of trainer_state to their copies; return whether a file has grown."""
        grown = False
        for name, part in files.items():
            data = base64.b64decode(part["data"])
            if name in self.offsets:
                path = self.directory / name
                path.touch()
                with path.open("r+b") as file:
                    if self.inodes.setdefault(name, part["inode"]) != part["inode"]:
                        file.truncate(0)
                    file.seek(part["offset"] - len(data))
                    file.write(data)
                grown |= bool(data)
                self.offsets[name], self.inodes[name] = part["offset"], part["inode"]
            else:
                replace(self.directory / name, data)
        return grown

    def last_lines(self) -> list[str]:
        """Return the last lines of the trainer's log."""
        return screen_lines(tail(self.directory / "trainer.log"))

    def last_steps(self) -> list[dict[str, Any]]:
        """Return the last complete lines of the metrics, none before the first step."""
        return last_steps(tail(self.directory / "metrics.jsonl"))

    def max_steps(self) -> int | None:
        """Return the number of steps that the trainer has announced, None before it has."""
        path = self.directory / "summary.json"
        return (
            json.loads(path.read_text(encoding="utf-8")).get("max_steps") if path.exists() else None
        )


def tail(path: Path, size: int = 65536) -> str:
    """Return the last ``size`` bytes of a file as text, empty if there is no file."""
    if not path.exists():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - size))
        return file.read().decode(errors="replace")


def screen_lines(text: str) -> list[str]:
    """Return the last lines that are not empty, of a progress bar its last state."""
    lines = [line.split("\r")[-1] for line in text.replace("\r\n", "\n").split("\n")]
    return [line for line in lines if line.strip()][-LAST_LINES:]


def replace(path: Path, data: bytes) -> None:
    """Replace a file in one step: a reader gets the old content or the new one, never a part."""
    new = path.with_name(f".{path.name}")
    new.write_bytes(data)
    new.replace(path)


def exit_record(state: dict[str, Any] | None, error: str, last_lines: list[str]) -> dict[str, Any]:
    """Return the content of exit.json from the ``state`` of trainer_state.

    ``error`` is a cause that only the follower knows. Without a state there is no exit code.
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
    """Return the name of the signal n that ended a process with the exit code 128 + n."""
    try:
        return signal.Signals((exit_code or 0) - 128).name
    except ValueError:
        return None


def exits(workers: Path, since: float) -> dict[str, dict[str, Any]]:
    """Return the exit.json of every worker that has ended, by worker.

    Files from before ``since``, in seconds since 1970, are left out: earlier followers of the same
    run wrote them.
    """
    return {
        path.parent.name: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(workers.glob("*/exit.json"))
        if path.stat().st_mtime >= since
    }


def failed_worker(ended: dict[str, dict[str, Any]], own: str) -> str | None:
    """Return a worker other than ``own`` that failed and was not stopped; None if there is none.

    ``ended`` has the exit.json of each worker that has ended.
    """
    for worker, record in ended.items():
        stopped = (record["error"] or "").startswith(STOPPED)
        if worker != own and record["exit_code"] != 0 and not stopped:
            return worker
    return None


def laggards(steps: dict[str, int], tolerance: float) -> str:
    """Return which worker is furthest behind the first one, by how many steps, and how many more
    workers are behind; empty where all are within ``tolerance`` steps.

    ``steps`` has the last step of each worker.
    """
    ahead, *_ = steps.values()
    behind = {worker: ahead - step for worker, step in steps.items() if ahead - step > tolerance}
    if not behind:
        return ""
    worker = max(behind, key=behind.__getitem__)
    others = f" and {len(behind) - 1} more" if len(behind) > 1 else ""
    return f"{worker} is {behind[worker]} steps behind{others}"


def failure_text(record: dict[str, Any], log: Path) -> str:
    """Return one line about a trainer that has failed, from its exit.json."""
    cause = record["error"] or "".join(record["last_lines"][-1:]).strip()
    return f"the trainer failed (exit code {record['exit_code']}): {cause}. Log: {log}"


class ActionModule(ActionBase):
    """The action ``follow_run``; its documentation is in plugins/modules."""

    _supports_check_mode = False

    def run(
        self, tmp: str | None = None, task_vars: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Wait until the trainer has ended; fail unless it succeeded."""
        super().run(tmp, task_vars)
        _, self.args = self.validate_argument_spec(
            {
                "run_id": {"type": "str", "required": True},
                "container": {"type": "str", "required": True},
                "process_dir": {"type": "str", "required": True},
                "runs_dir": {"type": "str", "required": True},
                "local_dir": {"type": "path", "required": True},
                "workers": {"type": "list", "elements": "str", "required": True},
                "since": {"type": "float", "required": True},
                "max_steps": {"type": "int", "required": True},
                "lease_seconds": {"type": "int", "required": True},
                "stop_seconds": {"type": "int", "required": True},
                "poll_seconds": {"type": "float", "required": True},
            }
        )
        self.task_vars = task_vars
        self.host = task_vars["inventory_hostname"]
        self.workers = Path(self.args["local_dir"]) / "workers"
        self.mirror = Mirror(self.workers / self.host)
        self.last_display = time.monotonic()
        self.last_line = ""
        state, error, output = self.follow()
        if not error and state and state["ended_with_engine"]:
            error = "the worker, or its Docker engine, was restarted"
        # The engine keeps the output even if the worker's disk was too full for the log.
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
            "msg": failure_text(record, log) if failed else "the trainer has finished",
        }

    def follow(self) -> tuple[dict[str, Any] | None, str, str]:
        """Poll until the trainer has ended.

        Returns the last ``state`` of trainer_state, None for a lost worker; the cause of the end if
        the worker cannot know it, else empty; and the last output that the engine has kept.
        """
        answered, stopping, controller = time.monotonic(), "", os.getppid()
        while True:
            if os.getppid() != controller:
                # ansible-playbook was killed and this fork was not: it would go on renewing the
                # lease of a run that nobody follows.
                os._exit(1)
            inspection, error = self.inspect(renew_lease=not stopping)
            state = inspection.get("state")
            if error:
                silence = time.monotonic() - answered
                warning = f"no answer for {clock(silence)}: {error}"
                # Ansible would hold back a warning until the task ends.
                show(f"{self.host}: {warning}", C.COLOR_WARN)
                if silence > self.args["lease_seconds"]:
                    return None, warning, ""
            elif not state or state["run_id"] != self.args["run_id"]:
                return None, "the trainer's container, or the record of its process, is gone", ""
            else:
                answered = time.monotonic()
                grown = self.mirror.take(inspection["files"])
                ended = exits(self.workers, self.args["since"])
                self.show_progress(ended)
                if not state["running"]:
                    if not grown:
                        return state, stopping, inspection["output"]
                    continue
                if not stopping and (failed := failed_worker(ended, self.host)):
                    stopping = f"{STOPPED} {failed} failed"
                    self.stop(state)
            time.sleep(self.args["poll_seconds"])

    def inspect(self, renew_lease: bool) -> tuple[dict[str, Any], str]:
        """Return the result of trainer_state and no error, or an empty result and the error."""
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
            answer = self._execute_module(
                "mixtral.tpu.trainer_state", arguments, task_vars=self.task_vars
            )
        except AnsibleConnectionFailure as error:
            return {}, f"SSH: {error}"
        # Without an engine the trainer can still run as a process (runtime=native).
        state = answer.get("state") or {}
        if answer.get("failed") or not (answer["engine"] or state.get("runtime") == "native"):
            return {}, str(answer.get("msg", "the Docker engine does not answer"))
        return answer, ""

    def stop(self, state: dict[str, Any]) -> None:
        """Tell the trainer to end, without waiting until it has.

        On a worker that cannot be reached the lease, which is no longer renewed, ends the trainer.
        """
        if state["runtime"] == "native":
            module, arguments = "ansible.builtin.command", {"_raw_params": f"kill {state['pid']}"}
        else:
            module = "community.docker.docker_container"
            arguments = {
                "name": self.args["container"],
                "state": "stopped",
                # The supervisor must be able to end the trainer before the engine kills both.
                "stop_timeout": self.args["stop_seconds"] + 10,
                "comparisons": {"*": "ignore"},
            }
        with contextlib.suppress(AnsibleConnectionFailure):
            self._execute_module(module, arguments, task_vars=self.task_vars)

    def show_progress(self, ended: dict[str, dict[str, Any]]) -> None:
        """Display a line when it has changed, and otherwise every QUIET_SECONDS.

        Only the first worker that has not ended displays it, for all; ``ended`` are the others.
        """
        running = [worker for worker in self.args["workers"] if worker not in ended]
        if running[:1] != [self.host]:
            return
        steps = self.mirror.last_steps()
        if steps:
            line = progress(steps, self.mirror.max_steps() or self.args["max_steps"])
            # Two followers may have polled up to two pauses apart.
            tolerance = 1 + 2 * self.args["poll_seconds"] / max(steps[-1]["step_time_s"], 1e-3)
            newest = {
                worker: last_steps(tail(self.workers / worker / "metrics.jsonl"))[-1:]
                for worker in running
            }
            numbers = {
                worker: lines[0]["step"] if lines else -1 for worker, lines in newest.items()
            }
            line = "   ".join(filter(None, [line, laggards(numbers, tolerance)]))
        else:
            line = (self.mirror.last_lines()[-1:] or ["starting"])[0].strip()[:100]
        now = time.monotonic()
        if line != self.last_line or now - self.last_display > QUIET_SECONDS:
            passed = clock(time.time() - self.args["since"])
            show(f"{self.host}   {passed:>5}   {line}")
            self.last_line, self.last_display = line, now
