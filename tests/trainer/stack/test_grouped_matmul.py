"""Grouped products and the expert modes against dense products in float64."""

import pytest
import torch
import torch_xla

from trainer import grouped_matmul

SIZES = {
    "even": [64, 64, 64, 64],
    "uneven": [3, 200, 0, 53],
    "one group has all": [0, 0, 256, 0],
    "exact blocks": [128, 0, 128, 0],
    "block and one": [129, 127, 0, 0],
}


def dense(lhs, rhs, sizes):
    """Every group's rows times its own matrix, in float64."""
    rows = lhs.double().split(sizes)
    return torch.cat([x @ w.double().T for x, w in zip(rows, rhs, strict=True)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_products_and_gradients_equal_dense_ones(sizes, dtype):
    generator = torch.Generator().manual_seed(0)
    lhs = torch.randn(sum(sizes), 24, generator=generator).to(dtype)
    rhs = torch.randn(len(sizes), 40, 24, generator=generator).to(dtype)
    seed = torch.randn(sum(sizes), 40, generator=generator).to(dtype)

    ours = [x.to(torch_xla.device()).requires_grad_() for x in (lhs, rhs)]
    group_sizes = torch.tensor(sizes, dtype=torch.int32).to(torch_xla.device())
    out = grouped_matmul.grouped_matmul(*ours, group_sizes)
    gradients = torch.autograd.grad(out, ours, seed.to(torch_xla.device()))

    expected = [x.double().requires_grad_() for x in (lhs, rhs)]
    reference = dense(*expected, sizes)
    reference_gradients = torch.autograd.grad(reference, expected, seed.double())

    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for mine, theirs in zip((out, *gradients), (reference, *reference_gradients), strict=True):
        assert mine.dtype == dtype
        error = (mine.cpu().double() - theirs).norm() / theirs.norm()
        assert error < tolerance


def test_the_portable_kernel_says_its_name():
    assert grouped_matmul.kernel() == "grouped_loop"
