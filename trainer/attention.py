"""Causal attention for transformers' ``AttentionInterface``: Pallas flash on TPU, dense elsewhere.

Neither has a mask function: transformers then builds no mask and reads nothing from the device.
"""

import torch
import torch_xla.experimental.custom_kernel as pallas
import torch_xla.runtime as xr
from transformers import AttentionInterface, MixtralConfig

# A name with "flash" in it makes transformers look for a package to import.
FLASH, DENSE = "pallas", "dense"


def register() -> None:
    """Make both known to transformers as ``attn_implementation``."""
    AttentionInterface.register(FLASH, flash)
    AttentionInterface.register(DENSE, dense)


def kernel_of(config: MixtralConfig, length: int) -> str:
    """Return the kernel that a model of ``config`` runs here on sequences of ``length``.

    The Pallas kernel is for TPU, and knows no window: where the config's ``sliding_window`` is
    shorter than the sequence, attention is dense.
    """
    wanted = config._attn_implementation == FLASH and xr.device_type() == "TPU"
    window = config.sliding_window
    return "dense" if not wanted or (window and window < length) else "pallas_flash"


def flash(module, query, key, value, attention_mask, *, scaling: float, **kwargs):
    """Pallas flash attention where it can run (see :func:`kernel_of`), else :func:`dense`."""
    if kernel_of(module.config, query.shape[2]) == "dense":
        return dense(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    # The kernel does not know grouped heads: every query head gets its own copy of the keys.
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    out = pallas.flash_attention(query, key, value, causal=True, sm_scale=scaling)
    return out.transpose(1, 2), None


def dense(
    module, query, key, value, attention_mask, *, scaling: float, sliding_window=None, **kwargs
):
    """Softmax attention of every position over itself and the ones before it.

    Args:
        query: ``[B, heads, T, D]``; ``key`` and ``value``: ``[B, kv_heads, T, D]``, same dtype.
        attention_mask: ignored; sequences are packed and causal.
        sliding_window: how many positions a query sees, itself included; None for all.

    Returns:
        ``([B, T, heads, D], None)``, in the dtype of ``query``; the softmax is in fp32.
    """
    batch, heads, length, width = query.shape
    kv_heads = key.shape[1]
    # Grouped heads: the queries of a group meet their one key without repeating it.
    query = query.reshape(batch, kv_heads, heads // kv_heads, length, width)
    scores = torch.einsum("bhgqd,bhkd->bhgqk", query, key).float() * scaling
    position = torch.arange(length, device=query.device)
    distance = position.unsqueeze(1) - position.unsqueeze(0)
    visible = distance >= 0
    if sliding_window:
        visible = visible & (distance < sliding_window)
    scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, dim=-1).to(query.dtype)
    out = torch.einsum("bhgqk,bhkd->bhgqd", weights, value)
    return out.reshape(batch, heads, length, width).transpose(1, 2), None
