"""Trace the training step and compile it for a TPU slice, on a machine without a TPU.

    python -m trainer.plan.compile RESULT ACCELERATOR_TYPE TOPOLOGY SLICES <the trainer's flags>

writes the measurements that ``trainer.plan`` needs, as JSON, to the file RESULT. ``trainer.plan``
runs it in a process of its own, because libtpu may abort the process instead of raising.

This process has one CPU device and no weights: parameters, moments and tokens are placeholders,
shapes without data. torch_xla keeps a tensor's sharding with its data, so the shardings of the
placeholders are written on the traced program's arguments instead. libtpu contains the TPU's
compiler, which needs no TPU.
"""

import json
import math
import os
import re
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import tpu
from ..arguments import Arguments
from ..tpu import CHIPS, Chip, Slice, parse_slice, topology_of
from ..validation import parse
from . import hlo

# libtpu knows the TPU as a topology only: neither JAX nor libtpu may look for a real one.
ENVIRONMENT = {
    "PJRT_DEVICE": "CPU",
    "CPU_NUM_DEVICES": "1",
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclass(frozen=True)
class Lowered:
    """A traced step, ready for the compiler."""

    module: str  # MLIR (StableHLO), with shardings
    weight_bytes: int  # on one chip
    optimizer_bytes: int  # on one chip
    weights: frozenset[tuple[int, ...]]  # the shapes of the weights after the all-gather over fsdp
    trace_seconds: float  # without the imports


def trace_for(slice_: Slice) -> None:
    """Make torch_xla and JAX trace as on ``slice_``. This process can run nothing afterwards."""
    import torch
    import torch_xla
    import torch_xla.runtime as xr
    from jax._src import stages

    xr.use_spmd()
    torch.zeros(1).to(torch_xla.device()).cpu()  # XLA's client must exist before any backward
    # The trainer must choose the TPU's kernels, and JAX lower them for TPU.
    xr.device_type = lambda: "TPU"
    tpu.current_chip = lambda: slice_.chip
    lower = stages.Traced.lower
    stages.Traced.lower = lambda self, **_: lower(self, lowering_platforms=("tpu",))
    coordinates = [{"coords": list(device.coords)} for device in topology(slice_)]
    xr.global_runtime_device_count = lambda: slice_.chips
    xr.global_runtime_device_attributes = lambda: coordinates


def trace(arguments: Arguments, slice_: Slice) -> Lowered:
    """Return the training step as traced for ``slice_``: forward, backward, clipping and update."""
    import torch
    import torch_xla
    from jaxlib import _jax

    trace_for(slice_)

    from .. import model, sharding
    from ..step import StepOptions, TrainStep, build_model

    began = time.monotonic()
    options = StepOptions.from_arguments(arguments)
    mixtral = build_model(arguments.config, options, devices=slice_.chips, slices=slice_.slices)

    def placeholder(_: str, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.empty(shape, device="meta")

    sharding.placeholders.clear()
    model.load(mixtral, placeholder)
    train_step = TrainStep(options, mixtral, placeholder)

    def batch(dtype: torch.dtype) -> torch.Tensor:
        shape = (arguments.training.global_batch, arguments.data.block_size)
        empty = torch.empty(shape, dtype=dtype, device="meta")
        return sharding.to_mesh(empty, sharding.BATCH_SHARDING)

    rates = torch.tensor([1e-3, 0.5]).to(torch_xla.device())
    torch_xla._XLAC._set_xla_all_numbers_special_scalars(True)  # as the training loop does

    parameters, moments = list(mixtral.parameters()), list(train_step.optimizer.state.values())
    before = [tensor.detach().clone() for tensor in (*parameters, *moments)]
    tokens = batch(torch.int64)
    segments = batch(torch.int32) if options.isolate_documents else None
    measured = train_step(tokens, segments, rates[0], rates[1])
    context = torch_xla._XLAC.lowering.LoweringContext("train_step")
    context.build([measured, *(tensor.detach() for tensor in (*parameters, *moments))])
    specs = {context.tensor_parameter_id(leaf): spec for leaf, spec in sharding.placeholders}
    updated = [context.tensor_parameter_id(leaf) for leaf in before]
    module = _jax.mlir.xla_computation_to_mlir_module(_jax.XlaComputation(context.hlo()))

    def bytes_per_chip(tensors: Sequence[torch.Tensor], indices: Sequence[int]) -> int:
        pairs = zip(tensors, indices, strict=True)
        return sum(one.nbytes // sharding.parts(specs[index]) for one, index in pairs)

    shapes = {
        tuple(
            size // (options.tensor_devices if axis == sharding.TENSOR else 1)
            for size, axis in zip(one.shape, sharding.partition_spec(name), strict=True)
        )
        for name, one in mixtral.named_parameters()
    }
    return Lowered(
        _with_shardings(module, {i: _hlo_sharding(spec) for i, spec in specs.items()}, updated),
        bytes_per_chip(parameters, updated[: len(parameters)]),
        bytes_per_chip(moments, updated[len(parameters) :]),
        frozenset(shapes),
        time.monotonic() - began,
    )


def _hlo_sharding(spec: tuple) -> str:
    """Return ``spec`` on the global mesh, in XLA's notation of shardings."""
    import torch_xla.distributed.spmd as xs

    from ..sharding import AXES, size

    split = [(axes,) if isinstance(axes, str) else axes or () for axes in spec]
    named = [axis for axes in split for axis in axes]
    rest = [axis for axis in AXES if axis not in named]
    tiles = [math.prod(size(axis) for axis in axes) for axes in (*split, rest)]
    devices = xs.get_global_mesh().get_logical_mesh()
    devices = devices.transpose([AXES.index(axis) for axis in (*named, *rest)]).ravel()
    shape, order = (",".join(map(str, numbers)) for numbers in (tiles, devices))
    return f"{{devices=[{shape}]{order} last_tile_dim_replicate}}"


def _with_shardings(module: str, shardings: dict[int, str], updated: list[int]) -> str:
    """Return ``module`` with shardings on its arguments and results.

    ``shardings`` are by the argument's index. The results after the first are the updated weights
    and moments; ``updated`` are the indices of the arguments whose memory they reuse.
    """
    from jax._src.interpreters import mlir
    from jaxlib.mlir import ir

    with mlir.make_ir_context():
        parsed = ir.Module.parse(module)
        main = next(op for op in parsed.body.operations if op.name.value == "main")
        replaced = {argument: 1 + index for index, argument in enumerate(updated)}
        arguments = []
        for index, old in enumerate(main.arg_attrs):
            attributes = {named.name: named.attr for named in old}
            if index in shardings:
                attributes["mhlo.sharding"] = ir.StringAttr.get(shardings[index])
            if index in replaced:
                attributes["tf.aliasing_output"] = ir.IntegerAttr.get(
                    ir.IntegerType.get_signless(32), replaced[index]
                )
            arguments.append(ir.DictAttr.get(attributes))
        main.arg_attrs = ir.ArrayAttr.get(arguments)
        results = ["{replicated}", *(shardings[index] for index in updated)]
        main.result_attrs = ir.ArrayAttr.get(
            [ir.DictAttr.get({"mhlo.sharding": ir.StringAttr.get(name)}) for name in results]
        )
        return str(parsed)


def compile_(module: str, slice_: Slice) -> Any:
    """Return the loaded executable of ``module`` for ``slice_``."""
    from jax._src import compiler
    from jaxlib import _jax

    devices = topology(slice_)
    options = compiler.get_compile_options(
        num_replicas=1,
        num_partitions=len(devices),
        device_assignment=np.array([[device.id for device in devices]]),
        use_spmd_partitioning=True,
    )
    return devices[0].client.compile(module.encode(), _jax.DeviceList(tuple(devices)), options)


def topology(slice_: Slice) -> list:
    """Return libtpu's description of the slice's devices, ordered by id; needs no TPU."""
    from jax.experimental.topologies import get_topology_desc

    name = f"{slice_.chip.libtpu_name}:{'x'.join(map(str, slice_.topology))}"
    options: dict[str, Any] = {}
    if slice_.chip.libtpu_chip_config:
        options["chip_config_name"] = slice_.chip.libtpu_chip_config
    if math.prod(slice_.topology) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    if slice_.slices > 1:
        options["num_slices"] = slice_.slices
    devices = get_topology_desc(platform="tpu", topology_name=name, **options).devices
    return sorted(devices, key=lambda device: device.id)


def compiles_for(chip: Chip) -> bool:
    """Whether the installed libtpu can compile for ``chip``."""
    try:
        topology(Slice(chip, topology_of(chip, 4)))
    except Exception:  # XlaRuntimeError, whose module depends on jaxlib's version
        return False
    return True


def measure(arguments: Arguments, slice_: Slice) -> dict[str, Any]:
    """Trace and compile the step; return its memory, work and collectives, or the error.

    A step that does not compile has the compiler's message as ``error``, and ``hbm_bytes``, the
    memory that the step would need, only if it ran out of HBM.
    """
    lowered = trace(arguments, slice_)
    layers = arguments.config["num_hidden_layers"]
    kernels, products = hlo.lowered_work(lowered.module, layers, slice_.chips)
    result = {
        "trace_seconds": lowered.trace_seconds,
        "weight_bytes": lowered.weight_bytes,
        "optimizer_bytes": lowered.optimizer_bytes,
        "kernels": [asdict(kernel) for kernel in kernels],
        "products": products,
    }
    try:
        began = time.monotonic()
        executable = compile_(lowered.module, slice_)
    except Exception as error:  # XlaRuntimeError: its text is all that the compiler reports
        used = re.search(
            r"Ran out of memory in memory space hbm\. Used ([\d.]+)([GMK])", str(error)
        )
        if used:
            unit = {"G": 2**30, "M": 2**20, "K": 2**10}[used[2]]
            result["hbm_bytes"] = float(used[1]) * unit
        return result | {"error": str(error)}
    seconds = time.monotonic() - began
    memory = executable.get_compiled_memory_stats()
    text = executable.hlo_modules()[0].to_string()
    compiled = hlo.Compiled(text, layers)
    tensor = arguments.model.tensor_devices
    sizes = hlo.Sizes(
        arguments.training.per_device_train_batch_size * tensor // slice_.chips,
        arguments.data.block_size,
        lowered.weights,
        tensor,
    )
    return result | {
        "compile_seconds": seconds,
        "hbm_bytes": memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes,
        "program_bytes": memory.generated_code_size_in_bytes,
        "collectives": [asdict(each) for each in compiled.collectives(lowered.module, sizes)],
        "cycles": compiled.cycles(),
        "unestimated_bytes": compiled.unestimated_bytes(),
        "pallas_calls": compiled.pallas_calls(),
        "rematerialised": compiled.rematerialised(),
        "host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def main(argv: list[str]) -> None:
    """Run the command line ``argv``, without the program's name."""
    os.environ |= ENVIRONMENT
    result, accelerator_type, topology_, slices, *flags = argv
    slice_ = parse_slice(accelerator_type, topology_, int(slices))
    supported = [chip.name for chip in CHIPS.values() if compiles_for(chip)]
    measured = {"supported_chips": supported}
    if slice_.chip.name in supported:
        measured = measure(parse(flags), slice_)
    Path(result).write_text(json.dumps(measured), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
