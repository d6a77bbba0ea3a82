"""Loss and every gradient against transformers' own eager Mixtral, in fp32 on plain CPU."""

import itertools
import math
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch_xla
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from tests.trainer.stack.layout import as_transformers
from trainer import experts, loop, model
from trainer.data import Blocks, validation_batches
from trainer.sharding import BATCH_SHARDING, local_rows, make_mesh, shard
from trainer.step import StepOptions, TrainStep

TINY = {
    "model_type": "mixtral",
    "num_hidden_layers": 3,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 320,
    "max_position_embeddings": 128,
    "output_router_logits": True,
    "router_aux_loss_coef": 10.0,
}


def tokens(config: dict, batch: int = 8, length: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, config["vocab_size"], (batch, length), generator=generator)


def on_mesh(config: dict, mode: str) -> MixtralForCausalLM:
    built = model.build(config, experts_mode=mode, flash_attention=False, dtype=torch.float32)
    model.initialize(built, seed=0)
    return built


def loss_and_gradients(built, *inputs, recompute: bool):
    on_device = [shard(x.to(torch_xla.device()), BATCH_SHARDING) for x in inputs]
    cross_entropy, routing = model.causal_lm_loss(built, *on_device, recompute=recompute)
    loss = model.training_loss(built.config, cross_entropy, routing)
    loss.backward()
    torch_xla.sync()
    values = {"loss": loss, "load": routing.load, "entropy": routing.entropy}
    values |= as_transformers({n: p.grad for n, p in built.named_parameters()})
    return {name: value.detach().cpu() for name, value in values.items()}


def eager_of(built, config: dict) -> MixtralForCausalLM:
    """transformers' own model with the same weights."""
    eager = MixtralForCausalLM._from_config(
        MixtralConfig.from_dict(config),
        attn_implementation="eager",
        experts_implementation="eager",
        dtype=torch.float32,
    )
    eager.load_state_dict(as_transformers(built.state_dict()))
    return eager


def reference(built, config: dict, batch, lengths: list[list[int]] | None = None):
    """transformers' own loss and gradients, with ``lengths`` of each document of a row alone."""
    eager = eager_of(built, config)
    if not lengths:
        # Its loss is as config says; routers' logits it gives only where they are in the loss.
        loss = eager(input_ids=batch, labels=batch).loss
        outs = [eager(input_ids=batch, output_router_logits=True)]
    else:
        rows = zip(batch, lengths, strict=True)
        documents = [part[None] for row, row_lengths in rows for part in row.split(row_lengths)]
        outs = [eager(input_ids=one, output_router_logits=True) for one in documents]
        losses = [
            F.cross_entropy(out.logits[0, :-1], one[0, 1:], reduction="sum")
            for out, one in zip(outs, documents, strict=True)
        ]
        loss = sum(losses) / sum(one.numel() - 1 for one in documents)
        logits = tuple(map(torch.cat, zip(*(out.router_logits for out in outs), strict=True)))
        loss = loss + config["router_aux_loss_coef"] * load_balancing_loss_func(
            logits, config["num_local_experts"], config["num_experts_per_tok"]
        )
    loss.backward()
    logits = torch.cat([layer.detach() for out in outs for layer in out.router_logits])
    chosen = logits.topk(config["num_experts_per_tok"]).indices
    load = torch.bincount(chosen.flatten(), minlength=logits.shape[1]) / chosen.numel()
    entropy = torch.distributions.Categorical(logits=logits).entropy().mean()
    values = {"loss": loss.detach(), "load": load, "entropy": entropy}
    return values | {n: p.grad for n, p in eager.named_parameters()}


def assert_agree(ours, theirs, relative=1e-5):
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        error = (ours[name] - expected).norm() / expected.norm()
        assert error < relative, f"{name}: {error:.1e}"


# All devices along one axis, and what two along another one leave; slices know nothing of experts.
MESHES = {
    "fsdp": {},
    "2d": {"tensor": 2},
    "slices": {"slices": 2},
    "planes": {"planes": (2, 2)},  # as on a torus of three dimensions
    "rows": {"planes": (1, 2)},  # as on one of two
}
CASES = [("fsdp", mode) for mode in experts.MODES]
if os.environ["CPU_NUM_DEVICES"] != "1":
    CASES += [("2d", mode) for mode in experts.MODES]
    CASES += [(axes, "gmm") for axes in ("slices", "planes", "rows")]


@pytest.mark.parametrize(("axes", "mode"), CASES)
def test_loss_and_every_gradient_equal_transformers(axes, mode, devices):
    make_mesh(devices, **MESHES[axes])
    built, batch = on_mesh(TINY, mode), tokens(TINY)
    ours = loss_and_gradients(built, batch, recompute=True)
    assert_agree(ours, reference(built, TINY, batch))


@pytest.mark.parametrize(
    "change",
    [
        {"tie_word_embeddings": True},
        {"sliding_window": 8},
        {"num_experts_per_tok": 3},
        {"rope_theta": 1e6, "num_key_value_heads": 8},
        {"output_router_logits": False},
    ],
    ids=["tied", "window", "top 3", "rope theta, no groups", "no auxiliary loss"],
)
def test_what_the_config_says_reaches_the_gradients(change):
    config = TINY | {"num_hidden_layers": 2} | change
    built, batch = on_mesh(config, "gmm"), tokens(config)
    ours = loss_and_gradients(built, batch, recompute=True)
    assert_agree(ours, reference(built, config, batch))


LENGTHS = [[32], [1, 31], [5, 20, 7], [16, 16], [30, 2], [3, 1, 1, 27], [10, 22], [8, 8, 8, 8]]


@pytest.mark.parametrize("recompute", [True, False])
def test_packed_documents_do_not_see_each_other(recompute):
    config = TINY | {"num_hidden_layers": 2, "sliding_window": 12}
    built, batch = on_mesh(config, "gmm"), tokens(config)
    ids = [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in LENGTHS]
    ours = loss_and_gradients(built, batch, torch.stack(ids).int(), recompute=recompute)
    assert_agree(ours, reference(built, config, batch, LENGTHS))


@pytest.mark.parametrize("isolate", [False, True])
def test_an_evaluation_has_every_predicted_token_once(isolate, devices):
    config = TINY | {"num_hidden_layers": 1}
    built, batch = on_mesh(config, "gmm"), tokens(config, batch=11)
    lengths = [3, 40, 29, 100, 1, 60, 119]
    ends = np.cumsum(lengths)
    text = Blocks(batch.int().numpy(), bytes_per_token=1.0, tokenizer=None, ends=ends)
    batches = validation_batches(text, local_rows(8), 8, isolate)
    options = StepOptions(
        experts_mode="gmm",
        flash_attention=False,
        dtype="float32",
        tensor_devices=1,
        recompute=True,
        isolate_documents=isolate,
        accumulation=1,
        max_grad_norm=1.0,
        weight_decay=0.0,
    )
    found = loop.evaluate(TrainStep(options, built), batches)

    eager = eager_of(built, config)
    borders = sorted({*range(0, batch.numel() + 1, batch.shape[1]), *(ends if isolate else ())})
    pieces = [batch.flatten()[a:b][None] for a, b in itertools.pairwise(borders)]
    with torch.no_grad():
        sums = [
            F.cross_entropy(eager(one).logits[0, :-1], one[0, 1:], reduction="sum").item()
            for one in pieces
        ]
    expected = math.fsum(sums) / sum(one.numel() - 1 for one in pieces)
    assert found == pytest.approx(expected, rel=1e-6)


def test_without_recomputation_nothing_changes():
    built, batch = on_mesh(TINY, "gmm"), tokens(TINY)
    ours = loss_and_gradients(built, batch, recompute=False)
    assert_agree(ours, reference(built, TINY, batch))


def test_every_parameter_is_sharded_over_all_devices(devices):
    built = on_mesh(TINY, "gmm")
    for name, parameter in built.named_parameters():
        spec = torch_xla._XLAC._get_xla_sharding_spec(parameter.data)
        if devices == 1:
            assert "devices=" not in spec
            continue
        tiles = spec.split("devices=[")[1].split("]")[0].split(",")
        assert str(devices) in tiles, f"{name}: {spec}"


def test_the_weights_do_not_depend_on_the_number_of_devices():
    """The same seed gives transformers' own order of random numbers, drawn module by module."""
    built = on_mesh(TINY, "gmm")
    torch.manual_seed(0)
    with torch.device("meta"):
        other = MixtralForCausalLM(MixtralConfig.from_dict(TINY))
    other.to_empty(device="cpu")
    for module in other.modules():
        other._init_weights(module)
    ours = as_transformers(dict(built.named_parameters()))
    for name, expected in other.named_parameters():
        assert torch.equal(ours[name], expected), name
