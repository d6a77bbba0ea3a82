"""Trace and compile the step as the guide's branch of transformers formulates it.

    python -m benchmarks.guide RESULT ACCELERATOR_TYPE TOPOLOGY SLICES <the trainer's flags>

takes the arguments of ``trainer.plan.compile`` and writes the same measurements. ``benchmarks.plan
guide`` runs it to compare the guide's step with the trainer's.

Reimplemented here is what decides the program in the branch ``alanwaketan/moe``:

* layers stand one after the other, not in a loop; torch_xla's own checkpoint recomputes each
* the partitioner places the collectives, from marks on activations and weights, every one of which
  is split along its largest dimension
* manual regions surround only flash attention, with keys and values repeated for each query head,
  and the experts, whose gradients are reduce-scattered over all chips at once

Embedding, norms, loss, clipping and optimizer are the trainer's.
"""

import sys

import torch
import torch.nn.functional as F
import torch_xla
import torch_xla.core.xla_model as xm
import torch_xla.distributed.spmd as xs
import torch_xla.experimental.custom_kernel as pallas
from torch_xla.distributed.fsdp import checkpoint_module
from transformers import AttentionInterface
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.mixtral import modeling_mixtral

from trainer import attention, experts, model, sharding
from trainer.grouped_matmul import TILES
from trainer.plan import compile as compiling
from trainer.sharding import FSDP, HIDDEN_SHARDING, enter_manual, leave_manual, shard

# As torch_xla's FSDPv2 splits parameters: along their largest dimension
PARAMETER_SHARDING = (
    (r"norm\.weight$", (FSDP,)),
    (r"(embed_tokens|lm_head|[qo]_proj)\.weight$", (FSDP, None)),
    (r"([kv]_proj|mlp\.gate)\.weight$", (None, FSDP)),
    (r"(gate|up)_proj$", (None, None, FSDP)),  # [E, H, I]
    (r"down_proj$", (None, FSDP, None)),  # [E, I, H]
)
TOKENS = (FSDP, None)
HEADS = (FSDP, None, None, None)


def split_projections(module) -> None:
    """Give the experts ``gate_proj``, ``up_proj`` [E, H, I] and ``down_proj`` [E, I, H]."""
    original(module)
    module.down_proj = torch.nn.Parameter(module.down_proj.data.mT.contiguous())


def flash(module, query, key, value, attention_mask, *, scaling: float, **kwargs):
    """Run torch_xla's flash attention in a manual region of its own."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    out = pallas.flash_attention(
        query, key, value, True, None, None, scaling,
        partition_spec=HEADS, mesh=xs.get_global_mesh(),
    )  # fmt: skip
    return out.transpose(1, 2), None


def gmm(module, hidden, index, weights):
    """Run the grouped products in a manual region, and apply the routing weights outside of it."""
    projections = module.gate_proj, module.down_proj, module.up_proj
    out = _Experts.apply(hidden, index, *projections)
    return (out * weights.to(out.dtype).unsqueeze(-1)).sum(1)


def _product(lhs, rhs, sizes):
    return pallas.gmm(lhs, rhs, sizes, TILES)


def _gradients(gradient, lhs, rhs, sizes):
    return (
        pallas.gmm(gradient, rhs, sizes, TILES, transpose_rhs=True),
        pallas.tgmm(lhs.t(), gradient, sizes, TILES),
    )


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, index, gate, down, up):
        tokens, k = index.shape
        whole = [weight * 1 for weight in (gate, down, up)]
        hidden, index = (enter_manual(x, TOKENS) for x in (hidden, index))
        gate, down, up = (enter_manual(weight, (None, None, None)) for weight in whole)
        flat = index.flatten()
        order = flat.argsort()
        back = order.argsort()
        sizes = F.one_hot(flat, len(gate)).sum(0).to(torch.int32)
        rows = hidden[torch.arange(len(hidden), device=hidden.device).repeat_interleave(k)[order]]
        gated, upped = _product(rows, gate, sizes), _product(rows, up, sizes)
        active = F.silu(gated)
        inner = active * upped
        out = _product(inner, down, sizes)[back].reshape(-1, k, hidden.shape[1])
        saved = [
            leave_manual(x, TOKENS, torch.Size((tokens * k, x.shape[1])))
            for x in (rows, gated, upped, active, inner)
        ]
        ctx.save_for_backward(*saved, *whole, order, back, sizes)
        return leave_manual(out, HIDDEN_SHARDING, torch.Size((tokens, k, hidden.shape[1])))

    @staticmethod
    def backward(ctx, gradient):
        *saved, order, back, sizes = ctx.saved_tensors
        saved, whole = saved[:5], saved[5:]
        tokens, k, width = gradient.shape
        rows, gated, upped, active, inner = (enter_manual(x * 1, TOKENS) for x in saved)
        gate, down, up = (enter_manual(weight, (None, None, None)) for weight in whole)
        gradient = enter_manual(gradient, HIDDEN_SHARDING).reshape(-1, width)[order]
        gradient, of_down = _gradients(gradient, inner, down, sizes)
        of_gated = torch.ops.aten.silu_backward(upped * gradient, gated)
        of_rows, of_gate = _gradients(of_gated, rows, gate, sizes)
        also, of_up = _gradients(active * gradient, rows, up, sizes)
        of_hidden = (of_rows + also)[back].reshape(-1, k, width).sum(1)
        everyone = [xs.get_global_mesh().device_ids.tolist()]
        scattered = []
        for part, dim, like in (
            (of_gate, 2, whole[0]),
            (of_down, 1, whole[1]),
            (of_up, 2, whole[2]),
        ):
            part = torch_xla._XLAC._xla_spmd_reduce_scatter(
                xm.REDUCE_SUM, part, 1 / len(everyone[0]), dim, len(everyone[0]), everyone
            )
            spec = tuple(FSDP if axis == dim else None for axis in range(3))
            scattered.append(leave_manual(part, spec, like.shape))
        return leave_manual(of_hidden, TOKENS, torch.Size((tokens, width))), None, *scattered


def causal_lm_loss(mixtral, tokens, segments=None, counted=None, *, recompute):
    """Return the loss as ``trainer.model.causal_lm_loss`` does, and a routing of zeros."""
    decoder = mixtral.model
    hidden = shard(F.embedding(tokens, decoder.embed_tokens.weight * 1), HIDDEN_SHARDING)
    positions = torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(0)
    embeddings = decoder.rotary_emb(hidden, positions)
    for layer in decoder.layers:
        layer = checkpoint_module(layer) if recompute else layer
        hidden = shard(layer(hidden, position_embeddings=embeddings) * 1, HIDDEN_SHARDING)
    logits = F.linear(decoder.norm(hidden), mixtral.lm_head.weight * 1)
    logits = shard(logits, HIDDEN_SHARDING).float()[:, :-1]
    loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    count = mixtral.config.num_local_experts
    zero = torch.zeros((), device=tokens.device)
    return loss, experts.Routing(zero.expand(count), zero, zero)


if __name__ == "__main__":
    original, experts.split_projections = experts.split_projections, split_projections
    register_experts, register_attention = experts.register, attention.register

    def register() -> None:
        """Register the guide's attention and experts in place of the trainer's."""
        register_experts()
        register_attention()
        modeling_mixtral.rotate_half = attention.llama_rotate_half
        ALL_EXPERTS_FUNCTIONS.register("gmm", gmm)
        AttentionInterface.register(attention.FLASH, flash)

    experts.register = attention.register = register
    sharding.PARAMETER_SHARDING = PARAMETER_SHARDING
    sharding.torus_planes = lambda devices: (1, 1)
    model.causal_lm_loss = causal_lm_loss
    compiling.main(sys.argv[1:])
