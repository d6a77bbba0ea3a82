"""Filters that describe the progress of a training run from the files that the trainer writes."""

import json
import statistics
from typing import Any

# The remaining time is estimated from so many steps.
RECENT_STEPS = 20


def last_steps(metrics: str) -> list[dict[str, Any]]:
    """Return the last complete lines of ``metrics``, the end of a metrics.jsonl, as dictionaries.

    The first and the last line of ``metrics`` may be incomplete, and are then left out.
    """
    lines = metrics.split("\n")[:-1]
    return [json.loads(line) for line in lines[-RECENT_STEPS:] if line.startswith("{")]


def progress(steps: list[dict[str, Any]], max_steps: int | None) -> str:
    """Return one line about the last of ``steps``: its number, loss, time and tokens a second.

    With ``max_steps`` the line has the remaining time, too, by the median time of ``steps``, which
    are lines of metrics.jsonl.
    """
    step, typical = steps[-1], statistics.median(each["step_time_s"] for each in steps)
    count, loss = step["step"] + 1, step["loss"]
    parts = [
        f"step {count:>{len(str(max_steps))}} of {max_steps}" if max_steps else f"step {count}",
        "loss not finite" if loss is None else f"loss {loss:.4f}",
        f"{step['step_time_s']:.2f} s/step",
        f"{step['tokens_per_s']:,.0f} tokens/s",
    ]
    if max_steps and count < max_steps:
        parts.append(f"{clock((max_steps - count) * typical)} left")
    return "   ".join(parts)


def clock(seconds: float) -> str:
    """Return a duration as minutes and seconds, such as 2:05, and with hours, such as 1:02:05."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class FilterModule:
    """Registers the filters."""

    def filters(self) -> dict[str, Any]:
        """Return the filters by name."""
        return {"last_steps": last_steps, "progress": progress}
