"""The guide's three ways to compute Mixtral's experts, registered with transformers.

``gmm``        tokens sorted by expert, one grouped product per projection; nothing dropped.
``gmm_stack``  the same from one weight per expert, stacked at every forward: a debug mode.
``static``     every expert on every token, unused results weighted with zero: the baseline.

Each has the signature of transformers' experts interface, ``fn(module, hidden, index, weights)``:
hidden ``[N, H]``, the top-k experts of every token ``[N, k]`` (int64) and their weights ``[N, k]``
(fp32), result ``[N, H]`` in hidden's dtype. ``module`` is transformers' ``MixtralExperts`` with
the parameters that :func:`split_projections` gives it. Where the mesh splits ``I`` over its axis
``tensor``, each device computes with its part of every expert, and the parts' results are summed.
"""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from trainer.grouped_matmul import grouped_matmul, kernel
from trainer.sharding import copy_to_tensor_parallel, reduce_from_tensor_parallel

MODES = ("gmm", "gmm_stack", "static")


def register() -> None:
    """Make the three modes known to transformers as ``experts_implementation``."""
    for name, function in (("gmm", gmm), ("gmm_stack", gmm_stack), ("static", static)):
        ALL_EXPERTS_FUNCTIONS.register(name, _split(function))


def split_projections(module: MixtralExperts) -> None:
    """Give transformers' experts ``gate_proj``, ``up_proj`` and ``down_proj``, each ``[E, H, I]``.

    transformers has the first two as one, ``gate_up_proj [E, 2I, H]``. Split on H, which is not the
    last dimension, a weight is gathered into the layout that the kernels want; split on the last
    one, every device would have to copy all of it once more.
    """
    gate_EIH, up_EIH = module.gate_up_proj.data.chunk(2, dim=1)
    projections = {"gate_proj": gate_EIH.mT, "up_proj": up_EIH.mT, "down_proj": module.down_proj}
    del module.gate_up_proj, module.down_proj
    for name, weight in projections.items():
        setattr(module, name, torch.nn.Parameter(weight.data.contiguous()))


def _split(function):
    """Return ``function`` as it computes on experts of which the device holds a part."""

    @functools.wraps(function)
    def run(module, hidden_NH: torch.Tensor, index_NK: torch.Tensor, weights_NK: torch.Tensor):
        hidden_NH, weights_NK = map(copy_to_tensor_parallel, (hidden_NH, weights_NK))
        return reduce_from_tensor_parallel(function(module, hidden_NH, index_NK, weights_NK))

    return run


@dataclass(frozen=True)
class Routing:
    """Where the routers sent a batch, over all of its tokens and all layers; fp32 on the device."""

    load: torch.Tensor  # [E], each expert's share of the tokens' choices; sums to 1
    entropy: torch.Tensor  # of a token's probabilities of the experts, in nats, at most ln E
    aux_loss: torch.Tensor  # the load balancing loss, differentiable; k where all load is equal


@contextlib.contextmanager
def capture_routing(router: torch.nn.Module) -> Iterator[list]:
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
    projections = module.gate_proj, module.up_proj, module.down_proj
    return _grouped(module, projections, hidden_NH, index_NK, weights_NK)


def gmm_stack(module, hidden_NH: torch.Tensor, index_NK: torch.Tensor, weights_NK: torch.Tensor):
    """As :func:`gmm`, from separate weights of each expert, stacked anew."""
    projections = module.gate_proj, module.up_proj, module.down_proj
    stacked = [torch.stack(weight.unbind()) for weight in projections]
    return _grouped(module, stacked, hidden_NH, index_NK, weights_NK)


def static(module, hidden_NH: torch.Tensor, index_NK: torch.Tensor, weights_NK: torch.Tensor):
    """Every expert on every token: E/k times the work of :func:`gmm`."""
    # [N, E]: a token's weight for every expert, zero where it was not routed.
    one_hot_NKE = F.one_hot(index_NK, module.num_experts).to(weights_NK.dtype)
    weights_NE = (weights_NK.unsqueeze(-1) * one_hot_NKE).sum(1).to(hidden_NH.dtype)
    out_NH = torch.zeros_like(hidden_NH)
    for expert in range(module.num_experts):
        gate_NI, up_NI = hidden_NH @ module.gate_proj[expert], hidden_NH @ module.up_proj[expert]
        expert_NH = F.linear(module.act_fn(gate_NI) * up_NI, module.down_proj[expert])
        out_NH = out_NH + expert_NH * weights_NE[:, expert, None]
    return out_NH


def _grouped(module, projections, hidden_NH, index_NK, weights_NK):
    gate_EHI, up_EHI, down_EHI = projections
    tokens, k = index_NK.shape
    experts_M = index_NK.reshape(-1)  # M = N·k rows, one for each token and chosen expert
    order_M = torch.argsort(experts_M, stable=True)
    place_M = torch.argsort(order_M)  # where each of them is, sorted by expert
    sizes_E = F.one_hot(experts_M, module.num_experts).sum(0).to(torch.int32)

    routes = order_M // k, place_M.reshape(tokens, k)
    # Twice, which is one gather: backward then sums both products' gradients while gathering them.
    rows_MH, same_MH = _Dispatch.apply(hidden_NH, *routes), _Dispatch.apply(hidden_NH, *routes)
    weights_M = _Dispatch.apply(weights_NK.reshape(-1), order_M, place_M.unsqueeze(1))
    gate_MI = grouped_matmul(rows_MH, gate_EHI, sizes_E)
    up_MI = grouped_matmul(same_MH, up_EHI, sizes_E)
    # Weighted before the last product, which is linear: no gradient needs its result, so a
    # recomputing backward does not compute it again.
    inner_MI = module.act_fn(gate_MI) * up_MI * weights_M.to(up_MI.dtype).unsqueeze(1)
    rows_MH = grouped_matmul(inner_MI, down_EHI, sizes_E, transpose_rhs=True)
    return _Collect.apply(rows_MH, *routes)


class _Dispatch(torch.autograd.Function):
    """Rows for the experts: ``out[m] = x[source[m]]``; ``places [N, k]`` is where x[n] has gone.

    With it the gradient is a sum of gathers too, where autograd would scatter and add.
    """

    @staticmethod
    def forward(ctx, x, source_M, places_NK):
        ctx.save_for_backward(places_NK)
        return x[source_M]

    @staticmethod
    def backward(ctx, gradient):
        (places_NK,) = ctx.saved_tensors
        return _sum_from(gradient, places_NK), None, None


class _Collect(torch.autograd.Function):
    """What :class:`_Dispatch` has sent out, summed where it came from: its transpose."""

    @staticmethod
    def forward(ctx, rows, source_M, places_NK):
        ctx.save_for_backward(source_M)
        return _sum_from(rows, places_NK)

    @staticmethod
    def backward(ctx, gradient):
        (source_M,) = ctx.saved_tensors
        return gradient[source_M], None, None


def _sum_from(rows: torch.Tensor, places_NK: torch.Tensor) -> torch.Tensor:
    return functools.reduce(torch.add, (rows[places_N] for places_N in places_NK.unbind(1)))
