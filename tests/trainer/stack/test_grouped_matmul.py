"""Grouped products and the expert modes against plain torch, for groups and routings at random."""

import functools
import importlib
import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import torch_xla
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer import experts, grouped_matmul

# A shape is compiled once, an example is quick.
examples = settings(max_examples=12, deadline=None, derandomize=True, database=None)
SEEDS = st.integers(0, 2**32 - 1)
BLOCK = grouped_matmul.BLOCK_ROWS


@st.composite
def sizes_of_groups(draw, rows: int, groups: int) -> list[int]:
    """Any way to part rows into groups, of which any may be empty and one may have all."""
    if draw(st.booleans()):
        return draw(st.permutations([rows] + [0] * (groups - 1)))
    cuts = draw(st.lists(st.integers(0, rows), min_size=groups - 1, max_size=groups - 1))
    return [end - start for start, end in itertools.pairwise([0, *sorted(cuts), rows])]


def random(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator)


def with_gradients(function, inputs, seed) -> list[torch.Tensor]:
    """Return the result, and its gradient in every input, of ``seed`` as the result's."""
    out = function(*inputs)
    return [out, *torch.autograd.grad(out, inputs, seed)]


def leaves(tensors, target) -> list[torch.Tensor]:
    return [tensor.to(target).detach().requires_grad_() for tensor in tensors]


def assert_close(ours, theirs, tolerance: float):
    for mine, expected in zip(ours, theirs, strict=True):
        error = (mine.cpu().double() - expected.double()).norm()
        assert error <= tolerance * expected.double().norm().clamp(min=1e-3)


def products(sizes, dtype, k, n, seed, transpose_rhs):
    """Return grouped products with gradients, ours and dense ones in float64."""
    generator = torch.Generator().manual_seed(seed)
    matrix = (n, k) if transpose_rhs else (k, n)
    lhs, rhs = random(generator, sum(sizes), k), random(generator, len(sizes), *matrix)
    inputs, seed = [lhs.to(dtype), rhs.to(dtype)], random(generator, sum(sizes), n).to(dtype)
    device = torch_xla.device()
    groups = torch.tensor(sizes, dtype=torch.int32).to(device)

    def ours(lhs, rhs):
        return grouped_matmul.grouped_matmul(lhs, rhs, groups, transpose_rhs=transpose_rhs)

    def dense(lhs, rhs):
        rhs = rhs.mT if transpose_rhs else rhs
        return torch.cat([x @ w for x, w in zip(lhs.split(sizes), rhs, strict=True)])

    return (
        with_gradients(ours, leaves(inputs, device), seed.to(device)),
        with_gradients(dense, leaves(inputs, torch.float64), seed.double()),
    )


@pytest.mark.parametrize("transpose_rhs", [False, True])
@pytest.mark.parametrize(
    ("rows", "groups", "k", "n", "dtype"),
    [
        (1, 1, 8, 8, torch.float32),
        (7, 8, 5, 3, torch.float32),
        (2 * BLOCK, 4, 24, 40, torch.float32),
        (2 * BLOCK, 4, 24, 40, torch.bfloat16),
        (BLOCK + 1, 8, 16, 32, torch.float32),
        (3 * BLOCK - 1, 3, 64, 16, torch.bfloat16),
    ],
)
@examples
@given(data=st.data(), seed=SEEDS)
def test_products_and_gradients_equal_dense_ones(
    rows, groups, k, n, dtype, transpose_rhs, data, seed
):
    sizes = data.draw(sizes_of_groups(rows, groups))
    ours, theirs = products(sizes, dtype, k, n, seed, transpose_rhs)
    assert all(tensor.dtype == dtype for tensor in ours)
    assert_close(ours, theirs, 1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize(
    ("sizes", "transpose_rhs"), [([3, 200, 0, 54], False), ([0, 0, 257, 0], True)]
)
def test_so_do_those_of_the_tpus_kernel(monkeypatch, sizes, transpose_rhs):
    """JAX's interpreter runs Megablox with the tiles and the padding that a TPU would be given."""
    megablox = importlib.import_module("jax.experimental.pallas.ops.tpu.megablox.gmm")
    for name in ("gmm", "tgmm"):
        kernel = getattr(megablox, name)
        interpreted = functools.wraps(kernel)(functools.partial(kernel, interpret=True))
        monkeypatch.setattr(megablox, name, interpreted)
    monkeypatch.setattr(grouped_matmul, "kernel", lambda: "pallas_megablox")
    ours, theirs = products(sizes, torch.float32, 1100, 72, 0, transpose_rhs)
    assert_close(ours, theirs, 1e-5)


def plain_experts(index, hidden, weights, gate, up, down):
    """Every token times its own copy of its experts' matrices."""
    inner = F.silu(torch.einsum("nh,nkhi->nki", hidden, gate[index]))
    inner = inner * torch.einsum("nh,nkhi->nki", hidden, up[index])
    return torch.einsum("nki,nkhi,nk->nh", inner, down[index], weights)


@pytest.mark.parametrize(
    ("tokens", "count", "top_k", "hidden", "intermediate"),
    [
        (1, 2, 1, 8, 16),
        (5, 8, 2, 16, 24),
        (64, 4, 1, 24, 8),
        (BLOCK, 8, 2, 16, 32),
        (BLOCK // 2 + 1, 6, 3, 8, 12),
        (40, 2, 2, 32, 16),
    ],
)
@examples
@given(data=st.data(), seed=SEEDS)
def test_every_mode_equals_plain_experts(tokens, count, top_k, hidden, intermediate, data, seed):
    chosen = data.draw(st.sets(st.integers(0, count - 1), min_size=top_k), label="with tokens")
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(tokens, len(chosen), generator=generator).argsort(1)[:, :top_k]
    index = torch.tensor(sorted(chosen))[order]
    inputs = [
        random(generator, tokens, hidden),
        torch.rand(tokens, top_k, generator=generator).softmax(-1),
        *(random(generator, count, hidden, intermediate) for _ in range(3)),
    ]
    gradient = random(generator, tokens, hidden)
    device = torch_xla.device()
    on_device = index.to(device)
    theirs = with_gradients(
        functools.partial(plain_experts, index), leaves(inputs, torch.float64), gradient.double()
    )

    def run(mode, hidden, weights, gate, up, down):
        module = SimpleNamespace(
            num_experts=count, gate_proj=gate, up_proj=up, down_proj=down, act_fn=F.silu
        )
        return getattr(experts, mode)(module, hidden, on_device, weights)

    ours = {
        mode: with_gradients(
            functools.partial(run, mode), leaves(inputs, device), gradient.to(device)
        )
        for mode in experts.MODES
    }
    torch_xla.sync()  # one program for all of them
    for results in ours.values():
        assert_close(results, theirs, 1e-5)


def test_the_portable_kernel_says_its_name():
    assert grouped_matmul.kernel() == "grouped_loop"
