"""Compare runs: the settings that differ, then step time, throughput and loss."""

from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from trainer.metrics import LEAST_STEPS

from .html import DASH, from_template, number, over_steps, seconds
from .run_dir import Worker, read_variables, steady

COLORS = ["#4f86d6", "#e2914a", "#62b28d", "#b07cc6", "#d0605e", "#8c8c3a"]
RESAMPLES = 2000
# Variables that differ between any two runs
_ALWAYS_DIFFERENT = ("train_run_id", "train_image_identity", "trainer_image_identity")
Row = tuple[str, list[str]]


def show(run_dirs: list[Path], reports: list[dict[str, Any]], runs: list[list[Worker]]) -> str:
    """Write compare.html beside the first run's directory; return its tables as text.

    ``reports`` and ``runs``, the workers of each run, are in the order of ``run_dirs``. Ratios are
    to the first run.
    """
    labels = [report["run_id"] for report in reports]
    if len(set(labels)) < len(labels):
        labels = [str(path) for path in run_dirs]
    longest = [max(run, key=lambda worker: len(worker.steps), default=None) for run in runs]
    times = [
        [step["step_time_s"] for step in steady(worker.steps, worker.summary)] if worker else []
        for worker in longest
    ]
    different = differences(run_dirs, reports)
    measured = measurements(reports, times)
    page = run_dirs[0].resolve().parent / "compare.html"
    page.write_text(
        from_template(
            "compare.html.j2",
            _figures(labels, [worker.steps if worker else [] for worker in longest], times),
            labels=labels,
            different=different,
            measured=measured,
            colors=COLORS,
        ),
        encoding="utf-8",
    )
    lines = ["differences", *table([("", labels), *(different or [("none", [])])]), ""]
    return "\n".join([*lines, "measured", *table([("", labels), *measured]), "", str(page)])


def differences(run_dirs: list[Path], reports: list[dict[str, Any]]) -> list[Row]:
    """Return the settings that are not equal in all runs, each with its value in every run."""
    settings = []
    for run_dir, report in zip(run_dirs, reports, strict=True):
        ran = {
            f"{part}.{key}": value
            for part in ("model", "mesh", "experts", "attention", "device", "stack")
            for key, value in (report[part] or {}).items()
        }
        settings.append(read_variables(run_dir) | ran)
    names = dict.fromkeys(chain.from_iterable(settings))
    rows = [(name, [str(of_run.get(name, DASH)) for of_run in settings]) for name in names]
    return [row for row in rows if row[0] not in _ALWAYS_DIFFERENT and len(set(row[1])) > 1]


def measurements(reports: list[dict[str, Any]], times: list[list[float]]) -> list[Row]:
    """Return the runs' measurements; ``times`` are the host clock's step times in seconds."""
    step_times = [report["step_time_s"] for report in reports]
    compiles = [report["compile"] or {} for report in reports]
    return [
        ("status", [report["status"] for report in reports]),
        ("step time", [seconds(each["p50"]) for each in step_times]),
        (
            "measured by",
            [f"{each['source'].replace('_', ' ')}, {each['n']} steps" for each in step_times],
        ),
        ("step time, host clock", [seconds(report["host_clock_s"]["p50"]) for report in reports]),
        (
            "ratio",
            [_ratio(times[0], run) if run is not times[0] else "1" for run in times],
        ),
        (
            "tokens/s/device",
            [number(report["tokens_per_s_per_device"], ",.0f") for report in reports],
        ),
        ("MFU", [number(report["mfu"], ".1%") for report in reports]),
        ("last loss", [number(report["loss"]["last"], ".4f") for report in reports]),
        ("bits per byte", [number(report["loss"]["bits_per_byte"], ".3f") for report in reports]),
        (
            "compilations",
            [f"{number(each.get('count'))}, {seconds(each.get('seconds'))}" for each in compiles],
        ),
    ]


def ratio(base: list[float], other: list[float]) -> tuple[float, float, float] | None:
    """Return the ratio of the median steps, ``other`` to ``base``, and its 95 % interval.

    The interval is that of the bootstrap: 95 % of the ratios lie in it when the steps are resampled
    (Efron 1979). None where a run has too few steps.
    """
    if min(len(base), len(other)) < LEAST_STEPS:
        return None
    generator = np.random.default_rng(0)
    medians = [
        np.median(generator.choice(times, (RESAMPLES, len(times))), axis=1)
        for times in (np.array(other), np.array(base))
    ]
    low, high = np.quantile(medians[0] / medians[1], [0.025, 0.975])
    return float(np.median(other) / np.median(base)), float(low), float(high)


def table(rows: list[Row]) -> list[str]:
    """Return rows as lines of text with aligned columns."""
    cells = [[label, *values] for label, values in rows]
    columns = max(len(row) for row in cells)
    widths = [max(len(row[i]) for row in cells if i < len(row)) for i in range(columns)]
    return ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in cells]


def _ratio(base: list[float], other: list[float]) -> str:
    found = ratio(base, other)
    return f"{found[0]:.3f} ({found[1]:.3f}–{found[2]:.3f})" if found else DASH


def _figures(
    labels: list[str], steps: list[list[dict[str, Any]]], times: list[list[float]]
) -> dict[str, Any]:
    """Return two figures, of the step times and of the losses of all runs."""
    colors = [COLORS[number % len(COLORS)] for number in range(len(labels))]
    loss = over_steps([], "loss", "loss, nats a token")
    loss["data"] = []
    spread = over_steps([], "step_time_s", "seconds, host clock")
    spread["data"] = []
    del spread["layout"]["xaxis"]["title"]
    for label, color, run_steps, run_times in zip(labels, colors, steps, times, strict=True):
        line = over_steps(run_steps, "loss", "")["data"][0]
        line["hovertemplate"] = f"{label}, step %{{x}}: %{{y}}<extra></extra>"
        loss["data"].append(line | {"line": {"color": color, "width": 2}})
        box = {"type": "box", "name": label, "y": run_times, "boxpoints": "outliers"}
        spread["data"].append(box | {"marker": {"color": color, "size": 3}})
    return {"loss": loss, "step_time": spread}
