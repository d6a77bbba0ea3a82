import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from trainer.report import build, main

ROOT = Path(__file__).parents[2]
SUMMARY = {
    "model": {
        "name": "mixtral-tiny",
        "params_total": 14_428_416,
        "params_active": 4_991_232,
        "block_size": 100,
        "global_batch": 8,
    },
    "mesh": {"fsdp": 4, "tensor": 1},
    "experts": {"mode": "gmm", "kernel": "grouped_loop"},
    "attention": {"kernel": "eager"},
    "device": {"kind": "CPU", "count": 4, "hosts": 1},
    "model_flops_per_token": 5e7,
    "peak_flops_per_device": 1e12,
    "max_steps": 8,
    "compile": {"count": 2, "cached": 0, "seconds": 30.0, "last_step": 1},
    "bytes_per_token": 4.0,
    "tokens_per_epoch": 2400,
}
# Two steps compile; then one to six seconds.
TIMES = [30.0, 20.0, 3.0, 1.0, 2.0, 5.0, 4.0, 6.0]
LOSSES = [8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]
SUCCEEDED = {
    "exit_code": 0,
    "signal": None,
    "started": "2026-01-01T10:00:00Z",
    "finished": "2026-01-01T10:05:00Z",
}


class Run:
    """A run directory, as the launcher leaves one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.worker("worker-0")

    def worker(self, host: str, **changes: Any) -> Path:
        directory = self.path / "workers" / host
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "summary.json").write_text(json.dumps(SUMMARY))
        self.steps(host)
        (directory / "exit.json").write_text(json.dumps(SUCCEEDED | changes))
        return directory

    def steps(self, host: str, count: int = 8, losses: list[float | None] = LOSSES) -> None:
        lines = [
            {"step": step, "loss": losses[step], "step_time_s": TIMES[step], "tokens_per_s": 1.0}
            for step in range(count)
        ]
        path = self.path / "workers" / host / "metrics.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "runs" / "20260101-100000")


def test_the_numbers_of_a_whole_run(run: Run) -> None:
    trace = run.path / "workers/worker-0/profile/plugins/profile/2026_01_01/host.xplane.pb"
    trace.parent.mkdir(parents=True)
    trace.touch()
    report = build(run.path)
    assert report["run_id"] == "20260101-100000"
    assert (report["status"], report["notes"]) == ("succeeded", [])
    assert report["started"] == "2026-01-01T10:00:00Z"
    assert report["finished"] == "2026-01-01T10:05:00Z"
    for key in ("model", "mesh", "experts", "attention", "device", "compile"):
        assert report[key] == SUMMARY[key]
    # 1 to 6 s: the middle is 3.5; nine tenths of the way from 1 to 6 is 5.5.
    assert report["step_time_s"] == {"p50": 3.5, "p90": 5.5, "n": 6, "source": "host_clock"}
    assert report["tokens_per_s_per_device"] == pytest.approx(8 * 100 / 3.5 / 4)
    assert report["mfu"] == pytest.approx(8 * 100 / 3.5 / 4 * 5e7 / 1e12)
    # An epoch is 2400 / (8 x 100) = 3 steps; the last three had losses 3, 2 and 1.
    assert report["loss"] == {
        "first": 8.0,
        "last": 1.0,
        "bits_per_byte": pytest.approx(2.0 / (4.0 * math.log(2))),
    }
    assert report["skew"] is None
    assert report["workers"] == [
        {
            "host": "worker-0",
            "status": "succeeded",
            "exit_code": 0,
            "step_time_s": 3.5,
            "profile": str(trace.relative_to(run.path)),
        }
    ]


def test_before_the_first_epoch_is_full_the_last_half_of_the_steps_counts(run: Run) -> None:
    run.steps("worker-0", count=2)
    assert build(run.path)["loss"]["bits_per_byte"] == pytest.approx(7.0 / (4.0 * math.log(2)))


def test_too_few_steps_say_nothing_about_time(run: Run) -> None:
    run.steps("worker-0", count=4)
    report = build(run.path)
    assert report["step_time_s"] == {"p50": None, "p90": None, "n": 2, "source": "host_clock"}
    assert (report["tokens_per_s_per_device"], report["mfu"]) == (None, None)
    assert any("2 steps after the last compilation" in note for note in report["notes"])


def test_where_nothing_had_to_be_compiled_every_step_counts(run: Run) -> None:
    compiled = {"count": 0, "cached": 1, "seconds": 0.0, "last_step": None}
    path = run.path / "workers/worker-0/summary.json"
    path.write_text(json.dumps(SUMMARY | {"compile": compiled}))
    assert build(run.path)["step_time_s"]["n"] == 8


def test_without_a_known_peak_there_is_no_mfu(run: Run) -> None:
    path = run.path / "workers/worker-0/summary.json"
    path.write_text(json.dumps(SUMMARY | {"peak_flops_per_device": None}))
    report = build(run.path)
    assert report["mfu"] is None
    assert report["tokens_per_s_per_device"] is not None


def test_a_loss_that_is_no_number_stays_none(run: Run) -> None:
    run.steps("worker-0", losses=[8.0, 7.0, 6.0, 5.0, None, None, None, None])
    report = build(run.path)
    assert report["loss"] == {"first": 8.0, "last": None, "bits_per_byte": None}
    assert "loss: not a finite number at step 4" in report["notes"]


@pytest.mark.parametrize(
    ("ends", "status", "statuses"),
    [
        ([{}, {}], "succeeded", ["succeeded", "succeeded"]),
        ([{}, {"exit_code": 1}], "failed", ["succeeded", "failed"]),
        (
            [{"exit_code": 143, "signal": "SIGTERM"}, {"exit_code": 1}],
            "failed",
            ["stopped", "failed"],
        ),
        (
            [{"exit_code": 143, "signal": "SIGTERM"}, {"exit_code": 130, "signal": "SIGINT"}],
            "stopped",
            ["stopped", "stopped"],
        ),
        ([{}, {"exit_code": 137, "signal": "SIGKILL"}], "failed", ["succeeded", "failed"]),
        ([{}, {"exit_code": None}], "failed", ["succeeded", "failed"]),
    ],
)
def test_how_a_run_ended(
    run: Run, ends: list[dict[str, Any]], status: str, statuses: list[str]
) -> None:
    for number, end in enumerate(ends):
        run.worker(f"worker-{number}", **end)
    report = build(run.path)
    assert report["status"] == status
    assert [worker["status"] for worker in report["workers"]] == statuses


def test_what_is_missing_is_said_and_no_number_invented(run: Run) -> None:
    lost = run.path / "workers" / "worker-1"
    lost.mkdir()
    report = build(run.path)
    assert report["status"] == "failed"
    assert report["step_time_s"]["p50"] == 3.5
    assert report["workers"][1] == {
        "host": "worker-1",
        "status": "failed",
        "exit_code": None,
        "step_time_s": None,
        "profile": None,
    }
    for name in ("exit.json", "summary.json", "metrics.jsonl"):
        assert f"worker-1: {name} is missing" in report["notes"]


def test_nothing_came_home(run: Run) -> None:
    for path in (run.path / "workers" / "worker-0").iterdir():
        path.unlink()
    report = build(run.path)
    assert report["status"] == "failed"
    for key in ("started", "finished", "model", "device", "compile", "mfu"):
        assert report[key] is None
    assert report["loss"] == {"first": None, "last": None, "bits_per_byte": None}
    assert report["step_time_s"]["n"] == 0


def test_files_cut_short_are_read_as_far_as_they_go(run: Run) -> None:
    directory = run.path / "workers" / "worker-0"
    metrics = (directory / "metrics.jsonl").read_bytes()
    (directory / "metrics.jsonl").write_bytes(metrics[:-20])
    (directory / "exit.json").write_text('{"exit_code": ')
    report = build(run.path)
    assert report["loss"]["last"] == 2.0
    assert report["step_time_s"]["n"] == 5
    assert "worker-0: metrics.jsonl is cut short at line 8" in report["notes"]
    assert any("exit.json is not valid JSON" in note for note in report["notes"])


def test_the_command_needs_no_package_and_follows_links(run: Run) -> None:
    latest = run.path.parent / "latest"
    latest.symlink_to(run.path.name)
    subprocess.run(
        [sys.executable, "-S", "-m", "trainer.report", str(latest)], cwd=ROOT, check=True
    )
    assert json.loads((run.path / "report.json").read_text())["run_id"] == run.path.name


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
    assert main([]) == 2
