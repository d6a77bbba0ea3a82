"""Adafactor and the schedules against transformers' own."""

from itertools import product

import pytest
import torch
import torch_xla
from transformers import MixtralConfig, MixtralForCausalLM, Trainer, get_scheduler
from transformers.optimization import Adafactor as TheirAdafactor

from trainer.optimizer import NOT_DECAYED, Adafactor, clip_gradients, schedule
from trainer.sharding import partition_spec, shard

SHAPES = {
    "model.norm.weight": (64,),
    "lm_head.weight": (96, 64),
    "model.layers.0.mlp.experts.gate_proj": (4, 64, 24),
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
    mine = Adafactor(ours.items(), weight_decay=0.3)
    groups = [
        {"params": [theirs[name] for name in SHAPES if ("norm" in name) == exempt]}
        | {"weight_decay": 0.0 if exempt else 0.3}
        for exempt in (False, True)
    ]
    other = TheirAdafactor(groups, lr=1e-2, scale_parameter=False, relative_step=False)
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


def test_weights_decay_that_decay_in_transformers():
    with torch.device("meta"):
        model = MixtralForCausalLM(MixtralConfig(num_hidden_layers=1))
    decayed = Trainer.get_decay_parameter_names(None, model)
    names = [name for name, _ in model.named_parameters()]
    assert [n for n in names if not NOT_DECAYED.search(n)] == [n for n in names if n in decayed]
    assert 0 < len(decayed) < len(names)


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


KINDS = ["linear", "cosine", "inverse_sqrt", "constant_with_warmup"]


@pytest.mark.parametrize(("kind", "warmup"), [("constant", 0), *product(KINDS, [0, 7])])
def test_schedules_equal_transformers(kind, warmup):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    theirs = get_scheduler(kind, optimizer, num_warmup_steps=warmup, num_training_steps=30)
    ours = schedule(kind, 0.1, warmup, 30)
    for step in range(30):
        assert ours(step) == pytest.approx(theirs.get_last_lr()[0], abs=1e-9), step
        optimizer.step()
        theirs.step()
