"""Follow one worker's run to its end.

At every poll, one call of the module trainer_state renews the run's lease, mirrors what the
worker's log and metrics gained into the run's directory on the controller, and tells whether the
trainer still runs. What a killed controller leaves behind is therefore complete up to the last
poll, and the lease ends the run that nobody follows any more.
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

from ansible.errors import AnsibleConnectionFailure
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display

APPENDED = ("trainer.log", "metrics.jsonl")
REWRITTEN = ("summary.json",)
LAST_LINES = 20
STOPPED = "stopped, because"
QUIET_SECONDS = 15

display = Display()


class Mirror:
    """The copy of a worker's files in ``directory``, byte for byte."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.offsets = dict.fromkeys(APPENDED, 0)

    def take(self, files: dict[str, dict[str, Any]]) -> bool:
        """Write down what trainer_state returned as ``files``; tell whether a file has grown."""
        grown = False
        for name, piece in files.items():
            data = base64.b64decode(piece["data"])
            if name in self.offsets:
                with (self.directory / name).open("ab") as file:
                    file.write(data)
                grown |= piece["offset"] > self.offsets[name]
                self.offsets[name] = piece["offset"]
            else:
                replace(self.directory / name, data)
        return grown

    def last_lines(self, count: int = LAST_LINES) -> list[str]:
        """Return the last lines of the trainer's log. A progress bar is the line it last showed."""
        lines = [line.split("\r")[-1] for line in tail(self.directory / "trainer.log").split("\n")]
        return [line for line in lines if line.strip()][-count:]

    def last_step(self) -> dict[str, Any] | None:
        """Return the newest whole line of the metrics, None before the first."""
        lines = tail(self.directory / "metrics.jsonl").split("\n")[:-1]
        return json.loads(lines[-1]) if lines else None

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
        return file.read().decode(errors="replace").replace("\r\n", "\n")


def replace(path: Path, data: bytes) -> None:
    """Write a file so that a reader sees the old one or the new one, and nothing between."""
    new = path.with_name(f".{path.name}")
    new.write_bytes(data)
    new.replace(path)


def progress(step: dict[str, Any], max_steps: int | None) -> str:
    """Return the line that says how far the training is; ``step`` is a line of metrics.jsonl."""
    count, loss = step["step"] + 1, step["loss"]
    return "   ".join(
        [
            f"step {count:>{len(str(max_steps))}} of {max_steps}" if max_steps else f"step {count}",
            "loss not finite" if loss is None else f"loss {loss:.4f}",
            f"{step['step_time_s']:.2f} s/step",
            f"{step['tokens_per_s']:,.0f} tokens/s",
        ]
    )


def clock(seconds: float) -> str:
    """Return a duration as minutes and seconds."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


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


def failed_worker(workers: Path, own: str) -> str | None:
    """Return a worker other than ``own`` that has failed by itself, by its exit.json."""
    for path in sorted(workers.glob("*/exit.json")):
        record, worker = json.loads(path.read_text(encoding="utf-8")), path.parent.name
        by_itself = not (record["error"] or "").startswith(STOPPED)
        if worker != own and record["exit_code"] != 0 and by_itself:
            return worker
    return None


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
            "progress",
            "run_id",
            "runs_dir",
            "stop_seconds",
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
        self.began = self.shown = time.monotonic()
        self.line = ""
        state, error, output = self.follow()
        record = exit_record(state, error, self.mirror.last_lines() or output.splitlines())
        replace(
            self.mirror.directory / "exit.json",
            json.dumps(record, indent=2, ensure_ascii=False).encode() + b"\n",
        )
        failed = record["exit_code"] != 0
        log = self.mirror.directory / "trainer.log"
        return {
            "changed": True,
            "failed": failed,
            "msg": verdict(record, log) if failed else "the trainer has finished",
        }

    def follow(self) -> tuple[dict[str, Any] | None, str, str]:
        """Poll until the trainer has ended.

        Returns the engine's last state of the container, why the run ended if the engine cannot
        know it, and what the engine kept of the output if there is no log.
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
                display.warning(f"{self.host}: {complaint}")
                if silence > self.args["lease_seconds"]:
                    return None, complaint, ""
            elif not state or state["run_id"] != self.args["run_id"]:
                return None, "its container is gone", ""
            else:
                heard = time.monotonic()
                grown = self.mirror.take(look["files"])
                self.show()
                if not state["running"]:
                    if not grown:
                        return state, stopping, look["output"]
                    continue
                if not stopping and (culprit := failed_worker(self.workers, self.host)):
                    stopping = f"{STOPPED} {culprit} failed"
                    self.stop()
            time.sleep(self.args["poll_seconds"])

    def look(self, renew_lease: bool) -> tuple[dict[str, Any], str]:
        """Return what the worker says, or why it said nothing."""
        arguments = {
            "container": self.args["container"],
            "runs_dir": self.args["runs_dir"],
            "run_id": self.args["run_id"],
            "renew_lease": renew_lease,
            "appended": self.mirror.offsets,
            "rewritten": list(REWRITTEN),
        }
        try:
            answer = self._execute_module("trainer_state", arguments, task_vars=self.task_vars)
        except AnsibleConnectionFailure as error:
            return {}, str(error)
        if answer.get("failed") or not answer.get("engine"):
            return {}, str(answer.get("msg", "the Docker engine does not answer"))
        return answer, ""

    def stop(self) -> None:
        """Ask the trainer to end; the next looks tell when it has.

        Where nobody hears it, the lease, which is not renewed any more, does the same a little
        later.
        """
        arguments = {
            "name": self.args["container"],
            "state": "stopped",
            # The supervisor needs its own grace before the engine loses patience.
            "stop_timeout": self.args["stop_seconds"] + 10,
            "comparisons": {"*": "ignore"},
        }
        with contextlib.suppress(AnsibleConnectionFailure):
            self._execute_module(
                "community.docker.docker_container", arguments, task_vars=self.task_vars
            )

    def show(self) -> None:
        """Put a line on the screen when there is news, or when it has been quiet for long."""
        if not self.args["progress"]:
            return
        step = self.mirror.last_step()
        if step:
            line = progress(step, self.mirror.max_steps() or self.args["max_steps"])
        else:
            line = (self.mirror.last_lines(1) or ["starting"])[0].strip()[:100]
        now = time.monotonic()
        if line != self.line or now - self.shown > QUIET_SECONDS:
            display.display(f"{self.host}   {clock(now - self.began):>5}   {line}")
            self.line, self.shown = line, now
