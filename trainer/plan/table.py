"""A plan as a table for a person."""

from collections.abc import Iterator
from typing import Any

from trainer.tpu import GIB

Row = tuple[str, str]


def table(plan: dict[str, Any]) -> str:
    """Return ``plan`` for a person."""
    rows = [*_asked(plan), *_memory(plan), *_work(plan)]
    if plan["compile_seconds"]:
        took = f"{plan['trace_seconds']:.1f} s, compiled in {plan['compile_seconds']:.0f} s"
        rows.append(("traced in", f"{took}, with {plan['compiler_memory_gib']} GiB on this host"))
    if plan["fits"] is None:
        rows.append(("error", plan["error"][:2000]))
    rows += [("change", text) for text in plan.get("what_to_change", ())]
    said = {True: "fits", False: "DOES NOT FIT", None: "DOES NOT COMPILE"}[plan["fits"]]
    return "\n".join([f"PLAN: {said}", *(f"  {name:16} {text}" for name, text in rows)])


def _asked(plan: dict[str, Any]) -> Iterator[Row]:
    count = f"{plan['slices']} x " if plan["slices"] > 1 else ""
    name = f"{count}{plan['accelerator_type']} ({plan['topology']})"
    yield "slice", f"{name}, {plan['chips']} chips"
    yield "model", f"{plan['model']}, experts {plan['experts']}"
    yield "batch", f"{plan['global_batch']} sequences of {plan['block_size']} tokens"


def _memory(plan: dict[str, Any]) -> Iterator[Row]:
    if memory := plan.get("hbm_per_chip_gib"):
        yield "HBM per chip", f"{memory['total']:.2f} of {memory['limit']:.0f} GiB"
        for name in ("weights", "optimizer", "temporaries", "program"):
            yield "", f"{memory[name]:6.2f} {name}"


def _work(plan: dict[str, Any]) -> Iterator[Row]:
    if "modelled" not in plan:
        return
    ratio = plan["flops_per_chip"] / plan["model_flops"]
    again = plan["recomputed_flops_per_chip"] / plan["model_flops"]
    yield "FLOPs per chip", f"{plan['flops_per_chip'] / 1e12:,.1f} T, {ratio:.3f}x the model's own"
    yield "", f"{again:.3f}x recomputed, {ratio - again:.3f}x all else"
    yield "Pallas calls", str(plan["pallas_calls"])
    yield "rematerialised", f"{plan['rematerialised_by_compiler']} instructions, by the compiler"
    for one in plan["collectives"]:
        where = "in the layers" if one["in_layers"] else "outside"
        size = f"{one['bytes_per_chip'] / GIB:9.3f} GiB"
        yield "collectives", f"{one['count']:5} {one['kind']:14} {one['moves']:11} {size} {where}"
    modelled = plan["modelled"]
    for name, times in (
        ("modelled step", modelled),
        ("kernels at 75 %", modelled["with_kernels_at_75_percent"]),
    ):
        both = f"{times['step_time_overlapped_s']:.2f} s, {times['step_time_s']:.2f} s if nothing"
        yield name, f"{both} overlaps; MFU {times['mfu']:.1%} (modelled, not measured)"
