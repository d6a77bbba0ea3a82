"""Adafactor and the schedules against transformers' own."""

import pytest
import torch
import torch_xla
from transformers import get_scheduler
from transformers.optimization import Adafactor as TheirAdafactor

from trainer.optimizer import Adafactor, clip_gradients, schedule
from trainer.sharding import partition_spec, shard

SHAPES = {
    "model.norm.weight": (64,),
    "lm_head.weight": (96, 64),
    "model.layers.0.mlp.experts.gate_up_proj": (4, 48, 64),
}


def both(dtype):
    generator = torch.Generator().manual_seed(0)
    values = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    ours = {
        name: torch.nn.Parameter(
            shard(value.to(dtype).to(torch_xla.device()), partition_spec(name))
        )
        for name, value in values.items()
    }
    theirs = {name: torch.nn.Parameter(value.to(dtype)) for name, value in values.items()}
    return ours, theirs


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=["fp32", "bf16"]
)
def test_adafactor_equals_transformers(dtype, tolerance):
    ours, theirs = both(dtype)
    mine = Adafactor(ours.items())
    other = TheirAdafactor(theirs.values(), lr=1e-2, scale_parameter=False, relative_step=False)
    generator = torch.Generator().manual_seed(1)
    for step in range(4):
        for name, shape in SHAPES.items():
            gradient = torch.randn(shape, generator=generator).to(dtype)
            theirs[name].grad = gradient
            ours[name].grad = gradient.to(torch_xla.device())
        other.step()
        rates = torch.tensor([1e-2, Adafactor.decay(step)]).to(torch_xla.device())
        mine.step(rates[0], rates[1])
        torch_xla.sync()
    for name, expected in theirs.items():
        error = (ours[name].cpu().float() - expected.float()).abs().max() / expected.abs().max()
        assert error < tolerance, name


@pytest.mark.parametrize("max_norm", [0.5, 1e3], ids=["clipped", "untouched"])
def test_clipping_equals_torch(max_norm):
    ours, theirs = both(torch.float32)
    generator = torch.Generator().manual_seed(2)
    for name, shape in SHAPES.items():
        theirs[name].grad = torch.randn(shape, generator=generator)
        ours[name].grad = theirs[name].grad.to(torch_xla.device())
    clip_gradients(ours.values(), max_norm)
    torch.nn.utils.clip_grad_norm_(theirs.values(), max_norm)
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name].grad.cpu(), expected.grad)


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0, 7])
def test_schedules_equal_transformers(kind, warmup):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    name = "constant_with_warmup" if kind == "constant" else kind
    theirs = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=30)
    ours = schedule(kind, 0.1, warmup, 30)
    for step in range(30):
        assert ours(step) == pytest.approx(theirs.get_last_lr()[0], abs=1e-9), step
        optimizer.step()
        theirs.step()
