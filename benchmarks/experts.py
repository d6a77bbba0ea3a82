"""Compare the speed of the expert modes with transformers' own functions, on CPU.

    docker run --rm --volume "$PWD:/src:ro" --workdir /src --entrypoint python \\
        mixtral-trainer:release benchmarks/experts.py [--repeats 5]

runs inside the trainer's image. Measured are forward and backward of one layer's eight experts in
fp32, two experts for each token, with a new random routing every time, as in training: a function
whose program depends on the routing compiles every time. The three modes run through XLA on one
device, transformers' functions both there and in plain torch, if they run at all. The functions
take turns. Prints medians, and how many times as fast as ``static`` each one is.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ |= {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "1"}

from trainer.__main__ import start_client

start_client()

import torch
import torch_xla
import torch_xla.core.xla_model as xm
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from trainer import experts
from trainer.sharding import make_mesh

SIZES = ((256, 512, 2048), (512, 1024, 2048), (1024, 2048, 1024))  # hidden, intermediate, tokens
EXPERTS, TOP_K = 8, 2
THEIRS = ("eager", "batched_mm", "grouped_mm")
LIMIT_GIB = 2.0  # most memory for batched_mm, which copies its experts' weights for each token


def passes(name: str, device: str, size: tuple[int, int, int]) -> Callable[[], None]:
    """Return a function that runs forward and backward once and waits for the result."""
    hidden, intermediate, tokens = size
    config = MixtralConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_local_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
    )
    config._experts_implementation = name
    generator = torch.Generator().manual_seed(0)
    module = MixtralExperts(config)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.02, generator=generator)
    target = torch_xla.device() if device == "xla" else torch.device("cpu")
    if name in experts.MODES:
        experts.split_projections(module)
    module = module.to(target)
    x = torch.randn(tokens, hidden, generator=generator).to(target).requires_grad_()
    leaves = [x, *module.parameters()]

    def run() -> None:
        scores = torch.rand(tokens, EXPERTS, generator=generator)
        weights, index = (t.to(target) for t in scores.softmax(-1).topk(TOP_K))
        gradients = torch.autograd.grad(module(x, index, weights).sum(), leaves)
        if device == "xla":
            torch_xla.sync()
            xm.wait_device_ops()
        del gradients

    return run


def copies_gib(size: tuple[int, int, int]) -> float:
    """Return the GiB of weights that batched_mm copies for all tokens together."""
    hidden, intermediate, tokens = size
    return tokens * TOP_K * 3 * hidden * intermediate * 4 / 2**30


def measure(size: tuple[int, int, int], repeats: int) -> dict[tuple[str, str], float | str]:
    """Return the median seconds of each (function, device), or the reason that it does not run."""
    found: dict[tuple[str, str], float | str] = {}
    runs = {}
    candidates = [(mode, "xla") for mode in experts.MODES]
    candidates += [(name, device) for device in ("xla", "torch") for name in THEIRS]
    for key in candidates:
        if key[0] == "batched_mm" and copies_gib(size) > LIMIT_GIB:
            found[key] = f"{copies_gib(size):.0f} GiB of weights"
            continue
        try:
            run = passes(*key, size)
            run()
            run()
        except (RuntimeError, NotImplementedError, ValueError) as error:
            found[key] = str(error).strip().splitlines()[0][:60]
        else:
            runs[key] = run
    times = {key: [] for key in runs}
    for _ in range(repeats):
        for key, run in runs.items():
            started = time.perf_counter()
            run()
            times[key].append(time.perf_counter() - started)
    return found | {key: statistics.median(of_key) for key, of_key in times.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    make_mesh(1)
    experts.register()
    for size in SIZES:
        hidden, intermediate, tokens = size
        print(f"hidden {hidden}, intermediate {intermediate}, {tokens} tokens", flush=True)
        measured = measure(size, options.repeats)
        static = measured["static", "xla"]
        for (name, device), value in measured.items():
            text = f"does not run: {value}"
            if isinstance(value, float):
                text = f"{value * 1e3:9.1f} ms {static / value:6.2f}×"
            print(f"  {name:10} {device:5} {text}", flush=True)


if __name__ == "__main__":
    main()
