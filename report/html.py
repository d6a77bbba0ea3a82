"""report.html: the numbers of report.json as a page, one file that opens offline."""

from pathlib import Path
from typing import Any

import jinja2
import plotly.io
from plotly.offline import get_plotlyjs

from .run_dir import Worker, read_variables

# The parts of a step's time, each with a color that is legible on white and on black
PARTS = {
    "compute": "#4f86d6",
    "communication": "#e2914a",
    "input": "#62b28d",
    "idle": "#a3a9b5",
}
LINE, ACCENT = PARTS["compute"], PARTS["communication"]
MOST_POINTS = 2000  # in a line; of a longer run every n-th step is drawn
FEW_POINTS = 50  # up to here every point has a marker
DASH = "\N{EN DASH}"
SOURCES = {
    "device_trace": "device trace",
    "step_markers": "step markers of the trace",
    "host_clock": "host clock",
}

_AXIS = {"automargin": True, "zeroline": False, "fixedrange": True}
_LAYOUT = {
    "margin": {"l": 8, "r": 8, "t": 8, "b": 8},
    "paper_bgcolor": "rgba(0,0,0,0)",
    "plot_bgcolor": "rgba(0,0,0,0)",
    "font": {"family": "inherit", "size": 13},
    "hovermode": "closest",
    "dragmode": False,
    "showlegend": False,
    "height": 260,
}
Figure = dict[str, Any]


def render(run_dir: Path, report: dict[str, Any], workers: list[Worker]) -> str:
    """Return the page of a run as HTML, from its report and its workers' files."""
    longest = max(workers, key=lambda worker: len(worker.steps), default=None)
    steps = longest.steps if longest else []
    return from_template(
        "report.html.j2",
        _figures(report, steps, longest),
        report=report,
        parts=PARTS,
        source=SOURCES[report["step_time_s"]["source"]],
        variables=read_variables(run_dir),
    )


def from_template(name: str, figures: dict[str, Figure], **values: Any) -> str:
    """Return a rendered template, with ``figures`` by name and the library that draws figures."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "count": count,
        "number": number,
        "seconds": seconds,
        "size": size,
    }
    return environment.get_template(name).render(
        figures={name: _html(name, figure) for name, figure in figures.items()},
        plotly_js=get_plotlyjs(),
        **values,
    )


def number(value: Any, form: str = "") -> str:
    """Return ``value`` in the format ``form``; a dash for None."""
    return DASH if value is None else format(value, form)


def seconds(value: float | None) -> str:
    """Return a duration to four digits, in s, ms or µs; a dash for None."""
    if value is None:
        return DASH
    factor, unit = (1.0, "s") if value >= 1 else (1e3, "ms") if value >= 1e-3 else (1e6, "µs")
    return f"{value * factor:#.4g}".rstrip(".") + f" {unit}"


def count(value: float) -> str:
    """Return a number of parameters in millions or billions."""
    return f"{value / 1e9:,.2f} B" if value >= 1e9 else f"{value / 1e6:,.1f} M"


def size(value: float | None) -> str:
    """Return a number of bytes in GiB; a dash for None."""
    return DASH if value is None else f"{value / 2**30:.2f} GiB"


def _figures(
    report: dict[str, Any], steps: list[dict[str, Any]], longest: Worker | None
) -> dict[str, Figure]:
    """Return the figures whose data the run has, by name."""
    figures = {}
    if steps:
        figures["loss"] = over_steps(steps, "loss", "loss, nats a token")
        figures["step_time"] = _step_times(steps, report, longest)
    rows = [row for row in report["workers"] if row["split_s"]]
    if rows:
        figures["split"] = _split(rows)
    if report["skew"]:
        figures["skew"] = _bars(report["skew"]["own_time_s"], "seconds outside collectives")
    if report["expert_load"]:
        figures["expert_load"] = _expert_load(report["expert_load"]["fractions"])
    return figures


def over_steps(steps: list[dict[str, Any]], key: str, title: str) -> Figure:
    """Return a figure of the values of ``key`` in metrics.jsonl over the steps."""
    shown = steps[:: max(1, -(-len(steps) // MOST_POINTS))]
    line = {
        "type": "scatter",
        "mode": "lines" if len(shown) > FEW_POINTS else "lines+markers",
        "x": [step["step"] for step in shown],
        "y": [_short(step[key]) for step in shown],
        "line": {"color": LINE, "width": 2},
        "hovertemplate": "step %{x}: %{y}<extra></extra>",
    }
    return {
        "data": [line],
        "layout": _LAYOUT | {"xaxis": _axis("step"), "yaxis": _axis(title)},
    }


def _step_times(
    steps: list[dict[str, Any]], report: dict[str, Any], longest: Worker | None
) -> Figure:
    """Return a figure of the host clock's step times, cut off above leaving out compilations."""
    figure = over_steps(steps, "step_time_s", "seconds")
    layout, trace = figure["layout"], longest.trace if longest else {}
    shapes = []
    if trace.get("steps"):
        first, last = trace["steps"]
        band = {"type": "rect", "yref": "paper", "y0": 0, "y1": 1, "line": {"width": 0}}
        shapes.append(band | {"x0": first - 0.5, "x1": last + 0.5, "fillcolor": f"{ACCENT}33"})
    if p50 := report["step_time_s"]["p50"]:
        line = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": p50, "y1": p50}
        shapes.append(line | {"line": {"color": ACCENT, "width": 1.5, "dash": "dot"}})
        highest = max(p50, report["host_clock_s"]["p90"] or 0.0)
        layout["yaxis"] = layout["yaxis"] | {"range": [0, 1.5 * highest]}
    else:
        layout["yaxis"] = layout["yaxis"] | {"rangemode": "tozero"}
    layout["shapes"] = shapes
    return figure


def _split(rows: list[dict[str, Any]]) -> Figure:
    """Return a figure with a bar for each worker, divided into the parts of a step."""
    hosts = [row["host"] for row in rows]
    bars = [
        {
            "type": "bar",
            "orientation": "h",
            "name": part,
            "y": hosts,
            "x": [_short(row["split_s"][part]) for row in rows],
            "marker": {"color": color},
            "hovertemplate": f"%{{y}}, {part}: %{{x:.4g}} s<extra></extra>",
        }
        for part, color in PARTS.items()
        if any(row["split_s"][part] is not None for row in rows)
    ]
    layout = _LAYOUT | {
        "barmode": "stack",
        "bargap": 0.35,
        "height": 70 + 34 * len(rows),
        "xaxis": _axis("seconds of a step"),
        "yaxis": _AXIS | {"type": "category", "autorange": "reversed"},
    }
    return {"data": bars, "layout": layout}


def _bars(values: dict[str, float], title: str) -> Figure:
    """Return a figure with a bar for each of ``values``, the largest first and highlighted."""
    order = sorted(values, key=values.__getitem__, reverse=True)
    bar = {
        "type": "bar",
        "orientation": "h",
        "y": order,
        "x": [_short(values[key]) for key in order],
        "marker": {"color": [ACCENT] + [LINE] * (len(order) - 1)},
        "hovertemplate": "%{y}: %{x:.4g}<extra></extra>",
    }
    layout = _LAYOUT | {
        "bargap": 0.35,
        "height": 70 + 34 * len(order),
        "xaxis": _axis(title),
        "yaxis": _AXIS | {"type": "category", "autorange": "reversed"},
    }
    return {"data": [bar], "layout": layout}


def _expert_load(fractions: list[float]) -> Figure:
    """Return a figure of each expert's share of the tokens, with a line at the equal share."""
    mean = sum(fractions) / len(fractions)
    bar = {
        "type": "bar",
        "x": list(range(len(fractions))),
        "y": [_short(fraction) for fraction in fractions],
        "marker": {"color": LINE},
        "hovertemplate": "expert %{x}: %{y:.2%}<extra></extra>",
    }
    even = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": mean, "y1": mean}
    layout = _LAYOUT | {
        "bargap": 0.3,
        "height": 220,
        "xaxis": _axis("expert") | {"dtick": max(1, len(fractions) // 16)},
        "yaxis": _axis("share of the tokens") | {"tickformat": ".0%", "rangemode": "tozero"},
        "shapes": [even | {"line": {"color": ACCENT, "width": 1.5, "dash": "dot"}}],
    }
    return {"data": [bar], "layout": layout}


def _axis(title: str) -> dict[str, Any]:
    return _AXIS | {"title": {"text": title, "standoff": 8}}


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")


def _html(name: str, figure: Figure) -> str:
    """Return a figure as HTML without the drawing library, which the page contains once."""
    return plotly.io.to_html(
        figure,
        config={"displayModeBar": False, "responsive": True},
        include_plotlyjs=False,
        full_html=False,
        div_id=f"figure-{name}",
        validate=False,
    )
