"""Estimate a step on a slice from its compiled program: memory, work and modelled time.

``trainer.plan.compile`` traces and compiles the step, in a process of its own. Times are modelled,
never measured; docs/plan.md has the formulas and the sources of the constants.
"""

import json
import math
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from .. import metrics
from ..arguments import Arguments
from ..flags import BadInput
from ..tpu import GIB, Chip, Slice, topology_of
from ..validation import check_devices
from . import hlo

KERNEL_EFFICIENCIES = (1.0, 0.75)  # of the chip's peak, assumed of Pallas kernels
# Part of a compiler's message → what to do about the error
REMEDIES = {
    "Unsupported version: expected": "libtpu is older than the kernels that jax writes: install "
    "the libtpu that the stack's lock file pins",
    "memory space vmem": "a kernel's tiles are too large for the chip's VMEM: make TILES in "
    "trainer/grouped_matmul.py, or BLOCK in trainer/attention.py, smaller",
}


def measure(slice_: Slice, flags: list[str]) -> dict[str, Any]:
    """Return what ``trainer.plan.compile`` measures, run in a process that libtpu may abort."""
    with tempfile.TemporaryDirectory() as directory:
        result, log = Path(directory, "result.json"), Path(directory, "log")
        command = [
            *(sys.executable, "-m", "trainer.plan.compile", str(result), slice_.chip.name),
            *("x".join(map(str, slice_.topology)), str(slice_.slices), *flags),
        ]
        with log.open("wb") as output:
            ended = subprocess.run(command, stdout=output, stderr=output, check=False)
        if result.exists():
            return json.loads(result.read_text(encoding="utf-8"))
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    how = f"signal {-ended.returncode}" if ended.returncode < 0 else f"code {ended.returncode}"
    return {"error": "\n".join([f"the compiling process ended with {how}:", *lines[-15:]])}


def verdict(arguments: Arguments, slice_: Slice, measured: dict[str, Any]) -> dict[str, Any]:
    """Return the content of plan.json."""
    config, block = arguments.config, arguments.data.block_size
    batch, chip = arguments.training.global_batch, slice_.chip
    plan = {
        "accelerator_type": chip.accelerator_type(slice_.chips // slice_.slices),
        "topology": "x".join(map(str, slice_.topology)),
        "slices": slice_.slices,
        "chip": chip.name,
        "chips": slice_.chips,
        "model": config.get("_name_or_path") or str(arguments.model.config_name),
        "experts": arguments.model.experts_mode,
        "flash_attention": arguments.model.flash_attention,
        "spmd_2d_sharding": arguments.model.spmd_2d_sharding,
        "global_batch": batch,
        "block_size": block,
        "model_flops": metrics.flops_per_token(config, block) * batch * block / slice_.chips,
        "trace_seconds": measured.get("trace_seconds"),
        "compile_seconds": measured.get("compile_seconds"),
        "compiler_memory_gib": round(measured.get("host_bytes", 0) / GIB, 2) or None,
        "fits": None,
    }
    if used := measured.get("hbm_bytes"):
        plan["fits"] = fits(measured, chip)
        state = measured["weight_bytes"], measured["optimizer_bytes"]
        code = measured.get("program_bytes", 0)
        sizes = (*state, used - sum(state) - code, code, used, chip.hbm_bytes)
        names = ("weights", "optimizer", "temporaries", "program", "total", "limit")
        plan["hbm_per_chip_gib"] = {
            name: round(size / GIB, 3) for name, size in zip(names, sizes, strict=True)
        }
    if "error" in measured:
        plan["error"] = measured["error"]
        remedy = [text for sign, text in REMEDIES.items() if sign in measured["error"]]
        if plan["fits"] is None and remedy:
            plan["what_to_change"] = remedy
        return plan
    kernels = [hlo.Kernel(**kernel) for kernel in measured["kernels"]]
    collectives = [hlo.Collective(**collective) for collective in measured["collectives"]]
    products = {int(loop): count for loop, count in measured["products"].items()}
    plan |= {
        "flops_per_chip": sum(kernel.flops * kernel.times for kernel in kernels)
        + sum(products.values()),
        "recomputed_flops_per_chip": hlo.recomputed(kernels, products),
        "collectives": list(hlo.summary(collectives)),
        "pallas_calls": measured["pallas_calls"],
        "rematerialised_by_compiler": measured["rematerialised"],
    }
    operations: dict[int, float] = defaultdict(float)  # seconds by loop, see model_time
    for loop, count in measured["cycles"].items():
        operations[int(loop)] += count / slice_.chip.clock_hz
    for loop, count in measured["unestimated_bytes"].items():
        operations[int(loop)] += count / slice_.chip.hbm_bytes_per_s
    modelled = [
        model_time(slice_, kernels, collectives, operations, plan["model_flops"], efficiency)
        for efficiency in KERNEL_EFFICIENCIES
    ]
    plan["modelled"] = modelled[0] | {"with_kernels_at_75_percent": modelled[1]}
    return plan


def model_time(
    slice_: Slice,
    kernels: list[hlo.Kernel],
    collectives: list[hlo.Collective],
    operations: dict[int, float],
    model_flops: float,
    efficiency: float,
) -> dict[str, float]:
    """Return the modelled step time in seconds, without and with overlap, and the MFU.

    With overlap, the shorter of computation and communication hides behind the longer, in each loop
    over the layers and outside of them. docs/plan.md has the formula.

    Args:
        operations: seconds of all that is neither a kernel nor a collective, by loop; 0: outside.
        model_flops: of one step on one chip.
        efficiency: the share of the chip's peak that the kernels reach.
    """
    chip = slice_.chip
    computing = defaultdict(float, operations)
    moving: dict[int, float] = defaultdict(float)
    for kernel in kernels:
        compute = kernel.flops / (chip.peak_bf16_flops * efficiency)
        memory = kernel.bytes / chip.hbm_bytes_per_s
        computing[kernel.loop] += kernel.times * max(compute, memory)
    for collective in collectives:
        moving[collective.loop] += collective.times * collective_time(collective, slice_)
    overlapped = sum(max(computing[loop], moving[loop]) for loop in {*computing, *moving})
    return {
        "step_time_s": sum(computing.values()) + sum(moving.values()),
        "step_time_overlapped_s": overlapped,
        "computing_s": sum(computing.values()),
        "collectives_s": sum(moving.values()),
        "mfu": model_flops / (chip.peak_bf16_flops * overlapped),
    }


def collective_time(collective: hlo.Collective, slice_: Slice) -> float:
    """Return the seconds that one execution of a collective takes, alone on the slice's links.

    The members of its group lie along some axes of the torus. Along an axis that is a ring a chip
    receives from both neighbours at once, else from one. In two dimensions, rings are axes of 16
    chips; in three, all axes of a slice made of whole cubes of 4 x 4 x 4, and of no other slice.
    """
    chip, shape = slice_.chip, slice_.topology
    within = math.prod(shape)
    if len({member // within for member in collective.group}) > 1:  # spans slices
        return collective.bytes / (chip.dcn_bytes_per_s)
    # Devices are numbered along x first.
    members = [member % within for member in collective.group]
    places = np.array(np.unravel_index(members, shape[::-1])).T[:, ::-1]
    link = chip.ici_bytes_per_s / (4 * chip.dimensions)  # two links an axis, two directions a link
    cubes = chip.dimensions == 3 and not any(side % 4 for side in shape)
    links = sum(
        2 if cubes or (chip.dimensions == 2 and side == 16) else 1
        for side, along in zip(shape, places.T, strict=True)
        if len(set(along)) > 1
    )
    return collective.bytes / (link * links) if links else 0.0


def what_fits(
    arguments: Arguments, slice_: Slice, flags: list[str], measured: dict[str, Any]
) -> list[str]:
    """Return changes with which the step fits, tried by compiling: batch size or slice.

    Candidates are found by proportion: weights and optimizer state per chip shrink with the number
    of chips, all other memory with the batch, and a tenth of HBM is to stay free. At most two
    batches and two slices are compiled.
    """
    batch, chip = arguments.training.per_device_train_batch_size, slice_.chip
    # The name that the batch was given by: both together are refused.
    also = any(flag.partition("=")[0] == "--global_batch" for flag in flags)
    name = "global_batch" if also else "per_device_train_batch_size"
    rows = slice_.chips // arguments.model.tensor_devices
    room = 0.9 * chip.hbm_bytes
    changes = []
    tried = measured
    for _ in range(2):
        state = tried["weight_bytes"] + tried["optimizer_bytes"]
        used = tried["hbm_bytes"] - tried.get("program_bytes", 0)
        batch = min(int((room - state) // ((used - state) / (batch / rows))) * rows, batch - rows)
        if batch <= 0:
            break
        flag = f"--{name}={batch}"
        tried = measure(slice_, [*flags, flag])
        if fits(tried, chip):
            changes.append(f"{flag} fits this slice: {_of_hbm(tried['hbm_bytes'], chip)}")
        if "hbm_bytes" not in tried or fits(tried, chip):
            break
    larger = []
    used = measured["hbm_bytes"] - measured.get("program_bytes", 0)
    for chips in (count for count in chip.slice_chips if count * slice_.slices > slice_.chips):
        try:
            check_devices(arguments, chips * slice_.slices, slice_.slices, chip)
        except BadInput:
            continue
        if used * slice_.chips / (chips * slice_.slices) <= room:
            larger.append(Slice(chip, topology_of(chip, chips), slice_.slices))
    for other in larger[:2]:
        tried = measure(other, flags)
        if fits(tried, chip):
            changes.append(f"{other} holds this batch: {_of_hbm(tried['hbm_bytes'], chip)}")
            break
    if not arguments.fsdp.activation_checkpointing:
        changes.append(
            "xla_fsdp_grad_ckpt in fsdp_config.json, activation checkpointing, recomputes layers "
            "in backward instead of keeping their activations"
        )
    return changes or [
        f"no smaller batch and no larger slice of {chip.name} that was tried fits; give a smaller "
        "--block_size or another chip"
    ]


def fits(measured: dict[str, Any], chip: Chip) -> bool:
    """Whether a step, as ``trainer.plan.compile`` measured it, compiles and fits a chip's HBM."""
    return "error" not in measured and measured["hbm_bytes"] <= chip.hbm_bytes


def _of_hbm(used: float, chip: Chip) -> str:
    return f"{used / GIB:.2f} of {chip.hbm_bytes / GIB:.0f} GiB"
