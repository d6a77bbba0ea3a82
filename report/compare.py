"""Runs side by side: first in what they differ, then how fast they were."""

from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from report.html import DASH, from_template, number, over_steps, seconds
from report.run_dir import Worker, read_variables, steady
from trainer.metrics import LEAST_STEPS

COLORS = ["#4f86d6", "#e2914a", "#62b28d", "#b07cc6", "#d0605e", "#8c8c3a"]
RESAMPLES = 2000
# What is another in every run, and changes nothing
_OF_ONE_RUN = ("train_run_id", "train_image_identity", "trainer_image_identity")
Row = tuple[str, list[str]]


def show(run_dirs: list[Path], reports: list[dict[str, Any]], runs: list[list[Worker]]) -> str:
    """Write compare.html beside the first run; return the same tables as text.

    ``reports`` and ``runs``, their workers, are in the order of ``run_dirs``. Ratios are to the
    first run.
    """
    labels = [report["run_id"] for report in reports]
    if len(set(labels)) < len(labels):
        labels = [str(path) for path in run_dirs]
    longest = [max(them, key=lambda it: len(it.steps), default=None) for them in runs]
    times = [
        [step["step_time_s"] for step in steady(it.steps, it.summary)] if it else []
        for it in longest
    ]
    different = differences(run_dirs, reports)
    measured = measurements(reports, times)
    page = run_dirs[0].resolve().parent / "compare.html"
    page.write_text(
        from_template(
            "compare.html.j2",
            _figures(labels, [it.steps if it else [] for it in longest], times),
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
    """Return the settings that are not the same in all runs, each with its value in every run."""
    settings = []
    for run_dir, report in zip(run_dirs, reports, strict=True):
        ran = {
            f"{part}.{key}": value
            for part in ("model", "mesh", "experts", "attention", "device", "stack")
            for key, value in (report[part] or {}).items()
        }
        settings.append(read_variables(run_dir) | ran)
    names = dict.fromkeys(chain.from_iterable(settings))
    rows = [(name, [str(it.get(name, DASH)) for it in settings]) for name in names]
    return [row for row in rows if row[0] not in _OF_ONE_RUN and len(set(row[1])) > 1]


def measurements(reports: list[dict[str, Any]], times: list[list[float]]) -> list[Row]:
    """Return what the runs measured; ``times`` are the steps of each by the host clock, in s."""
    step_times = [report["step_time_s"] for report in reports]
    compiles = [report["compile"] or {} for report in reports]
    return [
        ("status", [report["status"] for report in reports]),
        ("step time", [seconds(it["p50"]) for it in step_times]),
        ("by", [f"{it['source'].replace('_', ' ')}, {it['n']} steps" for it in step_times]),
        ("host clock", [seconds(report["host_clock_s"]["p50"]) for report in reports]),
        ("ratio", [_ratio(times[0], it) if it is not times[0] else "1" for it in times]),
        (
            "tokens/s/device",
            [number(report["tokens_per_s_per_device"], ",.0f") for report in reports],
        ),
        ("MFU", [number(report["mfu"], ".1%") for report in reports]),
        ("last loss", [number(report["loss"]["last"], ".4f") for report in reports]),
        ("bits per byte", [number(report["loss"]["bits_per_byte"], ".3f") for report in reports]),
        (
            "compilations",
            [f"{number(it.get('count'))}, {seconds(it.get('seconds'))}" for it in compiles],
        ),
    ]


def ratio(base: list[float], other: list[float]) -> tuple[float, float, float] | None:
    """Return the ratio of the medians, ``other`` to ``base``, and the ends of where it lies.

    Between them are 95 % of the ratios of runs resampled from these steps (Efron 1979). None where
    a run has too few steps.
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
    """Return rows as lines whose columns stand one below the other."""
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
    """Return the step times and the losses of all runs, in one figure each."""
    colors = [COLORS[number % len(COLORS)] for number in range(len(labels))]
    loss = over_steps([], "loss", "loss, nats a token")
    loss["data"] = []
    spread = over_steps([], "step_time_s", "seconds, host clock")
    spread["data"] = []
    del spread["layout"]["xaxis"]["title"]
    for label, color, its_steps, its_times in zip(labels, colors, steps, times, strict=True):
        line = over_steps(its_steps, "loss", "")["data"][0]
        line["hovertemplate"] = f"{label}, step %{{x}}: %{{y}}<extra></extra>"
        loss["data"].append(line | {"line": {"color": color, "width": 2}})
        box = {"type": "box", "name": label, "y": its_times, "boxpoints": "outliers"}
        spread["data"].append(box | {"marker": {"color": color, "size": 3}})
    return {"loss": loss, "step_time": spread}
