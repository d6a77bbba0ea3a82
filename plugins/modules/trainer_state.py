#!/usr/bin/python
"""Ansible module: one look at a worker's trainer, cheap enough to be taken every few seconds."""

from __future__ import annotations

import base64
import calendar
import http.client
import json
import os
import socket
import time
from typing import Any

from ansible.module_utils.basic import AnsibleModule

PID_FILE = "/var/run/docker.pid"
# How long an engine may take to end its containers and to come back
RESTART_SECONDS = 120

DOCUMENTATION = r"""
module: trainer_state
short_description: One look at the trainer on a worker
description:
  - >-
    Tells the state of the trainer's container, or of its process where it runs without one, renews
    its lease, and returns what its files gained.
  - Where there are both it is the one that runs, else the one that was started last.
  - A lease is renewed where the run has one; a detached run has none.
  - Needs nothing on the worker but Python; the Docker engine is asked over its socket.
author: mixtral-tpu contributors
options:
  container:
    description: The container's name.
    type: str
    required: true
  socket:
    description: The Docker engine's socket.
    type: path
    default: /var/run/docker.sock
  process_dir:
    description: >-
      The directory of the run without a container. There C(process.json) says what was started, and
      C(state.json), which the trainer's supervisor writes, what became of it.
    type: path
  runs_dir:
    description: The directory that holds the runs' directories. Without it no file is looked at.
    type: path
  run_id:
    description: The run to look at; by default that of the container.
    type: str
  renew_lease:
    description: Renew the run's lease.
    type: bool
    default: false
  appended:
    description:
      - Files that only grow, each with the offset in bytes from which on it is wanted. A negative
        offset counts from the end.
    type: dict
    default: {}
  inodes:
    description:
      - The inode that each of these files had at the look before. One that was replaced since is
        wanted from its beginning.
    type: dict
    default: {}
  rewritten:
    description: Files that are wanted whole.
    type: list
    elements: str
    default: []
  max_bytes:
    description: The most that is returned of one file. The rest comes with the next look.
    type: int
    default: 1048576
attributes:
  check_mode:
    support: full
"""

EXAMPLES = r"""
- name: Look at what runs
  trainer_state:
    container: mixtral-trainer
    runs_dir: ~/mixtral-trainer/runs
    appended:
      metrics.jsonl: -1000
"""

RETURN = r"""
engine:
  description: Whether a Docker engine answers.
  type: bool
  returned: always
state:
  description: >-
    The trainer's C(runtime), which is container or native, its C(run_id), C(started_by),
    C(detached), C(command), C(environment), C(running), C(exit_code), C(oom_killed), C(error),
    C(started), C(finished), the C(pid) of a native one and whether it C(ended_with_engine), or null
    where there is neither container nor process.
  type: dict
  returned: always
collected:
  description: Whether somebody has brought the run's files home since it ended.
  type: bool
  returned: always
exists:
  description: Whether the run's directory is there.
  type: bool
  returned: always
checkpoint:
  description: The step of the newest complete checkpoint in it, null where there is none.
  type: int
  returned: always
files:
  description: >-
    For each file that exists its C(data) (base64), the C(offset) after it, and its C(inode).
  type: dict
  returned: always
output:
  description: What the engine kept of the container's last output, where it has ended.
  type: str
  returned: always
"""


class Engine(http.client.HTTPConnection):
    """The Docker engine behind a Unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=30)
        self.path = path

    def connect(self) -> None:
        """Connect to the socket instead of to a host."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.path)

    def get(self, path: str) -> bytes | None:
        """Return the engine's answer, None where there is no such container.

        Raises OSError when the engine does not answer, and for any answer but these two.
        """
        self.request("GET", path)
        response = self.getresponse()
        body = response.read()
        if response.status == http.client.NOT_FOUND:
            return None
        if response.status != http.client.OK:
            raise OSError(
                f"the Docker engine says {response.status}: {body.decode(errors='replace')}"
            )
        return body


def container_state(engine: Engine, name: str) -> dict[str, Any] | None:
    """Return what the engine knows of the container ``name``, None where there is none."""
    body = engine.get(f"/containers/{name}/json")
    if body is None:
        return None
    container = json.loads(body)
    state, labels = container["State"], container["Config"]["Labels"] or {}
    return {
        "runtime": "container",
        "run_id": labels.get("run_id", ""),
        "started_by": labels.get("started_by", ""),
        "detached": labels.get("detached") == "true",
        "command": container["Config"]["Cmd"] or [],
        "environment": dict(it.split("=", 1) for it in container["Config"]["Env"] or []),
        "status": state["Status"],
        "running": state["Running"],
        "exit_code": state["ExitCode"],
        "oom_killed": state["OOMKilled"],
        "error": state["Error"],
        "started": _time(state["StartedAt"]),
        "finished": _time(state["FinishedAt"]),
        "ended_with_engine": ended_with_engine(state),
    }


def process_state(directory: str) -> dict[str, Any] | None:
    """Return what is known of the trainer that runs without a container, None where there is none.

    What was started is in process.json, what the trainer's supervisor knows in state.json.
    """
    try:
        with open(os.path.join(directory, "process.json"), encoding="utf-8") as file:
            process = json.load(file)
    except FileNotFoundError:
        return None
    try:
        with open(os.path.join(directory, "state.json"), encoding="utf-8") as file:
            known = json.load(file)
    except FileNotFoundError:
        known = {}
    running = "exit_code" not in known and "pid" in known and began(known["pid"]) == known["began"]
    lost = "pid" in known and "exit_code" not in known and not running
    return {
        "runtime": "native",
        **{key: process[key] for key in ("run_id", "started_by", "detached")},
        **{key: process[key] for key in ("command", "environment")},
        "pid": known.get("pid"),
        "status": "running" if running else "exited" if known else "created",
        "running": running,
        # Nothing but SIGKILL, or the end of everything, keeps the supervisor from writing it down.
        "exit_code": 128 + 9 if lost else known.get("exit_code", 0),
        "oom_killed": known.get("oom_killed", False),
        "error": "its supervisor was killed, or the worker was restarted" if lost else "",
        "started": known.get("started"),
        "finished": known.get("finished"),
        "ended_with_engine": False,
    }


def began(pid: int) -> int | None:
    """Return when a process began, in the kernel's clock ticks, None where there is none."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return int(file.read().rpartition(")")[2].split()[19])
    except (FileNotFoundError, ProcessLookupError):
        return None


def newest(states: list[dict[str, Any] | None]) -> dict[str, Any] | None:
    """Return the state of what runs, else of what was started last."""
    there = [state for state in states if state]
    return max(there, key=lambda it: (it["running"], it["started"] or ""), default=None)


def ended_with_engine(state: dict[str, Any], pid_file: str = PID_FILE) -> bool:
    """Tell whether a container ended because its engine did, or the whole worker.

    An engine writes its pid file when it starts, and no container outlives its engine: one that
    began before the engine's present life and ended around its start ended with the life before.
    """
    if state["Running"] or not os.path.exists(pid_file):
        return False
    engine_started = os.path.getmtime(pid_file)
    started, finished = seconds(state["StartedAt"]), seconds(state["FinishedAt"])
    return started < engine_started and finished > engine_started - RESTART_SECONDS


def seconds(stamp: str) -> int:
    """Return the engine's time stamp, which is UTC, in whole seconds since 1970."""
    return calendar.timegm(time.strptime(stamp[:19], "%Y-%m-%dT%H:%M:%S"))


def _time(stamp: str) -> str | None:
    """Return the engine's time stamp, None for the year 1, with which it says «not yet»."""
    return None if stamp.startswith("0001-") else stamp


def last_output(engine: Engine, name: str) -> str:
    """Return the last lines that the engine kept of the container's output."""
    stream = engine.get(f"/containers/{name}/logs?stdout=1&stderr=1&tail=20") or b""
    text = b""
    # Each piece has a header of 8 bytes, the last 4 of which are its length.
    while stream:
        end = 8 + int.from_bytes(stream[4:8], "big")
        text, stream = text + stream[8:end], stream[end:]
    return text.decode(errors="replace")


def newest_checkpoint(directory: str) -> int | None:
    """Return the step of the newest checkpoint that a run has completed, None if there is none."""
    names = os.listdir(directory) if os.path.isdir(directory) else []
    steps = [name[len("checkpoint-") :] for name in names if name.startswith("checkpoint-")]
    return max((int(step) for step in steps if step.isdecimal()), default=None)


def gained(path: str, offset: int, limit: int, inode: int | None = None) -> dict[str, Any]:
    """Return at most ``limit`` bytes of the file from ``offset`` on, and the offset after them.

    Where the file is not the one of this ``inode`` any more, it is taken from its beginning.
    """
    with open(path, "rb") as file:
        now = os.fstat(file.fileno()).st_ino
        if inode not in (None, now):
            offset = 0
        size = file.seek(0, os.SEEK_END)
        file.seek(offset if offset >= 0 else max(0, size + offset))
        data = file.read(limit)
        return {"data": base64.b64encode(data).decode(), "offset": file.tell(), "inode": now}


def main() -> None:
    """Answer the task."""
    module = AnsibleModule(
        argument_spec={
            "container": {"type": "str", "required": True},
            "socket": {"type": "path", "default": "/var/run/docker.sock"},
            "process_dir": {"type": "path"},
            "runs_dir": {"type": "path"},
            "run_id": {"type": "str"},
            "renew_lease": {"type": "bool", "default": False},
            "appended": {"type": "dict", "default": {}},
            "inodes": {"type": "dict", "default": {}},
            "rewritten": {"type": "list", "elements": "str", "default": []},
            "max_bytes": {"type": "int", "default": 2**20},
        },
        supports_check_mode=True,
    )
    given = module.params
    engine, name = Engine(given["socket"]), given["container"]
    answer: dict[str, Any] = {
        "engine": True,
        "state": None,
        "collected": False,
        "exists": False,
        "checkpoint": None,
        "files": {},
        "output": "",
    }
    # The state first, then the files: when it has ended, the files are complete.
    states = [process_state(given["process_dir"]) if given["process_dir"] else None]
    try:
        states.append(container_state(engine, name))
    except (FileNotFoundError, ConnectionRefusedError):
        answer["engine"] = False
    except OSError as error:
        module.fail_json(msg=f"{given['socket']}: {error}")
    answer["state"] = state = newest(states)
    run_id = given["run_id"] or (state or {}).get("run_id")
    if given["runs_dir"] and run_id:
        directory = os.path.join(given["runs_dir"], run_id)
        lease = os.path.join(directory, "lease")
        if given["renew_lease"] and not module.check_mode and os.path.exists(lease):
            os.utime(lease)
        answer["collected"] = os.path.exists(os.path.join(directory, "collected"))
        answer["exists"] = os.path.isdir(directory)
        answer["checkpoint"] = newest_checkpoint(directory)
        wanted = given["appended"] | dict.fromkeys(given["rewritten"], 0)
        for file, offset in wanted.items():
            path = os.path.join(directory, file)
            if os.path.exists(path):
                inode = given["inodes"].get(file)
                answer["files"][file] = gained(path, int(offset), given["max_bytes"], inode)
        if state and not state["running"] and state["runtime"] == "container":
            answer["output"] = last_output(engine, name)
    module.exit_json(changed=False, **answer)


if __name__ == "__main__":
    main()
