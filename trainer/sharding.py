"""Mesh, partition specs, and the explicit collectives of FSDP and tensor parallelism.

The mesh has three axes. Each slice along ``slice`` has a whole copy of the model (data
parallelism). The batch and every weight are split over ``fsdp``; attention heads and the width of
the experts are split over ``tensor``. ``PARAMETER_SHARDING`` says which dimension of a parameter is
split over which axis.

The decoder layers run in a manual region, where the partitioner places no collectives. There
:func:`gather` all-gathers a layer's weights, and reduce-scatters their gradients in backward.
:func:`copy_to_tensor_parallel` and :func:`reduce_from_tensor_parallel` enclose the part of a layer
that is split over ``tensor``.
"""

import functools
import math
import re
from typing import Any

import numpy as np
import torch
import torch_xla
import torch_xla.core.xla_builder as xb
import torch_xla.core.xla_model as xm
import torch_xla.distributed.spmd as xs
import torch_xla.runtime as xr
from jaxlib._jax.mlir import mlir_module_to_xla_computation

SLICE, FSDP, TENSOR = AXES = ("slice", "fsdp", "tensor")
Groups = tuple[tuple[int, ...], ...]
Spec = tuple[str | tuple[str, ...] | None, ...]
Range = tuple[tuple[int, int], ...]  # (start, stop) along every dimension

# Name pattern → the mesh axis of every dimension; the first match counts. Over fsdp weights are
# split along the hidden size, the one dimension that all of them have; over tensor as in
# Megatron-LM.
PARAMETER_SHARDING: tuple[tuple[str, Spec], ...] = (
    (r"embed_tokens\.weight$", (TENSOR, FSDP)),  # [V, H]
    (r"lm_head\.weight$", (TENSOR, FSDP)),  # [V, H]
    (r"self_attn\.(q|k|v)_proj\.weight$", (TENSOR, FSDP)),  # [heads·D, H]
    (r"self_attn\.o_proj\.weight$", (FSDP, TENSOR)),  # [H, heads·D]
    (r"mlp\.gate\.weight$", (None, FSDP)),  # [E, H]
    (r"mlp\.experts\.(gate|up|down)_proj$", (None, FSDP, TENSOR)),  # [E, H, I]
    (r"norm\.weight$", (FSDP,)),  # [H]
)
BATCH_SHARDING = ((SLICE, FSDP), None)  # [B, T]
HIDDEN_SHARDING = ((SLICE, FSDP), None, None)  # [B, T, H]

# The placeholders of a program that is only traced, each with the spec its data would have: to_mesh
placeholders: list[tuple[torch.Tensor, Spec]] = []


def partition_spec(name: str) -> Spec:
    """Return the mesh axis of every dimension of the parameter ``name``.

    Raises KeyError for a parameter that PARAMETER_SHARDING does not name: a new parameter must not
    be replicated by accident.
    """
    for pattern, spec in PARAMETER_SHARDING:
        if re.search(pattern, name):
            return spec
    raise KeyError(f"no row of PARAMETER_SHARDING matches the parameter {name!r}")


def make_mesh(
    devices: int, *, tensor: int = 1, slices: int = 1, planes: tuple[int, int] | None = None
) -> xs.Mesh:
    """Return the mesh over all ``devices``, and make it the global one.

    The size of ``fsdp`` is ``devices / slices / tensor``. ``planes`` are the numbers of planes that
    a slice is divided into for the all-gather of weights and for the reduce-scatter of gradients;
    by default those of :func:`torus_planes`. Devices that follow each other along ``fsdp`` form a
    column through all planes: see :func:`fsdp_stages`.
    """
    fsdp = devices // slices // tensor
    if not planes:
        found = torus_planes(xr.global_runtime_device_attributes())
        planes = tuple(count if fsdp % count == 0 else 1 for count in found)
    shape = (slices, fsdp, tensor)
    order = np.arange(devices).reshape(slices, max(planes), -1, tensor).swapaxes(1, 2)
    mesh = xs.Mesh(order.ravel(), shape, AXES)
    mesh.gather_planes, mesh.scatter_planes = planes
    xs.set_global_mesh(mesh)
    return mesh


def torus_planes(devices: list[dict[str, Any]]) -> tuple[int, int]:
    """Return the numbers of planes to divide a slice into, for all-gathers and for reduce-scatters.

    Over a whole torus at once the compiler turns a reduce-scatter, and in three dimensions an
    all-gather too, into an all-reduce, which moves more bytes. A slice with at least four chips
    along every axis is therefore divided along its last axis. ``devices`` have their coordinates as
    ``coords`` and are numbered along the first axis first.
    """
    coords = np.array([device.get("coords", [0]) for device in devices])
    bounds = [int(bound) for bound in coords.max(0) + 1 if bound > 1]
    if len(bounds) < 2 or min(bounds) < 4:
        return 1, 1
    return (bounds[-1] if len(bounds) == 3 else 1), bounds[-1]


def size(axis: str) -> int:
    """Return the number of devices along an axis of the global mesh."""
    return xs.get_global_mesh().shape()[axis]


def parts(spec: Spec) -> int:
    """Return the number of parts that the global mesh splits a tensor of ``spec`` into."""
    return math.prod(size(axis) for axes in spec if axes for axis in np.atleast_1d(axes))


def groups(axis: str) -> list[list[int]]:
    """Return the groups of devices that differ only in their position along an axis."""
    devices = xs.get_global_mesh().get_logical_mesh()
    return np.moveaxis(devices, AXES.index(axis), -1).reshape(-1, size(axis)).tolist()


def fsdp_stages(planes: int) -> list[list[list[int]]]:
    """Return the stages of an all-gather over ``fsdp``, each as groups of devices.

    The first stage gathers within the columns through the planes, the second within each plane; a
    reduce-scatter takes them in reverse. So most bytes move within a plane, where a torus has links
    in two dimensions. With one plane there is a single stage.
    """
    mesh = xs.get_global_mesh()
    slices, fsdp, tensor = mesh.mesh_shape
    devices = mesh.get_logical_mesh().reshape(slices, fsdp // planes, planes, tensor)
    stages = [np.moveaxis(devices, axis, -1) for axis in (2, 1)]
    return [stage.reshape(-1, stage.shape[-1]).tolist() for stage in stages if stage.shape[-1] > 1]


def from_hosts(value: float) -> torch.Tensor:
    """Return every host's ``value``, as fp32 ``[devices]``: a device's element is its host's value.

    Each host provides the elements of its own devices only, so a maximum or minimum of the result
    is taken over all hosts, and all hosts get the same.
    """
    devices = xs.get_global_mesh().size()
    return shard(torch.full((devices,), float(value)).to(torch_xla.device()), (AXES,))


def to_mesh(data: torch.Tensor, spec: Spec) -> torch.Tensor:
    """Return ``data``, a tensor on the host, split over the global mesh.

    A tensor on the meta device becomes a placeholder: a program can be traced with it, but not run.
    torch_xla would keep a placeholder's sharding with its data, so ``placeholders`` has it instead.
    """
    if data.is_meta:
        placeholder = xb.create_placeholder_tensor(data.shape, data.dtype)
        # The step updates the placeholder in place; the clone still identifies the input.
        placeholders.append((placeholder.clone(), spec))
        return placeholder
    return shard(data.to(torch_xla.device()), spec)


def local_replicas(tensor: torch.Tensor) -> list[tuple[int, Range]]:
    """Return, for each of this host's devices, the number of its copy and its part of ``tensor``.

    Devices that hold the same part of the sharded tensor, on whatever host, number their copies
    from 0.
    """
    places = torch_xla._XLAC._get_local_shard_replica_and_indices([tensor])[0]
    whole = tuple((0, size) for size in tensor.shape)
    return [
        (copy, whole if at is Ellipsis else tuple((index.start, index.stop) for index in at))
        for copy, at in places
    ]


def local_places(tensor: torch.Tensor) -> list[Range]:
    """Return the part of a sharded ``tensor`` that each of this host's devices holds."""
    return [place for _, place in local_replicas(tensor)]


def local_parts(shape: tuple[int, ...], spec: Spec) -> set[Range]:
    """Return the parts of a tensor of ``shape`` and ``spec`` that this host's devices would hold.

    The mesh must split the tensor evenly.
    """
    counts = [parts((axes,)) for axes in spec]
    probe = shard(torch.zeros(counts).to(torch_xla.device()), spec)
    sizes = [size // count for size, count in zip(shape, counts, strict=True)]
    return {
        tuple((start * size, stop * size) for (start, stop), size in zip(place, sizes, strict=True))
        for place in local_places(probe)
    }


def local_rows(batch: int) -> np.ndarray:
    """Return the rows of a global batch that this host's devices hold, ascending."""
    probe = shard(torch.zeros(batch, 1).to(torch_xla.device()), BATCH_SHARDING)
    return np.unique([range(*place[0]) for place in local_places(probe)])


def from_rows(values: np.ndarray, rows: np.ndarray, batch: int) -> torch.Tensor:
    """Return the global batch ``[batch, T]``, split, from ``values``, this host's ``rows`` of it.

    The dtype is that of ``values``. As in :func:`from_hosts`, a host provides its own devices' rows
    only: the zeros in the rows of other hosts go nowhere.
    """
    whole = np.zeros((batch, values.shape[1]), values.dtype)
    whole[rows] = values
    return to_mesh(torch.from_numpy(whole), BATCH_SHARDING)


def shard(tensor: torch.Tensor, spec: Spec) -> torch.Tensor:
    """Mark ``tensor`` as split over the global mesh; return it as a plain tensor."""
    return xs.mark_sharding(tensor, xs.get_global_mesh(), spec).global_tensor


class _Assemble(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: torch.Tensor, spec: Spec) -> torch.Tensor:
        ctx.spec = spec
        # Times one: marking the parameter itself would reshard its data.
        return shard(tensor * 1, tuple(None if axis == FSDP else axis for axis in spec))

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        return shard(gradient * 1, ctx.spec), None


def gather_parameter(tensor: torch.Tensor, spec: Spec) -> torch.Tensor:
    """Outside the manual region, return a parameter of ``spec`` all-gathered over ``fsdp``.

    The gradient is marked with ``spec`` again, so that the partitioner reduce-scatters it.
    """
    return _Assemble.apply(tensor, spec)


def enter_manual(tensor: torch.Tensor, spec: Spec) -> torch.Tensor:
    """Enter a manual region: return this device's shard of the global ``tensor``."""
    return xs.enable_manual_sharding(tensor, spec).global_tensor


def leave_manual(tensor: torch.Tensor, spec: Spec, full_shape: torch.Size) -> torch.Tensor:
    """Leave a manual region: return the global tensor whose shard here is ``tensor``."""
    return xs.disable_manual_sharding(tensor, spec, full_shape).global_tensor


@functools.cache
def _all_gather_computation(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    dim: int,
    replica_groups: tuple[tuple[int, ...], ...],
):
    """Return the XLA computation of one all-gather along ``dim`` within each group of devices.

    torch_xla's own ``all_gather`` passes a token through the program. The token is not part of the
    manual region, and the partitioner aborts on it.
    """
    count, members = len(replica_groups), len(replica_groups[0])
    whole = tuple(size * members if axis == dim else size for axis, size in enumerate(shape))
    element = {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype]
    shard_type, whole_type = (f"tensor<{'x'.join(map(str, s))}x{element}>" for s in (shape, whole))
    module = f"""
      func.func public @main(%shard: {shard_type}) -> {whole_type} {{
        %whole = "stablehlo.all_gather"(%shard) {{
          all_gather_dim = {dim} : i64,
          replica_groups = dense<{[list(group) for group in replica_groups]}>
            : tensor<{count}x{members}xi64>,
          channel_handle = #stablehlo.channel_handle<handle = 1, type = 1>,
          use_global_device_ids
        }} : ({shard_type}) -> {whole_type}
        return %whole : {whole_type}
      }}"""
    computation = mlir_module_to_xla_computation(module, use_tuple_args=False, return_tuple=False)
    return xb.computation_from_module_proto(
        "all_gather", computation.as_serialized_hlo_module_proto()
    )


def _all_reduce(tensor: torch.Tensor, axis: str) -> torch.Tensor:
    if size(axis) == 1:
        return tensor
    return torch_xla._XLAC._xla_spmd_all_reduce(xm.REDUCE_SUM, tensor, 1.0, groups(axis))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, shard_: torch.Tensor, dim: int) -> torch.Tensor:
        ctx.dim = dim
        whole = shard_ * 1
        for stage in fsdp_stages(xs.get_global_mesh().gather_planes):
            members = tuple(map(tuple, stage))
            computation = _all_gather_computation(tuple(whole.shape), whole.dtype, dim, members)
            (whole,) = torch_xla._XLAC._xla_user_computation(
                "xla::all_gather", [whole], computation
            )
        return whole

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        # Scale 1: the loss is a mean over the global batch, so the devices' gradients just add up.
        for stage in reversed(fsdp_stages(xs.get_global_mesh().scatter_planes)):
            gradient = torch_xla._XLAC._xla_spmd_reduce_scatter(
                xm.REDUCE_SUM, gradient, 1.0, ctx.dim, len(stage[0]), stage
            )
        return _all_reduce(gradient, SLICE), None


def gather(shard_: torch.Tensor, spec: Spec) -> torch.Tensor:
    """In a manual region, all-gather a weight over ``fsdp``; backward reduce-scatters its gradient.

    Backward also all-reduces the gradient over ``slice``: every slice has a copy of the weight.
    """
    return _Gather.apply(shard_, spec.index(FSDP))


class _CopyToTensorParallel(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: torch.Tensor) -> torch.Tensor:
        return tensor * 1

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        return _all_reduce(gradient, TENSOR)


class _ReduceFromTensorParallel(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: torch.Tensor) -> torch.Tensor:
        return _all_reduce(tensor, TENSOR)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


def copy_to_tensor_parallel(tensor: torch.Tensor) -> torch.Tensor:
    """In a manual region, begin a part of a layer that is split over ``tensor``.

    Identity in forward; all-reduce of the gradient in backward (Shoeybi et al. 2019, operator f).
    """
    return tensor if size(TENSOR) == 1 else _CopyToTensorParallel.apply(tensor)


def reduce_from_tensor_parallel(tensor: torch.Tensor) -> torch.Tensor:
    """In a manual region, end a part of a layer that is split over ``tensor``.

    All-reduce in forward; identity in backward (Shoeybi et al. 2019, operator g).
    """
    return tensor if size(TENSOR) == 1 else _ReduceFromTensorParallel.apply(tensor)
