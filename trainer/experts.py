"""The guide's three ways to compute Mixtral's experts, registered with transformers.

``gmm``        tokens sorted by expert, one grouped product per projection; nothing dropped.
``gmm_stack``  the same from one weight per expert, stacked at every forward: a debug mode.
``static``     every expert on every token, unused results weighted with zero: the baseline.

Each has the signature of transformers' experts interface, ``fn(module, hidden, index, weights)``:
hidden ``[N, H]``, the top-k experts of every token ``[N, k]`` (int64) and their weights ``[N, k]``
(fp32), result ``[N, H]`` in hidden's dtype. ``module`` is transformers' ``MixtralExperts`` with
``gate_up_proj [E, 2I, H]`` and ``down_proj [E, H, I]``. Where the mesh splits ``I`` over its axis
``tensor``, each device computes with its part of every expert, and the parts' results are summed.
"""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from trainer.grouped_matmul import grouped_matmul, kernel
from trainer.sharding import combine, spread

MODES = ("gmm", "gmm_stack", "static")


def register() -> None:
    """Make the three modes known to transformers as ``experts_implementation``."""
    for name, function in (("gmm", gmm), ("gmm_stack", gmm_stack), ("static", static)):
        ALL_EXPERTS_FUNCTIONS.register(name, _split(function))


def _split(function):
    """Return ``function`` as it computes on experts of which the device holds a part."""

    @functools.wraps(function)
    def run(module, hidden_NH: torch.Tensor, index_NK: torch.Tensor, weights_NK: torch.Tensor):
        return combine(function(module, spread(hidden_NH), index_NK, spread(weights_NK)))

    return run


@dataclass(frozen=True)
class Routing:
    """Where the routers sent a batch, over all of its tokens and all layers; fp32 on the device."""

    load: torch.Tensor  # [E], each expert's share of the tokens' choices; sums to 1
    entropy: torch.Tensor  # of a token's probabilities of the experts, in nats, at most ln E
    aux_loss: torch.Tensor  # the load balancing loss, differentiable; k where all load is equal


@contextlib.contextmanager
def routed(router: torch.nn.Module) -> Iterator[list]:
    """Collect what ``router``, transformers' ``MixtralTopKRouter``, returns in this context."""
    outputs: list = []
    hook = router.register_forward_hook(lambda _module, _args, output: outputs.append(output))
    try:
        yield outputs
    finally:
        hook.remove()


def routing_means(logits_NE: torch.Tensor, index_NK: torch.Tensor) -> torch.Tensor:
    """Return what :class:`Routing` is made of, as means over tokens, fp32 ``[2E + 1]``.

    Each expert's share of the tokens' choices, its mean probability, and the mean entropy.
    """
    log_NE = F.log_softmax(logits_NE.float(), dim=-1)
    probability_NE = log_NE.exp()
    load_E = F.one_hot(index_NK, logits_NE.shape[-1]).float().mean((0, 1))
    entropy = -(probability_NE.detach() * log_NE.detach()).sum(-1).mean(0, keepdim=True)
    return torch.cat([load_E, probability_NE.mean(0), entropy])


def routing(means: torch.Tensor, experts: int, top_k: int) -> Routing:
    """Return the routing of equally many tokens each from :func:`routing_means`, ``[…, 2E + 1]``.

    The auxiliary loss is E · Σ_e f_e · P_e (Fedus et al. 2021, equations 4 to 6) as in
    transformers: f_e is how often a token chose e, and means are over the tokens of all layers.
    """
    means = means.flatten(0, -2).mean(0)
    load_E, probability_E, entropy = means.split([experts, experts, 1])
    load_E = load_E.detach()
    aux_loss = experts * top_k * (load_E * probability_E).sum()
    return Routing(load_E, entropy.detach().squeeze(0), aux_loss)


def kernel_of(mode: str) -> str:
    """Return the name of the kernel that ``mode`` runs on this device."""
    return "dense" if mode == "static" else kernel()


def gmm(module, hidden_NH: torch.Tensor, index_NK: torch.Tensor, weights_NK: torch.Tensor):
    """Grouped products over the tokens sorted by expert. See the module's docstring."""
    return _grouped(module, hidden_NH, index_NK, weights_NK, _fused_feed_forward)


def gmm_stack(module, hidden_NH: torch.Tensor, index_NK: torch.Tensor, weights_NK: torch.Tensor):
    """As :func:`gmm`, from separate gate, up and down weights of each expert, stacked anew."""
    return _grouped(module, hidden_NH, index_NK, weights_NK, _stacked_feed_forward)


def static(module, hidden_NH: torch.Tensor, index_NK: torch.Tensor, weights_NK: torch.Tensor):
    """Every expert on every token: E/k times the work of :func:`gmm`."""
    # [N, E]: a token's weight for every expert, zero where it was not routed.
    one_hot_NKE = F.one_hot(index_NK, module.num_experts).to(weights_NK.dtype)
    weights_NE = (weights_NK.unsqueeze(-1) * one_hot_NKE).sum(1).to(hidden_NH.dtype)
    out_NH = torch.zeros_like(hidden_NH)
    for expert in range(module.num_experts):
        gate, up = F.linear(hidden_NH, module.gate_up_proj[expert]).chunk(2, dim=-1)
        expert_NH = F.linear(module.act_fn(gate) * up, module.down_proj[expert])
        out_NH = out_NH + expert_NH * weights_NE[:, expert, None]
    return out_NH


def _grouped(module, hidden_NH, index_NK, weights_NK, feed_forward):
    tokens, k = index_NK.shape
    experts_M = index_NK.reshape(-1)  # M = N·k rows, one for each token and chosen expert
    order_M = torch.argsort(experts_M, stable=True)
    inverse_M = torch.argsort(order_M)
    sizes_E = F.one_hot(experts_M, module.num_experts).sum(0).to(torch.int32)

    rows_MH = hidden_NH.unsqueeze(1).expand(-1, k, -1).reshape(tokens * k, -1)
    rows_MH = _Permute.apply(rows_MH, order_M, inverse_M)
    rows_MH = feed_forward(module, rows_MH, sizes_E)
    rows_NKH = _Permute.apply(rows_MH, inverse_M, order_M).reshape(tokens, k, -1)
    return (rows_NKH * weights_NK.to(rows_NKH.dtype).unsqueeze(-1)).sum(1)


def _fused_feed_forward(module, rows_MH, sizes_E):
    gate, up = grouped_matmul(rows_MH, module.gate_up_proj, sizes_E).chunk(2, dim=-1)
    return grouped_matmul(module.act_fn(gate) * up, module.down_proj, sizes_E)


def _stacked_feed_forward(module, rows_MH, sizes_E):
    gates, ups = zip(*(weight.chunk(2, dim=0) for weight in module.gate_up_proj), strict=True)
    gate = grouped_matmul(rows_MH, torch.stack(gates), sizes_E)
    up = grouped_matmul(rows_MH, torch.stack(ups), sizes_E)
    return grouped_matmul(module.act_fn(gate) * up, torch.stack(list(module.down_proj)), sizes_E)


class _Permute(torch.autograd.Function):
    """Rows in another order; the gradient is a gather too, where autograd would scatter and add."""

    @staticmethod
    def forward(ctx, rows_MH, order_M, inverse_M):
        ctx.save_for_backward(inverse_M)
        return rows_MH[order_M]

    @staticmethod
    def backward(ctx, gradient_MH):
        (inverse_M,) = ctx.saved_tensors
        return gradient_MH[inverse_M], None, None
