"""Causal attention for transformers' ``AttentionInterface``: Pallas on TPU, dense elsewhere.

``pallas_splash``  JAX's splash attention kernel: key and value heads are shared by their group of
                   query heads, not repeated, and blocks outside the sliding window are skipped.
``dense``          softmax over all positions, on any device; the reference for the kernel.

Both take ``segment_ids``, the document of every position, to keep attention within documents.
Neither is registered with a mask function, so transformers builds no mask on the host.
"""

import jax
import torch
import torch_xla.core.xla_builder as xb
import torch_xla.runtime as xr
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from transformers import AttentionInterface, MixtralConfig
from transformers.models.llama.modeling_llama import rotate_half as llama_rotate_half
from transformers.models.mixtral import modeling_mixtral

from .config import head_dim

# With "flash" in its name, transformers would try to import a flash attention package.
FLASH, DENSE = "pallas", "dense"
LANES = 128  # width of a TPU register: head width and sequence length must be multiples of it
BLOCK = 512  # query positions, and key positions, in VMEM at a time


def register() -> None:
    """Register both with transformers as ``attn_implementation``; replace its ``rotate_half``.

    transformers has a registry for attention and none for ``rotate_half``.
    """
    modeling_mixtral.rotate_half = rotate_half
    AttentionInterface.register(FLASH, flash)
    AttentionInterface.register(DENSE, dense)


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    """Return ``[-x2, x1]`` for the halves ``[x1, x2]`` of x, as transformers' function does.

    In bfloat16 the result is a product with a matrix of zeros and ones, which is exact: on a TPU
    the halves of a head lie within registers, and rearranging them takes longer than the product.
    """
    if x.dtype != torch.bfloat16:
        return llama_rotate_half(x)
    half = x.shape[-1] // 2
    one = torch.eye(half, dtype=x.dtype, device=x.device)
    zero = torch.zeros_like(one)
    return x @ torch.cat([torch.cat([zero, one], dim=1), torch.cat([-one, zero], dim=1)])


def kernel_of(config: MixtralConfig, length: int) -> str:
    """Return the kernel that attention runs on this device for sequences of ``length`` tokens."""
    if config._attn_implementation != FLASH or xr.device_type() != "TPU":
        return "dense"
    fits = length % LANES == 0 and head_dim(config.to_dict()) % LANES == 0
    return "pallas_splash" if fits else "dense"


def flash(module, query, key, value, attention_mask, *, scaling: float, segment_ids=None, **kwargs):
    """:func:`splash` or :func:`dense`, as :func:`kernel_of` says, with the latter's arguments."""
    if kernel_of(module.config, query.shape[2]) == "dense":
        options = kwargs | {"scaling": scaling, "segment_ids": segment_ids}
        return dense(module, query, key, value, attention_mask, **options)
    out = splash(query * scaling, key, value, module.config.sliding_window, segment_ids)
    return out.transpose(1, 2), None


def splash(query, key, value, sliding_window: int | None = None, segment_ids=None) -> torch.Tensor:
    """Causal splash attention. On other devices than TPUs the kernel is interpreted, slowly.

    Args:
        query: ``[B, heads, T, D]``, scaled; ``key`` and ``value``: ``[B, kv_heads, T, D]``, same
            dtype; T and D multiples of ``LANES``.
        sliding_window: how many positions a query attends to, its own included; None for all.
        segment_ids: int32 ``[B, T]``; a query attends to positions of its own id; None for all.

    Returns:
        ``[B, heads, T, D]`` in the dtype of ``query``, differentiable in query, key and value.
    """
    return _Splash.apply(query, key, value, sliding_window, segment_ids)


class _Splash(torch.autograd.Function):
    """Saves the residuals of JAX's forward, so that backward does not run forward again."""

    @staticmethod
    def forward(ctx, query, key, value, window, segment_ids):
        ctx.window = window
        static = {"window": window, "interpret": xr.device_type() != "TPU"}
        arguments = (query, key, value, segment_ids)
        out, *residuals = xb.call_jax(_splash_forward, arguments, static)
        ctx.save_for_backward(*arguments, *residuals)
        return out

    @staticmethod
    def backward(ctx, gradient):
        static = {"window": ctx.window, "interpret": xr.device_type() != "TPU"}
        saved = (gradient, *ctx.saved_tensors)
        return *xb.call_jax(_splash_backward, saved, static), None, None


def _splash_forward(query, key, value, segment_ids, *, window, interpret):
    attention = _splash_attention(query, segment_ids, window, interpret)
    out, pull_back = jax.vjp(attention, query, key, value)
    return out, *jax.tree.leaves(pull_back)


def _splash_backward(gradient, query, key, value, segment_ids, *residuals, window, interpret):
    attention = _splash_attention(query, segment_ids, window, interpret)

    def pull_back(*arguments):
        return jax.vjp(attention, *arguments)[1]

    # Forward is traced again, but not run, for the tree structure of its residuals.
    form = jax.tree.structure(jax.eval_shape(pull_back, query, key, value))
    return jax.tree.unflatten(form, residuals)(gradient)


def _splash_attention(
    query: jax.Array, segment_ids: jax.Array | None, window: int | None, interpret: bool
):
    _, heads, length, _ = query.shape
    mask = masks.CausalMask((length, length))
    if window and window < length:
        mask = masks.LocalMask((length, length), (window - 1, 0), offset=0)
    block = next(size for size in (BLOCK, BLOCK // 2, LANES) if length % size == 0)
    names = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    kernel = kernels.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=kernels.BlockSizes(**dict.fromkeys(names, block)),
        interpret=interpret,
    )
    if segment_ids is None:
        return jax.vmap(kernel)
    segments = kernels.SegmentIds(segment_ids, segment_ids)
    return lambda *arguments: jax.vmap(kernel)(*arguments, segments)


def dense(
    module,
    query,
    key,
    value,
    attention_mask,
    *,
    scaling: float,
    sliding_window=None,
    segment_ids=None,
    **kwargs,
):
    """Causal softmax attention: every position attends to itself and the positions before it.

    Args:
        query: ``[B, heads, T, D]``; ``key`` and ``value``: ``[B, kv_heads, T, D]``, same dtype.
        attention_mask: ignored; sequences are packed and causal.
        sliding_window: how many positions a query attends to, its own included; None for all.
        segment_ids: int32 ``[B, T]``; a query attends to positions of its own id; None for all.

    Returns:
        ``([B, T, heads, D], None)``, in the dtype of ``query``; the softmax is in fp32.
    """
    batch, heads, length, width = query.shape
    kv_heads = key.shape[1]
    # Grouped-query attention: the query heads of a group share one key head, without copies.
    query = query.reshape(batch, kv_heads, heads // kv_heads, length, width)
    scores = torch.einsum("bhgqd,bhkd->bhgqk", query, key).float() * scaling
    position = torch.arange(length, device=query.device)
    distance = position.unsqueeze(1) - position.unsqueeze(0)
    visible = distance >= 0
    if sliding_window:
        visible = visible & (distance < sliding_window)
    if segment_ids is not None:
        same = segment_ids.unsqueeze(2) == segment_ids.unsqueeze(1)
        visible = visible & same[:, None, None]
    scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, dim=-1).to(query.dtype)
    out = torch.einsum("bhgqk,bhkd->bhgqd", weights, value)
    return out.reshape(batch, heads, length, width).transpose(1, 2), None
