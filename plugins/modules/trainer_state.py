#!/usr/bin/python
"""Ansible module: reads the state of a worker's trainer, fast enough for every few seconds."""

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
# How long an engine may take to end its containers and to start again
RESTART_SECONDS = 120

DOCUMENTATION = r"""
module: trainer_state
short_description: Reads the state of the trainer on a worker
description:
  - >-
    Returns the state of the trainer's container, or of its process where the trainer runs without a
    container, and the new parts of the run's files. On request it renews the run's lease.
  - If there are both a container and a process, the state is that of the running one, and if none
    runs, of the one that was started last.
  - A detached run has no lease, and gets none.
  - Needs nothing on the worker but Python, and speaks to the Docker engine over its socket.
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
      The directory of a trainer without a container. Its C(process.json) describes what was
      started, and the trainer's supervisor writes C(state.json).
    type: path
  runs_dir:
    description: The directory with the directories of all runs. By default no file is read.
    type: path
  run_id:
    description: The run whose files are read; by default that of the container or process.
    type: str
  renew_lease:
    description: Renew the run's lease.
    type: bool
    default: false
  appended:
    description:
      - Files that only grow, each with the offset in bytes at which to begin. A negative offset
        counts from the end.
    type: dict
    default: {}
  inodes:
    description:
      - The inode that each of these files had before. A file with another inode was replaced since,
        and is returned from its beginning.
    type: dict
    default: {}
  rewritten:
    description: Files that are returned whole.
    type: list
    elements: str
    default: []
  max_bytes:
    description: How many bytes of a file are returned at most; the next call returns the rest.
    type: int
    default: 1048576
extends_documentation_fragment: ansible.builtin.action_common_attributes
attributes:
  check_mode:
    support: full
  diff_mode:
    support: none
  platform:
    platforms: posix
"""

EXAMPLES = r"""
- name: Read the state of the trainer
  mixtral.tpu.trainer_state:
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
  description: Whether the files of the ended run were fetched to a controller.
  type: bool
  returned: always
exists:
  description: Whether the run's directory exists.
  type: bool
  returned: always
checkpoint:
  description: The step of the run's newest complete checkpoint, null if there is none.
  type: int
  returned: always
files:
  description: >-
    For each file that exists its C(data) (base64), the C(offset) after it, and its C(inode).
  type: dict
  returned: always
output:
  description: The last lines of an ended container's output, as the engine has kept them.
  type: str
  returned: always
"""


class Engine(http.client.HTTPConnection):
    """A connection to the Docker engine over a Unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=30)
        self.path = path

    def connect(self) -> None:
        """Connect to the socket instead of to a host."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.path)

    def get(self, path: str) -> bytes | None:
        """Return the body of the engine's answer, None if there is no such container.

        Raises OSError if the engine does not answer or answers with an error.
        """
        self.request("GET", path)
        response = self.getresponse()
        body = response.read()
        if response.status == http.client.NOT_FOUND:
            return None
        if response.status != http.client.OK:
            raise OSError(
                f"the Docker engine answers {response.status}: {body.decode(errors='replace')}"
            )
        return body


def container_state(engine: Engine, name: str) -> dict[str, Any] | None:
    """Return the state of the container ``name``, None if there is none."""
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
        "environment": dict(entry.split("=", 1) for entry in container["Config"]["Env"] or []),
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
    """Return the state of a trainer without a container, None if there is none.

    ``directory`` has a process.json, written when the trainer was started, and a state.json,
    written by the trainer's supervisor.
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
    running = (
        "exit_code" not in known and "pid" in known and start_time(known["pid"]) == known["began"]
    )
    lost = "pid" in known and "exit_code" not in known and not running
    return {
        "runtime": "native",
        **{key: process[key] for key in ("run_id", "started_by", "detached")},
        **{key: process[key] for key in ("command", "environment")},
        "pid": known.get("pid"),
        "status": "running" if running else "exited" if known else "created",
        "running": running,
        # Only SIGKILL, or a restart of the worker, keeps the supervisor from writing the exit code.
        "exit_code": 128 + 9 if lost else known.get("exit_code", 0),
        "oom_killed": known.get("oom_killed", False),
        "error": "the trainer's supervisor was killed, or the worker was restarted" if lost else "",
        "started": known.get("started"),
        "finished": known.get("finished"),
        "ended_with_engine": False,
    }


def start_time(pid: int) -> int | None:
    """Return when a process was started, in clock ticks since boot; None if there is no process."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return int(file.read().rpartition(")")[2].split()[19])
    except (FileNotFoundError, ProcessLookupError):
        return None


def newest(states: list[dict[str, Any] | None]) -> dict[str, Any] | None:
    """Return the state that is running, else the one that was started last, None without any."""
    return max(
        filter(None, states),
        key=lambda state: (state["running"], state["started"] or ""),
        default=None,
    )


def ended_with_engine(state: dict[str, Any], pid_file: str = PID_FILE) -> bool:
    """Return whether a container ended because its engine, or the worker, was restarted.

    The age of the engine's pid file is the time of the engine's last start. A container that was
    started before and ended around that time ended with the engine.
    """
    if state["Running"] or not os.path.exists(pid_file):
        return False
    engine_started = os.path.getmtime(pid_file)
    started, finished = seconds(state["StartedAt"]), seconds(state["FinishedAt"])
    return started < engine_started and finished > engine_started - RESTART_SECONDS


def seconds(stamp: str) -> int:
    """Return one of the engine's time stamps, which are in UTC, in whole seconds since 1970."""
    return calendar.timegm(time.strptime(stamp[:19], "%Y-%m-%dT%H:%M:%S"))


def _time(stamp: str) -> str | None:
    """Return the engine's time stamp, None for the year 1, which means that it is not set."""
    return None if stamp.startswith("0001-") else stamp


def last_output(engine: Engine, name: str) -> str:
    """Return the last lines of the container's output."""
    stream = engine.get(f"/containers/{name}/logs?stdout=1&stderr=1&tail=20") or b""
    text = b""
    # Each part has a header of 8 bytes, the last 4 of which are the part's length.
    while stream:
        end = 8 + int.from_bytes(stream[4:8], "big")
        text, stream = text + stream[8:end], stream[end:]
    return text.decode(errors="replace")


def newest_checkpoint(directory: str) -> int | None:
    """Return the step of the newest complete checkpoint of a run, None if there is none."""
    names = os.listdir(directory) if os.path.isdir(directory) else []
    steps = [name[len("checkpoint-") :] for name in names if name.startswith("checkpoint-")]
    return max((int(step) for step in steps if step.isdecimal()), default=None)


def new_part(path: str, offset: int, limit: int, inode: int | None = None) -> dict[str, Any]:
    """Return at most ``limit`` bytes of a file from ``offset`` on, with the offset after them.

    A file with another inode than ``inode`` was replaced, and is read from its beginning.
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
    """Run the module."""
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
            "max_bytes": {"type": "int", "default": 1048576},
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
    # The state is read before the files, so that the files of an ended trainer are complete.
    states = [process_state(given["process_dir"]) if given["process_dir"] else None]
    try:
        states.append(container_state(engine, name))
    except (FileNotFoundError, ConnectionRefusedError):
        answer["engine"] = False
    except OSError as error:
        module.fail_json(
            msg=f"cannot read the trainer's state from {given['socket']}: {error}. Check the "
            "Docker engine: journalctl --unit docker on the worker"
        )
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
                answer["files"][file] = new_part(path, int(offset), given["max_bytes"], inode)
        if state and not state["running"] and state["runtime"] == "container":
            answer["output"] = last_output(engine, name)
    module.exit_json(changed=False, **answer)


if __name__ == "__main__":
    main()
