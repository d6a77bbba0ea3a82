import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from report import numbers
from report.__main__ import main
from report.run_dir import read_workers
from tests.report.profiles import Profile, tpu_worker

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


def build(run_dir: Path) -> dict[str, Any]:
    notes: list[str] = []
    return numbers.build(run_dir, read_workers(run_dir, notes), notes)


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

    def steps(
        self,
        host: str,
        count: int = 8,
        losses: list[float | None] = LOSSES,
        times: list[float] = TIMES,
        **more: Any,
    ) -> None:
        lines = [
            {"step": step, "loss": losses[step], "step_time_s": times[step], "tokens_per_s": 1.0}
            | more
            for step in range(count)
        ]
        path = self.path / "workers" / host / "metrics.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "runs" / "20260101-100000")


def test_the_numbers_of_a_whole_run(run: Run) -> None:
    report = build(run.path)
    assert report["run_id"] == "20260101-100000"
    assert report["status"] == "succeeded"
    assert report["notes"] == ["worker-0: there is no profile"]
    assert report["started"] == "2026-01-01T10:00:00Z"
    assert report["finished"] == "2026-01-01T10:05:00Z"
    for key in ("model", "mesh", "experts", "attention", "device", "compile"):
        assert report[key] == SUMMARY[key]
    # 1 to 6 s: the middle is 3.5; nine tenths of the way from 1 to 6 is 5.5.
    assert report["host_clock_s"] == {"p50": 3.5, "p90": 5.5, "n": 6}
    unknown = {"busy_p50": None, "idle_share": None}
    assert report["step_time_s"] == report["host_clock_s"] | unknown | {"source": "host_clock"}
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
            "source": "host_clock",
            "split_s": None,
            "profile": None,
        }
    ]


# As long as the steps of the profiles, from the fifth on
SECONDS = [30.0, 20.0, 3.0, 1.0, 1.0, 1.0, 1.0, 1.0]


def test_the_profiles_give_the_step_time_and_tell_who_is_slow(run: Run) -> None:
    for number, own_ms in enumerate((700, 770, 735)):
        host = f"worker-{number}"
        path = tpu_worker(own_ms).write(run.worker(host))
        run.steps(host, times=SECONDS)
    report = build(run.path)
    assert report["notes"] == []
    step_time = report["step_time_s"]
    assert (step_time["p50"], step_time["n"], step_time["source"]) == (1.0, 4, "device_trace")
    assert report["host_clock_s"] == {"p50": 1.0, "p90": pytest.approx(2.0), "n": 6}
    assert report["trace_over_host_clock"] == pytest.approx(1.0)
    assert report["tokens_per_s_per_device"] == pytest.approx(8 * 100 / 4)
    # Own: what is computed, the millisecond between the steps and 20 of input included.
    assert report["skew"]["slowest"] == "worker-1"
    assert report["skew"]["ratio"] == pytest.approx(791 / 721)
    assert report["split_s"]["compute"] == pytest.approx(0.736)
    assert report["workers"][2]["split_s"]["communication"] == pytest.approx(0.1)
    assert report["workers"][2]["profile"] == str(path.relative_to(run.path))


def test_a_profile_that_disagrees_with_the_host_clock_is_said(run: Run) -> None:
    tpu_worker(own_ms=700).write(run.path / "workers/worker-0")
    run.steps("worker-0", times=[*SECONDS[:6], 1.5, 1.5])
    report = build(run.path)
    assert report["trace_over_host_clock"] == pytest.approx(1 / 1.25)
    assert report["notes"] == [
        "worker-0: by the profile a step takes 1.0000 s, and by the host clock the same steps take "
        "1.2500 s"
    ]


def test_of_two_profiles_the_newer_counts(run: Run) -> None:
    directory = run.path / "workers/worker-0"
    tpu_worker(own_ms=700).write(directory, "2026_01_02_00_00_00")
    (directory / "profile/plugins/profile/2026_01_01_00_00_00").mkdir()
    tpu_worker(own_ms=500).write(directory, "2026_01_01_00_00_00")
    assert build(run.path)["split_s"]["compute"] == pytest.approx(0.701)


def foreign(worker: Path) -> None:
    profile = Profile()
    runs = [("train", 100 * step, 100 * step + 90, 500 + step) for step in range(9)]
    profile.line("/host:CPU", "python", runs)
    profile.write(worker)


@pytest.mark.parametrize(
    ("spoil", "note"),
    [
        (foreign, "steps 500 to 508, which are not in metrics.jsonl"),
        (lambda worker: Profile().write(worker), "no steps in it"),
        (lambda worker: tpu_worker(700).write(worker).write_bytes(b"no"), "cut short"),
        (lambda worker: tpu_worker(700, steps=3).write(worker), "2 whole steps, at least 3"),
    ],
)
def test_a_profile_that_says_nothing_leaves_the_host_clock(
    run: Run, spoil: Callable[[Path], Any], note: str
) -> None:
    spoil(run.path / "workers/worker-0")
    report = build(run.path)
    assert (report["step_time_s"]["source"], report["step_time_s"]["p50"]) == ("host_clock", 3.5)
    assert (report["split_s"], report["operations"]) == (None, [])
    assert [note in it for it in report["notes"]] == [True]


def test_expert_load_is_the_mean_of_the_last_epoch(run: Run) -> None:
    run.steps("worker-0", expert_load=[0.5, 0.25, 0.25, 0.0], router_entropy=1.25)
    assert build(run.path)["expert_load"] == {
        "fractions": [0.5, 0.25, 0.25, 0.0],
        "max_over_mean": 2.0,
        "router_entropy": 1.25,
    }


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({}, True),
        ({"accelerator_type": "v5p-16"}, False),
        ({"experts": "static"}, False),
        ({"global_batch": 16}, False),
        ({"model_flops": 2e10}, False),
        ({"spmd_2d_sharding": 2}, False),
        ({"flash_attention": False}, False),
    ],
)
def test_the_plan_of_the_same_step_stands_beside_what_was_measured(
    run: Run, tmp_path: Path, changes: dict[str, Any], found: bool
) -> None:
    plan = {
        "accelerator_type": "v5p-8",
        "chips": 4,
        "experts": "gmm",
        "flash_attention": True,
        "spmd_2d_sharding": 0,
        "global_batch": 8,
        "block_size": 100,
        "model_flops": 5e7 * 8 * 100 / 4,
    }
    variables = {
        "train_accelerator_type": "v5p-8",
        "train_flash_attention": True,
        "train_spmd_2d_sharding": 0,
        "train_plans_dir": str(tmp_path / "plans"),
    }
    (run.path / "variables.yml").write_text(json.dumps(variables))
    (tmp_path / "plans/broken").mkdir(parents=True)
    (tmp_path / "plans/broken/plan.json").write_text('{"accelerator_')
    (tmp_path / "plans/v5p-8-0123").mkdir()
    (tmp_path / "plans/v5p-8-0123/plan.json").write_text(json.dumps(plan | changes))
    assert build(run.path)["plan"] == (plan if found else None)


def test_before_the_first_epoch_is_full_the_last_half_of_the_steps_counts(run: Run) -> None:
    run.steps("worker-0", count=2)
    assert build(run.path)["loss"]["bits_per_byte"] == pytest.approx(7.0 / (4.0 * math.log(2)))


def test_too_few_steps_say_nothing_about_time(run: Run) -> None:
    run.steps("worker-0", count=4)
    report = build(run.path)
    assert report["step_time_s"].items() >= {"p50": None, "p90": None, "n": 2}.items()
    assert (report["tokens_per_s_per_device"], report["mfu"]) == (None, None)
    assert any("2 steps after the last compilation" in note for note in report["notes"])


def test_where_nothing_had_to_be_compiled_every_step_counts(run: Run) -> None:
    compiled = {"count": 0, "cached": 0, "seconds": 0.0, "last_step": None}
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
        (
            [
                {"exit_code": 143, "signal": "SIGTERM", "error": "stopped, because w1 failed"},
                {"exit_code": 143, "signal": "SIGTERM", "error": "its Docker engine was restarted"},
            ],
            "failed",
            ["stopped", "failed"],
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
        "source": "host_clock",
        "split_s": None,
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


def test_the_command_needs_no_torch_and_follows_links(run: Run) -> None:
    latest = run.path.parent / "latest"
    latest.symlink_to(run.path.name)
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from report.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    subprocess.run([sys.executable, "-c", program, str(latest)], cwd=ROOT, check=True)
    assert json.loads((run.path / "report.json").read_text())["run_id"] == run.path.name
    assert run.path.name in (run.path / "report.html").read_text()


def test_whatever_is_missing_there_is_a_page(run: Run) -> None:
    page = run.path / "report.html"
    (run.path / "workers/worker-0/metrics.jsonl").write_text("")
    assert main([str(run.path)]) == 0
    assert "0 steps after the last compilation" in page.read_text()
    for path in (run.path / "workers/worker-0").iterdir():
        path.unlink()
    assert main([str(run.path)]) == 0
    assert "worker-0: summary.json is missing" in page.read_text()
    (run.path / "workers/worker-0").rmdir()
    assert main([str(run.path)]) == 0


def test_runs_are_compared_by_what_differs_and_named_apart(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Run(tmp_path / "elsewhere" / run.path.name)
    (run.path / "variables.yml").write_text("train_gmm: true\ntrain_seed: 1\n")
    (other.path / "variables.yml").write_text("train_gmm: false\ntrain_seed: 1\n")
    other.steps("worker-0", times=[2 * time for time in TIMES])
    assert main(["compare", str(run.path), str(other.path)]) == 0
    printed = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[1:] for line in printed.splitlines() if line.strip()}
    # Both have the same id.
    assert str(run.path) in printed
    assert str(other.path) in printed
    assert rows["train_gmm"] == ["True", "False"]
    assert "train_seed" not in rows
    assert rows["ratio"][:2] == ["1", "2.000"]
    assert (run.path.parent / "compare.html").exists()


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
    assert main([]) == 2
    assert main(["compare", str(tmp_path)]) == 2
