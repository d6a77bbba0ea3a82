"""Run every check, and say at the end what each part took and how it ended.

    python tests/gate.py

A part is a target of the Makefile. It begins as soon as the parts that it needs have passed, beside
whatever runs then. After a failure no further part begins, and those that run are waited for. The
exit code is 0 if every part has passed, else 1.
"""

import subprocess
import sys
import time
from graphlib import TopologicalSorter
from pathlib import Path

# Each part with those that it needs. The scenarios, which mostly wait, run beside what computes.
# e2e, which measures, runs alone.
PARTS = {
    "setup": [],
    "site": ["setup"],
    "quick": ["setup"],
    "molecule": ["site"],
    "test-stack": ["site", "quick"],
    "e2e": ["molecule", "test-stack"],
}
# The output of these goes into a file below LOGS, and to the screen when the part has ended.
IN_BACKGROUND = {"quick", "test-stack"}
LOGS = Path(".cache/gate")


def start(part: str) -> subprocess.Popen:
    """Start a part."""
    if part not in IN_BACKGROUND:
        return subprocess.Popen(["make", part])
    LOGS.mkdir(parents=True, exist_ok=True)
    with (LOGS / f"{part}.log").open("wb") as log:
        print(f"make {part} runs in the background, into {log.name}", flush=True)
        return subprocess.Popen(["make", part], stdout=log, stderr=subprocess.STDOUT)


def row(part: str, seconds: float, verdict: str) -> str:
    """Return a row of the table; the time is in minutes and seconds."""
    return f"{part:12} {int(seconds) // 60:3}:{int(seconds) % 60:02}  {verdict}"


def main() -> int:
    """Run the parts in the order of their needs; print the table."""
    began = time.monotonic()
    table = dict.fromkeys(PARTS, (0.0, "not run"))
    order = TopologicalSorter(PARTS)
    order.prepare()
    running: dict[str, tuple[subprocess.Popen, float]] = {}
    failed = False
    try:
        while order.is_active():
            for part in () if failed else order.get_ready():
                running[part] = start(part), time.monotonic()
                table[part] = 0.0, "interrupted"
            if not running:
                break
            time.sleep(0.1)
            for part, (process, started) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[part]
                code, seconds = process.returncode, time.monotonic() - started
                table[part] = seconds, f"failed, exit code {code}" if code else "passed"
                if part in IN_BACKGROUND:
                    text = (LOGS / f"{part}.log").read_text(errors="replace")
                    print(f"\nmake {part}:\n{text}", flush=True)
                if code:
                    failed = True
                else:
                    order.done(part)
    finally:
        passed = all(verdict == "passed" for _, verdict in table.values())
        print()
        for part, (seconds, verdict) in table.items():
            print(row(part, seconds, verdict))
        print(row("make test", time.monotonic() - began, "passed" if passed else "failed"))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
