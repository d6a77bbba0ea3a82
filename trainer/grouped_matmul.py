"""Grouped matrix products, which the expert modes ``gmm`` and ``gmm_stack`` are made of.

Rows are sorted by group, and ``group_sizes`` holds the number of rows of each. There are two back
ends:

* ``pallas_megablox``: JAX's Megablox Pallas kernels, on TPU
* ``grouped_loop``: the same products as XLA loops whose work grows with the rows, on other devices
"""

import jax
import jax.numpy as jnp
import torch
import torch.nn.functional as F
import torch_xla.core.xla_builder as xb
import torch_xla.experimental.custom_kernel as pallas
import torch_xla.runtime as xr

from . import tpu

# Rows of one product in grouped_loop: large enough to amortise the loop, small enough that the last
# block of an expert, which is partly empty, costs little.
BLOCK_ROWS = 128
# The largest Megablox tiles (rows, k, n). torch_xla's own choice overflows a chip's VMEM at
# Mixtral's sizes. A v6e has more FLOPs per byte of HBM bandwidth than the other chips, more than
# twice as many, and more VMEM: larger tiles read the weights from HBM less often.
TILES = (512, 1024, 1024)
TILES_OF_V6E = (1024, 512, 2048)
LANES = 128  # width of a TPU register: tiles are multiples of it


def kernel() -> str:
    """Return the name of the back end that grouped products run on, on this device."""
    return "pallas_megablox" if xr.device_type() == "TPU" else "grouped_loop"


def grouped_matmul(
    lhs_MK: torch.Tensor,
    rhs_GKN: torch.Tensor,
    group_sizes_G: torch.Tensor,
    *,
    transpose_rhs: bool = False,
) -> torch.Tensor:
    """Multiply every group of rows with its own matrix: ``out[m] = lhs[m] @ rhs[group(m)]``.

    Args:
        lhs_MK: rows sorted by group, floating point.
        rhs_GKN: one matrix a group, same dtype as ``lhs_MK``; ``[G, N, K]`` with transpose_rhs.
        group_sizes_G: int32, rows per group; sums to M.

    Returns:
        ``[M, N]`` in the dtype of ``lhs_MK``. Differentiable in ``lhs_MK`` and ``rhs_GKN``.
    """
    return _GroupedMatmul.apply(lhs_MK, rhs_GKN, group_sizes_G, transpose_rhs)


class _GroupedMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, lhs, rhs, sizes, transpose_rhs):
        ctx.save_for_backward(lhs, rhs, sizes)
        ctx.transpose_rhs = transpose_rhs
        return _gmm(lhs, rhs, sizes, transpose_rhs=transpose_rhs)

    @staticmethod
    def backward(ctx, gradient):
        lhs, rhs, sizes = ctx.saved_tensors
        pair = (gradient, lhs) if ctx.transpose_rhs else (lhs, gradient)
        lhs_gradient = _gmm(gradient, rhs, sizes, transpose_rhs=not ctx.transpose_rhs)
        return lhs_gradient, _tgmm(*pair, sizes), None, None


def _gmm(lhs, rhs, sizes, *, transpose_rhs: bool):
    if kernel() == "grouped_loop":
        return xb.call_jax(_loop_gmm, (lhs, rhs, sizes), {"transpose": transpose_rhs})
    rows, width = lhs.shape[0], rhs.shape[1 if transpose_rhs else 2]
    tiles = tiling(*lhs.shape, width)
    lhs = _pad_rows(lhs, tiles[0])
    return pallas.gmm(lhs, rhs, sizes, tiles, transpose_rhs=transpose_rhs)[:rows]


def _tgmm(lhs, rhs, sizes):
    """``out[g] = lhs[rows of g].T @ rhs[rows of g]``, ``[M, K], [M, N] -> [G, K, N]``."""
    if kernel() == "grouped_loop":
        return xb.call_jax(_loop_tgmm, (lhs, rhs, sizes))
    tiles = tiling(*lhs.shape, rhs.shape[1])
    lhs, rhs = _pad_rows(lhs, tiles[0]), _pad_rows(rhs, tiles[0])
    return pallas.tgmm(lhs.t(), rhs, sizes, tiles)


def tiling(rows: int, k: int, n: int) -> tuple[int, int, int]:
    """Return Megablox' tile sizes for a product of ``[rows, k]`` with groups of ``[k, n]``.

    The rows must be padded to a multiple of the first. Where a tile does not divide ``k`` or ``n``,
    the kernel masks the rest of the last tile; of the allowed tiles this takes the one with the
    smallest rest.
    """

    chip = tpu.current_chip()
    most = TILES_OF_V6E if chip and chip.name == "v6e" else TILES

    def tile(size: int, largest: int) -> int:
        if size <= largest:
            return size
        candidates = range(largest, largest // 2 - 1, -LANES)
        return min(candidates, key=lambda candidate: -size % candidate)

    return min(most[0], rows + -rows % LANES), tile(k, most[1]), tile(n, most[2])


def _pad_rows(rows: torch.Tensor, multiple: int) -> torch.Tensor:
    return F.pad(rows, (0, 0, 0, -rows.shape[0] % multiple))


def _for_each_block(sizes: jax.Array, group: jax.Array, body, init):
    """Run ``body(first_row, rows_left, carry)`` over the row blocks of one group."""
    end = jnp.cumsum(sizes)[group]
    start = end - sizes[group]
    blocks = (sizes[group] + BLOCK_ROWS - 1) // BLOCK_ROWS

    def block(index, carry):
        first = start + index * BLOCK_ROWS
        return body(first, end - first, carry)

    return jax.lax.fori_loop(0, blocks, block, init)


def _loop_gmm(lhs: jax.Array, rhs: jax.Array, sizes: jax.Array, *, transpose: bool) -> jax.Array:
    rows, width = lhs.shape[0], rhs.shape[1 if transpose else 2]
    # A group's last block may reach into the next group, which overwrites those rows afterwards.
    # The last group's may reach past the last row, into a spare block that is cut off at the end.
    lhs = jnp.pad(lhs, ((0, BLOCK_ROWS), (0, 0)))

    def group(index, out):
        # XLA's products on CPU are fast only in fp32 and untransposed. The barrier keeps the
        # conversion of the weight out of the loop over blocks.
        weight = rhs[index].astype(jnp.float32)
        weight = jax.lax.optimization_barrier(weight.T if transpose else weight)

        def block(first, _, out):
            x = jax.lax.dynamic_slice_in_dim(lhs, first, BLOCK_ROWS).astype(jnp.float32)
            return jax.lax.dynamic_update_slice_in_dim(
                out, (x @ weight).astype(out.dtype), first, axis=0
            )

        return _for_each_block(sizes, index, block, out)

    out = jnp.zeros((rows + BLOCK_ROWS, width), lhs.dtype)
    return jax.lax.fori_loop(0, rhs.shape[0], group, out)[:rows]


def _loop_tgmm(lhs: jax.Array, rhs: jax.Array, sizes: jax.Array) -> jax.Array:
    lhs, rhs = (jnp.pad(x, ((0, BLOCK_ROWS), (0, 0))) for x in (lhs, rhs))

    def group(index, out):
        def block(first, rows_left, total):
            x = jax.lax.dynamic_slice_in_dim(lhs, first, BLOCK_ROWS).astype(jnp.float32)
            y = jax.lax.dynamic_slice_in_dim(rhs, first, BLOCK_ROWS).astype(jnp.float32)
            inside = jnp.arange(BLOCK_ROWS)[:, None] < rows_left
            return total + jnp.where(inside, x, 0).T @ y

        total = _for_each_block(sizes, index, block, jnp.zeros(out.shape[1:], jnp.float32))
        return jax.lax.dynamic_update_index_in_dim(out, total.astype(out.dtype), index, axis=0)

    out = jnp.zeros((sizes.shape[0], lhs.shape[1], rhs.shape[1]), lhs.dtype)
    return jax.lax.fori_loop(0, sizes.shape[0], group, out)
