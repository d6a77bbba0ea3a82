"""Run the trainer under a lease, and end it when the lease is no longer renewed.

    python supervisor.py [--lease FILE --seconds 300] --grace 30 --log FILE [--state FILE]
                    -- COMMAND [ARGUMENT ...]

The role `train` starts it on every worker: as the first process of the container, or, with
`-e runtime=native`, directly on the worker. COMMAND is then the trainer.

While `train.yml` follows the run, it renews the lease by touching the lease file. If the file has
not changed for `--seconds`, the command's process group gets SIGTERM and, `--grace` seconds later,
SIGKILL. So a controller that was interrupted, killed or cut off leaves nothing running on the
workers. Time is counted on the monotonic clock from the last change seen, so setting the system
clock does no harm. Without `--lease` the command runs to its own end.

The command's output goes to stdout and is appended to the log. SIGTERM and SIGINT are passed on,
SIGTERM with the same `--grace`. The exit code is the command's own, or 128 + n if signal n ended
it. With `--state`, a JSON file holds what a container engine would record: `pid` and `began` (the
process's start time, which together identify the process), `started`, `finished`, `exit_code` and
`oom_killed`.
"""

import argparse
import contextlib
import ctypes
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, BinaryIO

POLL_SECONDS = 0.5
PR_SET_PDEATHSIG = 1  # prctl(2)
libc = ctypes.CDLL(None)


class Lease:
    """A file that is touched for as long as the command is to run."""

    def __init__(self, path: Path, seconds: float):
        self.path = path
        self.seconds = seconds
        self._modified = self._read()
        self._renewed = time.monotonic()

    def expired(self) -> bool:
        """Whether the file has not changed for `seconds`; a missing file counts as unchanged."""
        modified = self._read()
        if modified is not None and modified != self._modified:
            self._modified = modified
            self._renewed = time.monotonic()
        return time.monotonic() - self._renewed > self.seconds

    def _read(self) -> int | None:
        try:
            return self.path.stat().st_mtime_ns
        except OSError:
            return None


class Output:
    """Copies bytes to stdout and to the log; if one cannot be written, the other still is."""

    def __init__(self, log: BinaryIO):
        self._sinks = [open(sys.stdout.fileno(), "wb", buffering=0, closefd=False), log]

    def write(self, data: bytes) -> None:
        """Write all of `data` to every sink that can still be written."""
        for sink in list(self._sinks):
            try:
                rest = memoryview(data)
                while rest:
                    rest = rest[sink.write(rest) :]
            except OSError as error:
                self._sinks.remove(sink)
                self.say(f"{sink.name}: {error.strerror}; nothing more is written there")

    def say(self, message: str) -> None:
        """Write a message of the supervisor itself."""
        self.write(f"lease: {message}\n".encode())


class State:
    """The state file. Its size is fixed, so that the end can be recorded even on a full disk."""

    SIZE = 512

    def __init__(self, path: Path):
        self._file = path.open("wb", buffering=0)
        self._kills = self._oom_kills()
        self._content: dict[str, Any] = {
            "pid": os.getpid(),
            # Process ids are reused; together with the start time they are unique.
            "began": int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]),
            "started": self._now(),
        }
        self._write()

    def end(self, exit_code: int) -> None:
        """Record how the command has ended."""
        killed = exit_code == 128 + signal.SIGKILL and self._oom_kills() > self._kills
        self._content |= {
            "finished": self._now(),
            "exit_code": exit_code,
            "oom_killed": killed,
        }
        self._write()

    def _write(self) -> None:
        data = json.dumps(self._content).ljust(self.SIZE - 1) + "\n"
        os.pwrite(self._file.fileno(), data.encode(), 0)

    def _now(self) -> str:
        return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())

    def _oom_kills(self) -> int:
        """Return how many processes the kernel has killed for lack of memory since boot."""
        counters = Path("/proc/vmstat").read_text().split()
        return int(dict(zip(counters[::2], counters[1::2], strict=True)).get("oom_kill", 0))


def supervise(command: list[str], lease: Lease | None, grace: float, output: Output) -> int:
    """Run `command` until it ends or its lease expires; return the exit code."""
    kill_at = None

    def end(number: int, _frame: object = None) -> None:
        nonlocal kill_at
        _signal_group(child.pid, number)
        if number == signal.SIGTERM:
            kill_at = kill_at or time.monotonic() + grace

    supervisor = os.getpid()

    def die_with_supervisor() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != supervisor:
            os._exit(1)

    try:
        # A session of its own, so that all its processes can be ended together.
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,
            start_new_session=True,
            # Outside a container nothing else would end the command when the supervisor is killed.
            preexec_fn=die_with_supervisor,
        )
    except OSError as error:
        output.say(f"cannot start {command[0]}: {error.strerror}")
        return 127 if isinstance(error, FileNotFoundError) else 126

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)

    os.set_blocking(child.stdout.fileno(), False)
    selector = selectors.DefaultSelector()
    selector.register(child.stdout, selectors.EVENT_READ)
    while child.poll() is None:
        if selector.get_map():
            for key, _ in selector.select(POLL_SECONDS):
                data = key.fileobj.read(1 << 16)
                if data:
                    output.write(data)
                elif data == b"":
                    selector.unregister(key.fileobj)
        else:
            time.sleep(POLL_SECONDS)
        if kill_at is None and lease and lease.expired():
            output.say(
                f"{lease.path} was not renewed for {lease.seconds:g} s: "
                f"nobody follows this run any more. Sending SIGTERM, in {grace:g} s SIGKILL"
            )
            end(signal.SIGTERM)
        if kill_at is not None and time.monotonic() > kill_at:
            _signal_group(child.pid, signal.SIGKILL)

    # Processes that the command left running would keep the TPU and the pipe open.
    _signal_group(child.pid, signal.SIGKILL)
    output.write(child.stdout.read() or b"")
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def _signal_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def main() -> int:
    """Parse the command line and supervise."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--lease", type=Path, help="file that is touched to renew the lease")
    parser.add_argument("--seconds", type=float, default=300, help="how long a renewal lasts")
    parser.add_argument("--grace", type=float, required=True, help="from SIGTERM to SIGKILL")
    parser.add_argument("--log", type=Path, required=True, help="output is appended here")
    parser.add_argument("--state", type=Path, help="file to record the command's state in, as JSON")
    parser.add_argument("command", nargs="+", metavar="COMMAND", help="after --")
    options = parser.parse_args()
    with options.log.open("ab", buffering=0) as log:
        lease = Lease(options.lease, options.seconds) if options.lease else None
        state = State(options.state) if options.state else None
        code = supervise(options.command, lease, options.grace, Output(log))
        if state:
            state.end(code)
        return code


if __name__ == "__main__":
    sys.exit(main())
