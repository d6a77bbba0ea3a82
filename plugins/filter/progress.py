"""Filters that say how far a training run is, from what its trainer writes."""

import json
import statistics
from typing import Any

# What is left is told from so many steps.
RECENT_STEPS = 20


def last_steps(metrics: str) -> list[dict[str, Any]]:
    """Return the newest whole lines of the end of a metrics.jsonl, whose first may be cut."""
    lines = metrics.split("\n")[:-1]
    return [json.loads(line) for line in lines[-RECENT_STEPS:] if line.startswith("{")]


def progress(steps: list[dict[str, Any]], max_steps: int | None) -> str:
    """Return the line that says how far the training is.

    ``steps`` are the newest lines of metrics.jsonl; what is left takes as long as their median.
    """
    step, typical = steps[-1], statistics.median(it["step_time_s"] for it in steps)
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
    """Return a duration as minutes and seconds, from an hour on with the hours."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class FilterModule:
    """Registers the filters."""

    def filters(self) -> dict[str, Any]:
        """Return the filters by name."""
        return {"clock": clock, "last_steps": last_steps, "progress": progress}
