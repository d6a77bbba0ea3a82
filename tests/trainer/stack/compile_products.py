"""Compile grouped products, forward and backward, for a slice of TPUs that is not there.

    python compile_products.py ACCELERATOR_TYPE DTYPE,ROWS,K,N …

Prints how many Pallas kernels the compiled program calls. A program of its own, because libtpu may
end the process instead of raising.
"""

import os
import sys

from trainer.plan import compile as compiling
from trainer.plan.hlo import Compiled
from trainer.tpu import parse_slice

GROUPS = 8


def traced(cases: list[str]) -> str:
    """Return the MLIR of the products and their gradients."""
    import torch
    import torch_xla
    from jaxlib import _jax

    from trainer.grouped_matmul import grouped_matmul

    outputs = []
    for case in cases:
        name, *numbers = case.split(",")
        rows, k, n = map(int, numbers)
        options = {"dtype": getattr(torch, name), "device": torch_xla.device()}
        # Nothing that a constant could be folded from.
        lhs, rhs = torch.rand(rows, k, **options), torch.rand(GROUPS, k, n, **options)
        sizes = torch.randint(0, 9, (GROUPS,), dtype=torch.int32, device=torch_xla.device())
        lhs, rhs = lhs.requires_grad_(), rhs.requires_grad_()
        out = grouped_matmul(lhs, rhs, sizes)
        outputs += [out, *torch.autograd.grad(out, (lhs, rhs), out.detach())]
    proto = torch_xla._XLAC._get_xla_tensors_hlo_proto(outputs)
    return _jax.mlir.xla_computation_to_mlir_module(_jax.XlaComputation(proto))


if __name__ == "__main__":
    os.environ |= compiling.ENVIRONMENT
    slice_ = parse_slice(sys.argv[1])
    compiling.trace_for(slice_)
    executable = compiling.compile_(traced(sys.argv[2:]), slice_)
    print(Compiled(executable.hlo_modules()[0].to_string(), 1).pallas_calls())
