"""Mesh, partition specs and the explicit FSDP collectives.

Every parameter is sharded over the mesh axis ``fsdp``; which of its dimensions is split is one row
of ``PARAMETER_SHARDING``. Inside the decoder layers nothing is left to the partitioner: the layers
run in a manual region, where :func:`gather` brings a whole weight to every device and, in backward,
returns each device its share of the summed gradient.
"""

import functools
import re

import numpy as np
import torch
import torch_xla
import torch_xla.core.xla_builder as xb
import torch_xla.core.xla_model as xm
import torch_xla.distributed.spmd as xs
from jaxlib._jax.mlir import mlir_module_to_xla_computation

FSDP = "fsdp"

# Name pattern → the axis of every dimension. The first match wins. Weights are split on the hidden
# size, the one dimension that every one of them has.
PARAMETER_SHARDING: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"embed_tokens\.weight$", (None, FSDP)),  # [V, H]
    (r"lm_head\.weight$", (None, FSDP)),  # [V, H]
    (r"self_attn\.(q|k|v)_proj\.weight$", (None, FSDP)),  # [heads·D, H]
    (r"self_attn\.o_proj\.weight$", (FSDP, None)),  # [H, heads·D]
    (r"mlp\.gate\.weight$", (None, FSDP)),  # [E, H]
    (r"mlp\.experts\.gate_up_proj$", (None, None, FSDP)),  # [E, 2I, H]
    (r"mlp\.experts\.down_proj$", (None, FSDP, None)),  # [E, H, I]
    (r"norm\.weight$", (FSDP,)),  # [H]
)
BATCH_SHARDING = (FSDP, None)  # [B, T]
HIDDEN_SHARDING = (FSDP, None, None)  # [B, T, H]


def partition_spec(name: str) -> tuple[str | None, ...]:
    """Return the mesh axis of every dimension of the parameter ``name``.

    Raises KeyError for a parameter that no row of the table names, so that a new one cannot end up
    replicated unseen.
    """
    for pattern, spec in PARAMETER_SHARDING:
        if re.search(pattern, name):
            return spec
    raise KeyError(f"no row of PARAMETER_SHARDING matches the parameter {name!r}")


def fsdp_mesh(devices: int) -> xs.Mesh:
    """Return the one-dimensional mesh over all ``devices`` and make it the global mesh."""
    mesh = xs.Mesh(np.arange(devices), (devices,), (FSDP,))
    xs.set_global_mesh(mesh)
    return mesh


def shard(tensor: torch.Tensor, spec: tuple[str | None, ...]) -> torch.Tensor:
    """Mark ``tensor`` as split over the global mesh and return it, a plain tensor again."""
    return xs.mark_sharding(tensor, xs.get_global_mesh(), spec).global_tensor


class _Replicate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: torch.Tensor, spec: tuple[str | None, ...]) -> torch.Tensor:
        ctx.spec = spec
        # Times one: a mark on the parameter itself would move its data.
        return shard(tensor * 1, (None,) * tensor.dim())

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        return shard(gradient * 1, ctx.spec), None


def replicate(tensor: torch.Tensor, spec: tuple[str | None, ...]) -> torch.Tensor:
    """Outside the manual region: a parameter of ``spec``, whole on every device.

    Its gradient is marked with ``spec`` again, so that the partitioner scatters what it reduces.
    """
    return _Replicate.apply(tensor, spec)


def enter_manual(tensor: torch.Tensor, spec: tuple[str | None, ...]) -> torch.Tensor:
    """Return this device's shard of ``tensor``; what is computed from it is per device."""
    return xs.enable_manual_sharding(tensor, spec).global_tensor


def leave_manual(
    tensor: torch.Tensor, spec: tuple[str | None, ...], full_shape: torch.Size
) -> torch.Tensor:
    """Return the global tensor of ``full_shape`` whose shards the devices hold in ``tensor``."""
    return xs.disable_manual_sharding(tensor, spec, full_shape).global_tensor


@functools.cache
def _all_gather_computation(shape: tuple[int, ...], dtype: torch.dtype, dim: int, devices: int):
    """Return the XLA computation of one all-gather over all devices along ``dim``.

    torch_xla's own ``all_gather`` threads a token through the program, a device value that does not
    belong to the manual region and that the partitioner aborts on.
    """
    whole = tuple(size * devices if axis == dim else size for axis, size in enumerate(shape))
    element = {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype]
    shard_type, whole_type = (f"tensor<{'x'.join(map(str, s))}x{element}>" for s in (shape, whole))
    groups = ", ".join(map(str, range(devices)))
    module = f"""
      func.func public @main(%shard: {shard_type}) -> {whole_type} {{
        %whole = "stablehlo.all_gather"(%shard) {{
          all_gather_dim = {dim} : i64,
          replica_groups = dense<[[{groups}]]> : tensor<1x{devices}xi64>,
          channel_handle = #stablehlo.channel_handle<handle = 1, type = 1>,
          use_global_device_ids
        }} : ({shard_type}) -> {whole_type}
        return %whole : {whole_type}
      }}"""
    computation = mlir_module_to_xla_computation(module, use_tuple_args=False, return_tuple=False)
    return xb.computation_from_module_proto(
        "all_gather", computation.as_serialized_hlo_module_proto()
    )


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, shard_: torch.Tensor, dim: int) -> torch.Tensor:
        ctx.dim, ctx.devices = dim, xs.get_global_mesh().size()
        computation = _all_gather_computation(tuple(shard_.shape), shard_.dtype, dim, ctx.devices)
        return torch_xla._XLAC._xla_user_computation("xla::all_gather", [shard_], computation)[0]

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        # Scale 1: the loss is the mean over the global batch already, so the shares add up.
        shard_ = torch_xla._XLAC._xla_spmd_reduce_scatter(
            xm.REDUCE_SUM, gradient, 1.0, ctx.dim, ctx.devices, [list(range(ctx.devices))]
        )
        return shard_, None


def gather(shard_: torch.Tensor, spec: tuple[str | None, ...]) -> torch.Tensor:
    """In a manual region: all-gather a weight over ``fsdp``; backward reduce-scatters, summing."""
    if xs.get_global_mesh().size() == 1 or FSDP not in spec:
        return shard_
    return _Gather.apply(shard_, spec.index(FSDP))
