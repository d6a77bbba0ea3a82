"""plan.json as a table to read: what ``python -m trainer.plan`` prints and writes as plan.txt."""

from collections.abc import Iterator
from typing import Any

from ..tpu import GIB

Row = tuple[str, str]


def table(plan: dict[str, Any]) -> str:
    """Return ``plan``, the content of plan.json, as text: the verdict and a row for each number."""
    rows = [*_configuration(plan), *_memory(plan), *_work(plan)]
    if plan["compile_seconds"]:
        seconds = f"{plan['trace_seconds']:.1f} s, compiled in {plan['compile_seconds']:.0f} s"
        memory = f"{plan['compiler_memory_gib']} GiB of this host's memory"
        rows.append(("traced in", f"{seconds}, with {memory}"))
    if plan["fits"] is None:
        rows.append(("error", plan["error"][:2000]))
    rows += [("what to change", text) for text in plan.get("what_to_change", ())]
    verdict = {True: "fits", False: "DOES NOT FIT", None: "DOES NOT COMPILE"}[plan["fits"]]
    return "\n".join([f"PLAN: {verdict}", *(f"  {name:16} {text}" for name, text in rows)])


def _configuration(plan: dict[str, Any]) -> Iterator[Row]:
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
    recomputed = plan["recomputed_flops_per_chip"] / plan["model_flops"]
    flops = f"{plan['flops_per_chip'] / 1e12:,.1f} T"
    yield "FLOPs per chip", f"{flops}, {ratio:.3f}x the model FLOPs"
    yield "", f"{recomputed:.3f}x recomputed in backward, {ratio - recomputed:.3f}x all else"
    yield "Pallas calls", str(plan["pallas_calls"])
    yield "rematerialised", f"{plan['rematerialised_by_compiler']} instructions, by the compiler"
    for total in plan["collectives"]:
        where = "in the layers" if total["in_layers"] else "outside the layers"
        what = f"{total['count']:5} {total['kind']:14} {total['moves']:11}"
        yield "collectives", f"{what} {total['bytes_per_chip'] / GIB:9.3f} GiB {where}"
    modelled = plan["modelled"]
    for name, times in (
        ("modelled step", modelled),
        ("kernels at 75 %", modelled["with_kernels_at_75_percent"]),
    ):
        overlapped = f"{times['step_time_overlapped_s']:.2f} s if collectives overlap"
        seconds = f"{overlapped}, {times['step_time_s']:.2f} s if not"
        yield name, f"{seconds}; MFU {times['mfu']:.1%} (modelled, not measured)"
