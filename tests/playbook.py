"""ansible-playbook as users run it, and what it has printed."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# The trainer's first step is there within this, on two cores that it shares with everybody.
START_SECONDS = 600
# This machine as a worker that is reached without SSH
HERE = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable}


class Playbook:
    """An ansible-playbook that runs in this repository, or in another ``directory``.

    ``variables`` are extra variables, ``environment`` is put over this process's own.
    """

    def __init__(
        self, name: str | Path, *options: str | Path, environment: Mapping[str, str] | None = None,
        inventory: str | Path = "inventory/local", directory: str | Path = ROOT,
        **variables: object,
    ) -> None:  # fmt: skip
        self.process = subprocess.Popen(
            [Path(sys.executable).with_name("ansible-playbook"), f"--inventory={inventory}"]
            + [name, *options]
            + [f"--extra-vars={json.dumps({key: value})}" for key, value in variables.items()],
            cwd=directory,
            # Molecule asks for colours.
            env=os.environ
            | {"ANSIBLE_FORCE_COLOR": "0", "ANSIBLE_NOCOLOR": "1"}
            | (environment or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._lines: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self._lines.append(line)
            print(line, end="", flush=True)

    def wait_for(self, text: str, seconds: float = START_SECONDS) -> None:
        """Return when ``text`` is on the screen."""
        end = time.monotonic() + seconds
        while text not in self.screen:
            assert self.process.poll() is None, f"it ended without {text!r}"
            assert time.monotonic() < end, f"{text!r} did not come within {seconds} s"
            time.sleep(0.2)

    def end(self, seconds: float = 600) -> int:
        """Return the exit code."""
        code = self.process.wait(seconds)
        self._reader.join()
        return code

    def abort(self) -> None:
        """End it at once, if it still runs."""
        if self.process.poll() is None:
            self.signal(signal.SIGKILL)
            self.end()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal as a terminal does, to all of its processes."""
        os.killpg(self.process.pid, number)

    @property
    def screen(self) -> str:
        """What it has printed so far."""
        return "".join(self._lines)

    @property
    def words(self) -> str:
        """What it has printed so far, on one line."""
        return " ".join(self.screen.split())

    @property
    def code(self) -> int | None:
        """The exit code, None while it runs."""
        return self.process.poll()

    @property
    def recap(self) -> str:
        """The recap, and what stands after it."""
        return self.screen.partition("PLAY RECAP")[2]

    @property
    def table(self) -> str:
        """What stands after the recap, on one line."""
        return " ".join(self.recap.split())

    def failure(self, host: str) -> str:
        """What it has said when a host failed, on one line; nothing where none did."""
        said = self.screen.partition(f"fatal: [{host}]: FAILED!")[2]
        own = re.split(r"^(?:fatal|ok|changed|TASK|PLAY)\b", said, maxsplit=1, flags=re.MULTILINE)
        return " ".join(own[0].split())

    @property
    def changed(self) -> bool:
        """Whether the recap counts a change on any host."""
        return "changed=" in self.recap.replace("changed=0", "")


def run_playbook(name: str | Path, *options: str | Path, **more: object) -> Playbook:
    """Run a Playbook to its end, which must come within four minutes."""
    run = Playbook(name, *options, **more)
    try:
        run.end()
    finally:
        run.abort()
    return run


def write_play(directory: Path, /, *tasks: object, **keywords: object) -> Path:
    """Write a playbook of one play, with ``tasks`` and other ``keywords``; return its path."""
    path = directory / "play.yml"
    play = {"hosts": "all", "gather_facts": False, "tasks": list(tasks)} | keywords
    path.write_text(json.dumps([play]))
    return path


def write_inventory(directory: Path, hosts: Mapping[str, object], /, **variables: object) -> Path:
    """Write an inventory whose workers are all this machine; return its path.

    ``hosts`` are the workers' own variables by their names, ``variables`` those of all.
    """
    path = directory / "hosts.json"
    group = {"hosts": hosts, "vars": HERE | variables}
    path.write_text(json.dumps({"tpu_workers": group}))
    return path
