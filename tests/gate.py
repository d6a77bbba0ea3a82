"""Run every check, and say at the end what each part took and how it ended.

    python tests/gate.py

A part is a target of the Makefile. The parts of a stage run side by side, and the next stage begins
when all of them are well. The exit code is 0 if every part was run and is well, else 1.
"""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

# What waits stands beside what computes: the scenarios beside the image's tests. What measures, as
# e2e does, is alone. The first part of a stage is on the screen.
STAGES = [["setup"], ["site", "quick"], ["molecule", "test-stack"], ["e2e"]]
LOGS = Path(".cache/gate")


def run(stage: list[str]) -> Iterator[tuple[str, int, float]]:
    """Run a stage's parts; yields each one's name, exit code and seconds when it has ended.

    The output of those that are not on the screen is in LOGS meanwhile, and printed at the end.
    """
    shown, *others = stage
    LOGS.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    running = {shown: subprocess.Popen(["make", shown])}
    for part in others:
        log = (LOGS / f"{part}.log").open("wb")
        running[part] = subprocess.Popen(["make", part], stdout=log, stderr=subprocess.STDOUT)
        print(f"make {part} runs beside make {shown}, into {log.name}", flush=True)
    while running:
        time.sleep(0.1)
        for part in [part for part, process in running.items() if process.poll() is not None]:
            yield part, running.pop(part).returncode, time.monotonic() - began
    for part in others:
        print(f"\nmake {part}:\n{(LOGS / f'{part}.log').read_text(errors='replace')}", flush=True)


def row(part: str, seconds: float, verdict: str) -> str:
    """Return a row of the table; the time is in minutes and seconds."""
    return f"{part:12} {int(seconds) // 60:3}:{int(seconds) % 60:02}  {verdict}"


def main() -> int:
    """Run the stages up to the first that is not well; print the table."""
    began = time.monotonic()
    table = {part: (0.0, "not run") for stage in STAGES for part in stage}
    try:
        for stage in STAGES:
            table |= dict.fromkeys(stage, (0.0, "interrupted"))
            for part, code, seconds in run(stage):
                table[part] = seconds, f"failed, exit code {code}" if code else "well"
            if any(table[part][1] != "well" for part in stage):
                break
    finally:
        well = all(verdict == "well" for _, verdict in table.values())
        print()
        for part, (seconds, verdict) in table.items():
            print(row(part, seconds, verdict))
        print(row("make test", time.monotonic() - began, "well" if well else "failed"))
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
