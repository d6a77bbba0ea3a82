"""The gate's own verdict: a part that fails, and all that could not be run any more, are named."""

import re
import subprocess
import sys
from pathlib import Path

GATE = Path(__file__).with_name("gate.py")


def gate(directory: Path, **fails: str) -> tuple[int, dict[str, str], str]:
    """Run the gate on a Makefile of its own; return exit code, verdicts and what it printed."""
    parts = ("setup", "site", "quick", "molecule", "test-stack", "e2e")
    rules = [f"{part}:\n\t@echo this is {part}; {fails.get(part, 'true')}\n" for part in parts]
    (directory / "Makefile").write_text("".join(rules))
    done = subprocess.run(
        [sys.executable, GATE], cwd=directory, capture_output=True, text=True, check=False
    )
    rows = [re.split("  +", line) for line in done.stdout.rpartition("\n\n")[2].splitlines()]
    assert all(re.fullmatch(r"\d+:\d\d", time) for _, time, _ in rows)
    return done.returncode, {part: verdict for part, _, verdict in rows}, done.stdout


def test_all_parts_are_run_and_reported_as_passed(tmp_path: Path) -> None:
    code, verdicts, said = gate(tmp_path)
    assert code == 0
    parts = ["setup", "site", "quick", "molecule", "test-stack", "e2e", "make test"]
    assert verdicts == dict.fromkeys(parts, "passed")
    # Also what ran beside another part is on the screen in the end.
    assert all(f"this is {part}" in said for part in parts[:-1])


def test_after_a_failure_the_rest_is_not_run(tmp_path: Path) -> None:
    code, verdicts, said = gate(tmp_path, **{"test-stack": "exit 3"})
    assert code == 1
    assert verdicts["molecule"] == "passed"
    assert verdicts["test-stack"] == "failed, exit code 2"  # that of make
    assert verdicts["e2e"] == "not run"
    assert verdicts["make test"] == "failed"
    assert "this is test-stack" in said
    assert "this is e2e" not in said


def test_a_part_on_the_screen_that_fails_does_not_end_the_one_beside_it(tmp_path: Path) -> None:
    code, verdicts, _ = gate(tmp_path, site="exit 1", quick="sleep 1")
    assert code == 1
    assert verdicts["site"].startswith("failed")
    assert verdicts["quick"] == "passed"
    assert verdicts["molecule"] == verdicts["test-stack"] == verdicts["e2e"] == "not run"
