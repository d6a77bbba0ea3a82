"""Mixtral for training: transformers' own layers, run as one scan in a manual region.

Parameters stay separate for each layer, under transformers' names except for the experts'
(``experts.split_projections``). Inside a step the parameters of all layers are stacked, and the
layers become the body of one XLA loop. Backward is a second loop, in reverse, which recomputes each
layer from its input (activation checkpointing). So program size and compile time do not depend on
the number of layers, and of each layer only its input is kept for backward.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
import torch_xla
from torch.func import functional_call
from torch_xla.experimental.scan import _scan_impl_flat
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from . import attention, experts
from .sharding import (
    BATCH_SHARDING,
    FSDP,
    HIDDEN_SHARDING,
    SLICE,
    copy_to_tensor_parallel,
    enter_manual,
    gather,
    gather_parameter,
    leave_manual,
    partition_spec,
    reduce_from_tensor_parallel,
    shard,
    size,
    to_mesh,
)

ROPE_SHARDING = (None, None, None)  # cos and sin, [1, T, D], whole on every device
ROUTING_SHARDING = (None, BATCH_SHARDING[0], None)  # [layers, shards of the batch, 2E + 1]
IGNORED = -100  # the target of a position without loss, in transformers as in PyTorch


def build(
    config: dict, *, experts_mode: str, flash_attention: bool, dtype: torch.dtype
) -> MixtralForCausalLM:
    """Return transformers' Mixtral on the meta device, without weights.

    ``config`` is the content of a config.json, ``experts_mode`` one of ``experts.MODES``.
    :func:`initialize` or :func:`load` gives the model its weights.
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
    for layer in model.model.layers:
        experts.split_projections(layer.mlp.experts)
        layer.self_attn.register_forward_pre_hook(_begin_tensor_parallel, with_kwargs=True)
        layer.self_attn.register_forward_hook(_end_tensor_parallel)
    return model.train()


def _begin_tensor_parallel(attention, args, kwargs):
    return args, kwargs | {"hidden_states": copy_to_tensor_parallel(kwargs["hidden_states"])}


def _end_tensor_parallel(attention, args, output):
    hidden, weights = output
    return reduce_from_tensor_parallel(hidden), weights


def initialize(model: MixtralForCausalLM, seed: int) -> None:
    """Give a model on the meta device transformers' random weights, sharded over the mesh.

    Host memory holds the weights of one module at a time. The weights depend on ``seed`` and the
    config alone, not on the number of devices.
    """
    torch.manual_seed(seed)
    for prefix, module in model.named_modules():
        fresh = module.to_empty(device="cpu", recurse=False)
        if isinstance(module, MixtralExperts):
            fresh = MixtralExperts(model.config).to(module.down_proj.dtype)
        model._init_weights(fresh)
        if isinstance(module, MixtralExperts):
            experts.split_projections(fresh)
        for name, parameter in list(fresh.named_parameters(recurse=False)):
            place(module, prefix, name, parameter.data)
        _place_buffers(module)
    model.tie_weights()


def load(model: MixtralForCausalLM, read: Callable[[str, torch.Size], torch.Tensor]) -> None:
    """Give a model on the meta device the weights that ``read`` returns, sharded over the mesh.

    ``read`` takes a parameter's name and shape and returns a tensor on the host, of any dtype. Host
    memory holds one parameter at a time.
    """
    untied = {name for name, _ in model.named_parameters()}
    for prefix, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if (full_name := f"{prefix}.{name}") in untied:
                data = read(full_name, parameter.shape).to(parameter.dtype)
                place(module, prefix, name, data)
        if next(module.buffers(recurse=False), None) is not None:  # the rotary embedding's
            module.to_empty(device="cpu", recurse=False)
            model._init_weights(module)
            _place_buffers(module)
    model.tie_weights()


def place(module: torch.nn.Module, prefix: str, name: str, data: torch.Tensor) -> None:
    """Shard the host tensor ``data`` and make it the parameter ``name`` of a module."""
    data = to_mesh(data, partition_spec(f"{prefix}.{name}"))
    setattr(module, name, torch.nn.Parameter(data))


def _place_buffers(module: torch.nn.Module) -> None:
    for name, buffer in module.named_buffers(recurse=False):
        setattr(module, name, buffer.to(torch_xla.device()))


def causal_lm_loss(
    model: MixtralForCausalLM,
    tokens_BT: torch.Tensor,
    segments_BT: torch.Tensor | None = None,
    counted_B1: torch.Tensor | None = None,
    *,
    recompute: bool,
) -> tuple[torch.Tensor, experts.Routing]:
    """Return the mean cross-entropy, in nats per predicted token, an fp32 scalar, and the routing.

    :func:`training_loss` adds the auxiliary loss where the configuration asks for it.

    Args:
        model: with its weights on the mesh.
        tokens_BT: int64 on the mesh, split on the batch. Position t predicts position t + 1.
        segments_BT: int32 like tokens_BT, the document of every position. Positions attend to their
            own document only, and do not predict the first token of the next. None: the whole
            sequence is one document.
        counted_B1: boolean, split like tokens_BT: the rows whose tokens count in the mean. None:
        all. recompute: run the layers as a scan that recomputes them in backward (activation
            checkpointing); else one after the other, keeping their activations.
    """
    decoder = model.model
    weight = decoder.embed_tokens.weight
    embedding_VH = gather_parameter(weight, partition_spec("embed_tokens.weight"))
    hidden_BTH = shard(F.embedding(tokens_BT, embedding_VH), HIDDEN_SHARDING)
    positions = torch.arange(tokens_BT.shape[1], device=tokens_BT.device).unsqueeze(0)
    cos, sin = decoder.rotary_emb(hidden_BTH, positions)
    layers = list(decoder.layers)
    hidden_BTH, means = decode(layers, hidden_BTH, cos, sin, segments_BT, recompute=recompute)
    config = model.config
    routing = experts.routing(means, config.num_local_experts, config.num_experts_per_tok)
    norm = decoder.norm
    hidden_BTH = functional_call(
        norm, {"weight": gather_parameter(norm.weight, partition_spec("norm.weight"))}, hidden_BTH
    )
    head_VH = gather_parameter(model.lm_head.weight, partition_spec("lm_head.weight"))
    logits_BTV = F.linear(hidden_BTH[:, :-1], head_VH).float()
    targets_BT = targets(tokens_BT, segments_BT, counted_B1)
    loss = F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), ignore_index=IGNORED)
    return loss, routing


def targets(
    tokens_BT: torch.Tensor,
    segments_BT: torch.Tensor | None = None,
    counted_B1: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the target of every position but the last, IGNORED where a position has no loss.

    The arguments are those of :func:`causal_lm_loss`.
    """
    targets_BT = tokens_BT[:, 1:]
    if segments_BT is not None:
        targets_BT = targets_BT.where(segments_BT[:, 1:] == segments_BT[:, :-1], IGNORED)
    return targets_BT if counted_B1 is None else targets_BT.where(counted_B1, IGNORED)


def training_loss(
    config: MixtralConfig, cross_entropy: torch.Tensor, routing: experts.Routing
) -> torch.Tensor:
    """Return the loss to minimise, as in transformers: with ``output_router_logits`` in the config,
    cross-entropy plus ``router_aux_loss_coef`` times the auxiliary loss.
    """
    if not config.output_router_logits:
        return cross_entropy
    return cross_entropy + config.router_aux_loss_coef * routing.aux_loss


def decode(
    layers: list[torch.nn.Module],
    hidden_BTH: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    segments_BT: torch.Tensor | None = None,
    *,
    recompute: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run ``layers`` over ``hidden_BTH``, which is split on the batch, in a manual region.

    Returns the hidden states after the last layer, ``[B, T, H]``, and ``experts.routing_means`` of
    each layer and shard of the batch, ``[layers, shards, 2E + 1]``.
    """
    names = [name for name, _ in layers[0].named_parameters()]
    specs = [partition_spec(name) for name in names]

    def layer(hidden, tables, shards):
        cos, sin, *segments = tables
        options = {"position_embeddings": (cos, sin)}
        if segments:
            options["segment_ids"] = segments[0]
        weights = {n: gather(w, s) for n, w, s in zip(names, shards, specs, strict=True)}
        with experts.capture_routing(layers[0].mlp.gate) as outputs:
            out = functional_call(layers[0], weights, (hidden,), options)
        logits, _, index = outputs[0]
        return out, experts.routing_means(logits, index).unsqueeze(0)

    per_layer = [dict(each.named_parameters()) for each in layers]
    stacked = [torch.stack([parameters[name] for parameters in per_layer]) for name in names]
    run = _ScannedLayers if recompute else _UnrolledLayers
    tables = [(cos, ROPE_SHARDING), (sin, ROPE_SHARDING)]
    if segments_BT is not None:
        tables.append((segments_BT, BATCH_SHARDING))
    return run.apply(layer, specs, tables, hidden_BTH, *stacked)


class _ScannedLayers(torch.autograd.Function):
    """Forward is one XLA loop over the layers; backward a second one, in reverse, that recomputes
    and differentiates each layer.

    torch_xla's own ``scan_layers`` traces with AOTAutograd, which fails on manual regions and on
    kernels called through JAX. Only its loop builder, ``_scan_impl_flat``, is used here.
    """

    @staticmethod
    def forward(ctx, layer, specs, tables, hidden, *stacked):
        ctx.layer, ctx.specs, ctx.shape = layer, specs, hidden.shape
        ctx.stacked_shapes = [weight.shape for weight in stacked]
        carry = [enter_manual(x, spec) for x, spec in [(hidden, HIDDEN_SHARDING), *tables]]
        shards = [enter_manual(w, (None, *s)) for w, s in zip(stacked, specs, strict=True)]

        def body(carry, weights):
            hidden, *tables = carry
            out, means = layer(hidden, tables, weights)
            return [out, *tables], [hidden, means]

        (out, *ctx.tables), (inputs, means) = _scan_impl_flat(body, carry, shards)
        ctx.save_for_backward(inputs, *shards)
        return _leave_with_means(ctx, out, means)

    @staticmethod
    def backward(ctx, gradient, means_gradient):
        gradient, means_gradient = _enter_gradients(gradient, means_gradient)

        def body(carry, xs):
            gradient, *tables = carry
            means_gradient, *xs = xs
            with torch.enable_grad():
                hidden, *weights = (x.detach().requires_grad_() for x in xs)
                outputs = ctx.layer(hidden, tables, weights)
            gradient, *weight_gradients = torch.autograd.grad(
                outputs, [hidden, *weights], [gradient, means_gradient]
            )
            return [gradient, *tables], weight_gradients

        carry, xs = [gradient, *ctx.tables], [means_gradient, *ctx.saved_tensors]
        (gradient, *_), gradients = _scan_impl_flat(body, carry, xs, reverse=True)
        return _leave_with_gradients(ctx, gradient, gradients)


class _UnrolledLayers(torch.autograd.Function):
    """Runs the layers one after the other; autograd keeps their activations for backward."""

    @staticmethod
    def forward(ctx, layer, specs, tables, hidden, *stacked):
        ctx.specs, ctx.shape = specs, hidden.shape
        ctx.stacked_shapes = [weight.shape for weight in stacked]
        hidden = enter_manual(hidden, HIDDEN_SHARDING)
        tables = [enter_manual(table, spec) for table, spec in tables]
        shards = [enter_manual(w, (None, *s)) for w, s in zip(stacked, specs, strict=True)]
        ctx.leaves = [x.detach().requires_grad_() for x in (hidden, *shards)]
        with torch.enable_grad():
            out, *shards = ctx.leaves
            means = []
            for index in range(ctx.stacked_shapes[0][0]):
                out, of_layer = layer(out, tables, [weight[index] for weight in shards])
                means.append(of_layer)
            ctx.outputs = out, torch.stack(means)
        return _leave_with_means(ctx, *(output.detach() for output in ctx.outputs))

    @staticmethod
    def backward(ctx, gradient, means_gradient):
        gradients = _enter_gradients(gradient, means_gradient)
        gradient, *gradients = torch.autograd.grad(ctx.outputs, ctx.leaves, gradients)
        return _leave_with_gradients(ctx, gradient, gradients)


def _leave_with_means(ctx, hidden, means):
    """Return the hidden states and routing means as global tensors, the results of forward."""
    layers, _, width = means.shape
    shards = size(SLICE) * size(FSDP)
    return (
        leave_manual(hidden, HIDDEN_SHARDING, ctx.shape),
        leave_manual(means, ROUTING_SHARDING, torch.Size([layers, shards, width])),
    )


def _enter_gradients(gradient, means_gradient):
    """Return the gradients that backward gets, each as this device's shard."""
    return enter_manual(gradient, HIDDEN_SHARDING), enter_manual(means_gradient, ROUTING_SHARDING)


def _leave_with_gradients(ctx, gradient, weight_gradients):
    """Return the gradients of all of forward's arguments, as global tensors or None."""
    weight_gradients = [
        leave_manual(g, (None, *s), shape)
        for g, s, shape in zip(weight_gradients, ctx.specs, ctx.stacked_shapes, strict=True)
    ]
    hidden_gradient = leave_manual(gradient, HIDDEN_SHARDING, ctx.shape)
    return None, None, None, hidden_gradient, *weight_gradients
