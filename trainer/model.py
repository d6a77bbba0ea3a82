"""Mixtral for training: transformers' own layers, run as one scan in one manual region.

Parameters stay per layer, under transformers' names. Inside a step they are stacked, the layers
become the body of one XLA loop, and backward runs a second loop in reverse that recomputes each
layer from its input. The program's size and compile time do not depend on the depth, and no layer's
activations outlive the layer.
"""

import torch
import torch.nn.functional as F
import torch_xla
from torch.func import functional_call
from torch_xla.experimental.scan import _scan_impl_flat
from transformers import MixtralConfig, MixtralForCausalLM

from trainer import attention, experts
from trainer.sharding import (
    HIDDEN_SHARDING,
    enter_manual,
    gather,
    leave_manual,
    partition_spec,
    replicate,
    shard,
)

ROPE_SHARDING = (None, None, None)  # cos and sin, [1, T, D], whole on every device


def build(
    config: dict, *, experts_mode: str, flash_attention: bool, dtype: torch.dtype
) -> MixtralForCausalLM:
    """Return transformers' Mixtral for the content of a config.json, on the meta device.

    ``experts_mode`` is one of ``experts.MODES``. :func:`initialize` gives the model its weights.
    """
    experts.register()
    attention.register()
    with torch.device("meta"):
        model = MixtralForCausalLM._from_config(
            MixtralConfig.from_dict(config),
            dtype=dtype,
            attn_implementation=attention.FLASH if flash_attention else attention.DENSE,
            experts_implementation=experts_mode,
        )
    return model.train()


def initialize(model: MixtralForCausalLM, seed: int) -> None:
    """Give a model on meta transformers' random weights, placed shard by shard on the mesh.

    Host memory holds one module at a time. The weights depend on ``seed`` and the config alone, not
    on the number of devices.
    """
    torch.manual_seed(seed)
    for prefix, module in model.named_modules():
        module.to_empty(device="cpu", recurse=False)
        model._init_weights(module)
        place(module, prefix)
    model.tie_weights()


def place(module: torch.nn.Module, prefix: str) -> None:
    """Move one module's own parameters and buffers, named below ``prefix``, to their shards."""
    device = torch_xla.device()
    for name, parameter in module.named_parameters(recurse=False):
        spec = partition_spec(f"{prefix}.{name}")
        setattr(module, name, torch.nn.Parameter(shard(parameter.data.to(device), spec)))
    for name, buffer in module.named_buffers(recurse=False):
        setattr(module, name, buffer.to(device))


def causal_lm_loss(
    model: MixtralForCausalLM, tokens_BT: torch.Tensor, *, recompute: bool = True
) -> torch.Tensor:
    """Return the mean cross-entropy, in nats per predicted token, as an fp32 scalar.

    Args:
        model: weights on the mesh.
        tokens_BT: int64 on the mesh, split on the batch. Position t predicts position t + 1.
        recompute: run the layers as a scan that recomputes them in backward (activation
            checkpointing); else one after the other, keeping their activations.
    """
    decoder = model.model
    embedding_VH = replicate(decoder.embed_tokens.weight, partition_spec("embed_tokens.weight"))
    hidden_BTH = shard(F.embedding(tokens_BT, embedding_VH), HIDDEN_SHARDING)
    positions = torch.arange(tokens_BT.shape[1], device=tokens_BT.device).unsqueeze(0)
    cos, sin = decoder.rotary_emb(hidden_BTH, positions)
    hidden_BTH = decode(list(decoder.layers), hidden_BTH, cos, sin, recompute=recompute)
    norm = decoder.norm
    hidden_BTH = functional_call(
        norm, {"weight": replicate(norm.weight, partition_spec("norm.weight"))}, hidden_BTH
    )
    head_VH = replicate(model.lm_head.weight, partition_spec("lm_head.weight"))
    logits_BTV = F.linear(hidden_BTH[:, :-1], head_VH).float()
    return F.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT[:, 1:].flatten())


def decode(
    layers: list[torch.nn.Module],
    hidden_BTH: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    recompute: bool,
) -> torch.Tensor:
    """Run ``layers`` over ``hidden_BTH`` (split on the batch), every device on its own tokens."""
    names = [name for name, _ in layers[0].named_parameters()]
    specs = [partition_spec(name) for name in names]

    def layer(hidden, cos, sin, shards):
        weights = {n: gather(w, s) for n, w, s in zip(names, shards, specs, strict=True)}
        return functional_call(layers[0], weights, (hidden,), {"position_embeddings": (cos, sin)})

    per_layer = [dict(one.named_parameters()) for one in layers]
    stacked = [torch.stack([parameters[name] for parameters in per_layer]) for name in names]
    run = _ScannedLayers if recompute else _UnrolledLayers
    return run.apply(layer, specs, hidden_BTH, cos, sin, *stacked)


class _ScannedLayers(torch.autograd.Function):
    """One XLA loop over the layers; a second one, in reverse, recomputes and differentiates them.

    ``torch_xla``'s own ``scan_layers`` traces with AOTAutograd, which neither a manual region nor a
    kernel called through JAX survives; only its loop builder is used here.
    """

    @staticmethod
    def forward(ctx, layer, specs, hidden, cos, sin, *stacked):
        ctx.layer, ctx.specs, ctx.shape = layer, specs, hidden.shape
        ctx.stacked_shapes = [weight.shape for weight in stacked]
        carry = [enter_manual(hidden, HIDDEN_SHARDING)]
        carry += [enter_manual(table, ROPE_SHARDING) for table in (cos, sin)]
        shards = [enter_manual(w, (None, *s)) for w, s in zip(stacked, specs, strict=True)]

        def body(carry, weights):
            hidden, cos, sin = carry
            return [layer(hidden, cos, sin, weights), cos, sin], [hidden]

        (out, cos, sin), inputs = _scan_impl_flat(body, carry, shards)
        ctx.save_for_backward(cos, sin, *inputs, *shards)
        return leave_manual(out, HIDDEN_SHARDING, ctx.shape)

    @staticmethod
    def backward(ctx, gradient):
        cos, sin, *inputs_and_shards = ctx.saved_tensors

        def body(carry, xs):
            gradient, cos, sin = carry
            with torch.enable_grad():
                hidden, *weights = (x.detach().requires_grad_() for x in xs)
                out = ctx.layer(hidden, cos, sin, weights)
            gradient, *weight_gradients = torch.autograd.grad(out, [hidden, *weights], gradient)
            return [gradient, cos, sin], weight_gradients

        carry = [enter_manual(gradient, HIDDEN_SHARDING), cos, sin]
        (gradient, _, _), gradients = _scan_impl_flat(body, carry, inputs_and_shards, reverse=True)
        return _leave_with_gradients(ctx, gradient, gradients)


class _UnrolledLayers(torch.autograd.Function):
    """The layers one after the other in the manual region, their activations kept for backward."""

    @staticmethod
    def forward(ctx, layer, specs, hidden, cos, sin, *stacked):
        ctx.specs, ctx.shape = specs, hidden.shape
        ctx.stacked_shapes = [weight.shape for weight in stacked]
        hidden = enter_manual(hidden, HIDDEN_SHARDING)
        cos, sin = (enter_manual(table, ROPE_SHARDING) for table in (cos, sin))
        shards = [enter_manual(w, (None, *s)) for w, s in zip(stacked, specs, strict=True)]
        ctx.leaves = [x.detach().requires_grad_() for x in (hidden, *shards)]
        with torch.enable_grad():
            out, *shards = ctx.leaves
            for index in range(ctx.stacked_shapes[0][0]):
                out = layer(out, cos, sin, [weight[index] for weight in shards])
        ctx.out = out
        return leave_manual(out.detach(), HIDDEN_SHARDING, ctx.shape)

    @staticmethod
    def backward(ctx, gradient):
        gradient = enter_manual(gradient, HIDDEN_SHARDING)
        gradient, *gradients = torch.autograd.grad(ctx.out, ctx.leaves, gradient)
        return _leave_with_gradients(ctx, gradient, gradients)


def _leave_with_gradients(ctx, gradient, weight_gradients):
    """Return the gradients of hidden and stacked weights, global again, as backward must."""
    weight_gradients = [
        leave_manual(g, (None, *s), shape)
        for g, s, shape in zip(weight_gradients, ctx.specs, ctx.stacked_shapes, strict=True)
    ]
    hidden_gradient = leave_manual(gradient, HIDDEN_SHARDING, ctx.shape)
    return None, None, hidden_gradient, None, None, *weight_gradients
