"""The guide's three modes of computing Mixtral's experts, registered with transformers.

``gmm``        tokens sorted by expert, one grouped product per projection; no capacity limit, so no
               token is dropped.
``gmm_stack``  as ``gmm``, with weights per expert that are stacked in every forward: for debugging.
``static``     every expert computes every token, unused results weighted with zero: the baseline.

Each has the signature of transformers' experts interface, ``fn(module, hidden, index, weights)``:
hidden ``[N, H]``, the top-k experts of every token ``[N, k]`` (int64) and their weights ``[N, k]``
(fp32), result ``[N, H]`` in hidden's dtype. ``module`` is transformers' ``MixtralExperts`` with
the parameters of :func:`split_projections`. Where the mesh has a tensor-parallel axis, it splits
``I``: each device computes with its part of every expert, and an all-reduce sums the results.
"""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from .grouped_matmul import grouped_matmul, kernel
from .sharding import copy_to_tensor_parallel, reduce_from_tensor_parallel

MODES = ("gmm", "gmm_stack", "static")


def register() -> None:
    """Register the three modes with transformers as ``experts_implementation``."""
    for name, function in (("gmm", gmm), ("gmm_stack", gmm_stack), ("static", static)):
        ALL_EXPERTS_FUNCTIONS.register(name, _tensor_parallel(function))


def split_projections(module: MixtralExperts) -> None:
    """Give transformers' experts ``gate_proj``, ``up_proj`` and ``down_proj``, each ``[E, H, I]``.

    transformers has gate and up as one parameter, ``gate_up_proj [E, 2I, H]``. FSDP splits a weight
    along H. While H is not the last dimension, the all-gather writes the layout that the kernels
    need; along the last one, every device would copy the whole weight once more.
    """
    gate_EIH, up_EIH = module.gate_up_proj.data.chunk(2, dim=1)
    projections = {"gate_proj": gate_EIH.mT, "up_proj": up_EIH.mT, "down_proj": module.down_proj}
    del module.gate_up_proj, module.down_proj
    for name, weight in projections.items():
        setattr(module, name, torch.nn.Parameter(weight.data.contiguous()))


def _tensor_parallel(function):
    """Return ``function`` for experts whose width ``I`` is split over the tensor-parallel axis."""

    @functools.wraps(function)
    def run(module, hidden_NH: torch.Tensor, index_NK: torch.Tensor, weights_NK: torch.Tensor):
        hidden_NH, weights_NK = map(copy_to_tensor_parallel, (hidden_NH, weights_NK))
        return reduce_from_tensor_parallel(function(module, hidden_NH, index_NK, weights_NK))

    return run


@dataclass(frozen=True)
class Routing:
    """How the routers distributed a batch, as means over its tokens and all layers; fp32."""

    load: torch.Tensor  # [E], the share of the tokens' choices that fell on each expert; sums to 1
    entropy: torch.Tensor  # scalar: of a token's expert probabilities, in nats, at most ln E
    aux_loss: torch.Tensor  # scalar: load balancing loss, differentiable; top_k at equal load


@contextlib.contextmanager
def capture_routing(router: torch.nn.Module) -> Iterator[list]:
    """Collect the outputs of ``router``, transformers' ``MixtralTopKRouter``, in this context."""
    outputs: list = []
    hook = router.register_forward_hook(lambda _module, _args, output: outputs.append(output))
    try:
        yield outputs
    finally:
        hook.remove()


def routing_means(logits_NE: torch.Tensor, index_NK: torch.Tensor) -> torch.Tensor:
    """Return the means over tokens that :func:`routing` needs, fp32 ``[2E + 1]``.

    They are each expert's share of the choices, each expert's probability, and the entropy.
    """
    log_NE = F.log_softmax(logits_NE.float(), dim=-1)
    probability_NE = log_NE.exp()
    load_E = F.one_hot(index_NK, logits_NE.shape[-1]).float().mean((0, 1))
    entropy = -(probability_NE.detach() * log_NE.detach()).sum(-1).mean(0, keepdim=True)
    return torch.cat([load_E, probability_NE.mean(0), entropy])


def routing(means: torch.Tensor, experts: int, top_k: int) -> Routing:
    """Return the routing from ``[…, 2E + 1]``, :func:`routing_means` of equally many tokens each.

    The auxiliary loss is E · Σ_e f_e · P_e (Fedus et al. 2021, equations 4 to 6) as in
    transformers: f_e is the mean number of times that a token chose e, P_e the mean probability of
    e, both over the tokens of all layers.
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
    """Compute each token's experts by grouped products over the tokens sorted by expert."""
    projections = module.gate_proj, module.up_proj, module.down_proj
    return _grouped(module, projections, hidden_NH, index_NK, weights_NK)


def gmm_stack(module, hidden_NH: torch.Tensor, index_NK: torch.Tensor, weights_NK: torch.Tensor):
    """Compute as :func:`gmm`, from the weights of single experts, which are stacked again."""
    projections = module.gate_proj, module.up_proj, module.down_proj
    stacked = [torch.stack(weight.unbind()) for weight in projections]
    return _grouped(module, stacked, hidden_NH, index_NK, weights_NK)


def static(module, hidden_NH: torch.Tensor, index_NK: torch.Tensor, weights_NK: torch.Tensor):
    """Compute every expert for every token: E/k times the work of :func:`gmm`."""
    # [N, E]: a token's weight for every expert, zero for those that the router did not choose
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
    place_M = torch.argsort(order_M)  # the position of every row after sorting by expert
    sizes_E = F.one_hot(experts_M, module.num_experts).sum(0).to(torch.int32)

    routes = order_M // k, place_M.reshape(tokens, k)
    # Two uses, one gather after compilation: backward sums the gradients of both while gathering.
    rows_MH, same_MH = _Dispatch.apply(hidden_NH, *routes), _Dispatch.apply(hidden_NH, *routes)
    weights_M = _Dispatch.apply(weights_NK.reshape(-1), order_M, place_M.unsqueeze(1))
    gate_MI = grouped_matmul(rows_MH, gate_EHI, sizes_E)
    up_MI = grouped_matmul(same_MH, up_EHI, sizes_E)
    # The routing weights come before the last product, which is linear. No gradient needs that
    # product's result then, so a backward that recomputes the layer leaves the product out.
    inner_MI = module.act_fn(gate_MI) * up_MI * weights_M.to(up_MI.dtype).unsqueeze(1)
    rows_MH = grouped_matmul(inner_MI, down_EHI, sizes_E, transpose_rhs=True)
    return _Collect.apply(rows_MH, *routes)


class _Dispatch(torch.autograd.Function):
    """Gathers the experts' rows: ``out[m] = x[source[m]]``.

    ``places [N, k]`` are the rows of ``out`` that hold x[n]. With them backward is a sum of
    gathers; autograd's own backward of a gather is a scatter with addition.
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
    """Sums the k rows of each token, ``out[n] = Σ rows[places[n]]``: transpose of _Dispatch."""

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
