#!/usr/bin/python
"""Ansible module: one look at a worker's trainer, cheap enough to be taken every few seconds."""

from __future__ import annotations

import base64
import http.client
import json
import os
import socket
from typing import Any

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: trainer_state
short_description: One look at the trainer on a worker
description:
  - Tells the state of the trainer's container, renews its lease, and returns what its files gained.
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
    The container's C(run_id), C(started_by), C(running), C(exit_code), C(oom_killed), C(error),
    C(started) and C(finished), or null where there is no container.
  type: dict
  returned: always
files:
  description: For each file that exists its C(data) (base64) and the C(offset) after it.
  type: dict
  returned: always
output:
  description: >-
    What the engine kept of the container's last output, where it has ended without a log.
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
        "run_id": labels.get("run_id", ""),
        "started_by": labels.get("started_by", ""),
        "status": state["Status"],
        "running": state["Running"],
        "exit_code": state["ExitCode"],
        "oom_killed": state["OOMKilled"],
        "error": state["Error"],
        "started": _time(state["StartedAt"]),
        "finished": _time(state["FinishedAt"]),
    }


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


def gained(path: str, offset: int, limit: int) -> dict[str, Any]:
    """Return at most ``limit`` bytes of the file from ``offset`` on, and the offset after them."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(offset if offset >= 0 else max(0, size + offset))
        data = file.read(limit)
        return {"data": base64.b64encode(data).decode(), "offset": file.tell()}


def main() -> None:
    """Answer the task."""
    module = AnsibleModule(
        argument_spec={
            "container": {"type": "str", "required": True},
            "socket": {"type": "path", "default": "/var/run/docker.sock"},
            "runs_dir": {"type": "path"},
            "run_id": {"type": "str"},
            "renew_lease": {"type": "bool", "default": False},
            "appended": {"type": "dict", "default": {}},
            "rewritten": {"type": "list", "elements": "str", "default": []},
            "max_bytes": {"type": "int", "default": 2**20},
        },
        supports_check_mode=True,
    )
    given = module.params
    engine, name = Engine(given["socket"]), given["container"]
    answer: dict[str, Any] = {"engine": True, "state": None, "files": {}, "output": ""}
    # The state first, then the files: when it has ended, the files are complete.
    try:
        answer["state"] = state = container_state(engine, name)
    except (FileNotFoundError, ConnectionRefusedError):
        answer["engine"], state = False, None
    except OSError as error:
        module.fail_json(msg=f"{given['socket']}: {error}")
    run_id = given["run_id"] or (state or {}).get("run_id")
    if given["runs_dir"] and run_id:
        directory = os.path.join(given["runs_dir"], run_id)
        if given["renew_lease"] and not module.check_mode:
            os.utime(os.path.join(directory, "lease"))
        wanted = given["appended"] | dict.fromkeys(given["rewritten"], 0)
        for file, offset in wanted.items():
            path = os.path.join(directory, file)
            if os.path.exists(path):
                answer["files"][file] = gained(path, int(offset), given["max_bytes"])
        log = os.path.join(directory, "trainer.log")
        silent = not (os.path.exists(log) and os.path.getsize(log))
        if state and not state["running"] and silent:
            answer["output"] = last_output(engine, name)
    module.exit_json(changed=False, **answer)


if __name__ == "__main__":
    main()
