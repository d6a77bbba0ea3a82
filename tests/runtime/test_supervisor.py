"""The supervisor against real processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

LEASE = Path(__file__).parents[2] / "runtime/supervisor.py"

# A trainer that ignores SIGTERM, and one that says good-bye.
STUBBORN = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True)"
POLITE = (
    "import signal, sys, time; signal.signal(15, lambda *_: sys.exit('saved')); "
    "print('up', flush=True)"
)
FOREVER = "; time.sleep(60)"


class Supervised:
    """A supervisor that runs Python code, and the files it works with."""

    def __init__(self, directory: Path, code: str, seconds: float = 60, grace: float = 30):
        self.lease = directory / "lease"
        self.lease.touch()
        self.log = directory / "trainer.log"
        self.state = directory / "state.json"
        self.process = subprocess.Popen(
            [
                *(sys.executable, LEASE, f"--lease={self.lease}", f"--seconds={seconds}"),
                *(f"--grace={grace}", f"--log={self.log}", f"--state={self.state}"),
                *("--", sys.executable, "-c", code),
            ],
            # As in the image.
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def wait_for(self, text: str) -> None:
        end = time.monotonic() + 10
        while text not in self.text():
            assert time.monotonic() < end, f"{text!r} never came; there is {self.text()!r}"
            time.sleep(0.02)

    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def end(self) -> tuple[int, str]:
        out, errors = self.process.communicate(timeout=20)
        assert errors == b""
        return self.process.returncode, out.decode()


@pytest.fixture
def supervised(tmp_path):
    started = []

    def start(code: str, **options: float) -> Supervised:
        started.append(Supervised(tmp_path, code, **options))
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            one.process.terminate()
            one.process.wait(10)


def gone(pid: int) -> bool:
    # Whoever adopts an orphan may be slow to bury it: a zombie runs no more.
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_output_goes_to_stdout_and_is_appended_to_the_log(supervised):
    code = "import os; os.write(1, b'out\\n'); os.write(2, b'err\\n')"
    assert supervised(code).end() == (0, "out\nerr\n")
    second = supervised(code)
    assert second.end() == (0, "out\nerr\n")
    assert second.text() == "out\nerr\nout\nerr\n"


def test_every_byte_of_a_flood_arrives(supervised):
    one = supervised("import os\nfor n in range(40): os.write(1, bytes([65 + n % 26]) * 65536)")
    code, out = one.end()
    assert code == 0
    assert len(out) == 40 * 65536
    assert one.text() == out


def test_output_comes_while_the_command_runs(supervised):
    one = supervised("import time; print('half', end='', flush=True)" + FOREVER)
    one.wait_for("half")
    assert one.process.poll() is None


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("raise SystemExit(3)", 3),
        ("import os; os.kill(os.getpid(), 9)", 128 + 9),
        ("import os; os.abort()", 128 + 6),
    ],
)
def test_the_exit_code_is_the_command_s(supervised, code, expected):
    assert supervised(code).end()[0] == expected


def test_a_command_that_is_not_there_is_named(tmp_path):
    ran = subprocess.run(
        [sys.executable, LEASE, "--lease=x", "--seconds=9", "--grace=1", "--log=log", "--", "nix"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert (ran.returncode, ran.stdout) == (
        127,
        "lease: cannot start nix: No such file or directory\n",
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_passed_on(supervised, number):
    one = supervised(
        f"import signal, sys, time; signal.signal({int(number)}, lambda *_: sys.exit(7)); "
        "print('up', flush=True)" + FOREVER
    )
    one.wait_for("up")
    one.process.send_signal(number)
    assert one.end()[0] == 7


def test_a_renewed_lease_lasts(supervised):
    one = supervised(POLITE + FOREVER, seconds=1)
    for _ in range(12):
        time.sleep(0.25)
        os.utime(one.lease)
    assert one.process.poll() is None


def test_a_lease_that_nobody_renews_ends_the_command(supervised):
    one = supervised(POLITE + FOREVER, seconds=1)
    code, out = one.end()
    assert code == 1
    assert "was not renewed for 1 s" in out
    assert out.endswith("saved\n")
    assert one.text() == out


def test_a_removed_lease_ends_the_command(supervised):
    one = supervised(POLITE + FOREVER, seconds=1)
    one.wait_for("up")
    one.lease.unlink()
    assert one.end()[0] == 1


def test_an_old_lease_counts_from_the_start(supervised):
    one = supervised(POLITE + FOREVER, seconds=2)
    os.utime(one.lease, (0, 0))
    one.wait_for("up")
    time.sleep(1)
    assert one.process.poll() is None


def test_without_a_lease_nobody_need_renew_it(tmp_path):
    ran = subprocess.run(
        [
            *(sys.executable, LEASE, "--grace=1", f"--log={tmp_path / 'log'}", "--"),
            *(sys.executable, "-c", "import time; time.sleep(1); print('done')"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ran.returncode, ran.stdout) == (0, "done\n")


def test_who_ignores_sigterm_is_killed_after_the_grace(supervised):
    started = time.monotonic()
    code, _ = supervised(STUBBORN + FOREVER, seconds=1, grace=1).end()
    assert code == 128 + signal.SIGKILL
    assert 2 <= time.monotonic() - started < 10


def test_the_whole_group_ends_with_the_lease(supervised):
    one = supervised(
        "import subprocess, time; print(subprocess.Popen(['sleep', '60']).pid, flush=True)"
        + FOREVER,
        seconds=1,
    )
    one.wait_for("\n")
    helper = int(one.text().split()[0])
    assert not gone(helper)
    assert one.end()[0] == 128 + signal.SIGTERM
    time.sleep(0.1)
    assert gone(helper)


def test_what_a_finished_command_leaves_running_is_ended(supervised):
    one = supervised("import subprocess; print(subprocess.Popen(['sleep', '60']).pid, flush=True)")
    code, out = one.end()
    assert code == 0
    time.sleep(0.1)
    assert gone(int(out))


def test_a_log_that_cannot_grow_does_not_end_the_command(tmp_path):
    (tmp_path / "lease").touch()
    ran = subprocess.run(
        [
            *(sys.executable, LEASE, "--lease=lease", "--seconds=9", "--grace=1"),
            *("--log=/dev/full", "--", "sh", "-c", "echo one; sleep 1; echo two"),
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert ran.returncode == 0
    assert "No space left on device" in ran.stdout
    assert ran.stdout.endswith("two\n")


def test_who_ignores_sigterm_from_outside_is_killed_after_the_grace(supervised):
    one = supervised(STUBBORN + FOREVER, grace=1)
    one.wait_for("up")
    one.process.terminate()
    assert one.end()[0] == 128 + signal.SIGKILL


def test_nothing_outlives_a_supervisor_that_is_killed(supervised):
    one = supervised("import os, time; print(os.getpid(), flush=True)" + FOREVER)
    one.wait_for("\n")
    child = int(one.text())
    one.process.kill()
    one.end()
    time.sleep(0.1)
    assert gone(child)


def test_the_state_tells_of_the_beginning_and_of_the_end(supervised):
    one = supervised(POLITE + FOREVER)
    one.wait_for("up")
    state = json.loads(one.state.read_text())
    assert state["pid"] == one.process.pid
    assert "exit_code" not in state
    size = one.state.stat().st_size
    one.process.terminate()
    one.end()
    state = json.loads(one.state.read_text())
    assert (state["exit_code"], state["oom_killed"]) == (1, False)
    assert state["started"] <= state["finished"]
    # Also a full disk has room for it.
    assert one.state.stat().st_size == size
