"""Loss and every gradient against transformers' own eager Mixtral, in fp32 on plain CPU."""

import pytest
import torch
import torch_xla
from transformers import MixtralConfig, MixtralForCausalLM

from trainer import experts, model
from trainer.sharding import BATCH_SHARDING, shard

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
}


def tokens(config: dict, batch: int = 8, length: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, config["vocab_size"], (batch, length), generator=generator)


def on_mesh(config: dict, mode: str) -> MixtralForCausalLM:
    built = model.build(config, experts_mode=mode, flash_attention=False, dtype=torch.float32)
    model.initialize(built, seed=0)
    return built


def loss_and_gradients(built, batch, *, recompute: bool):
    on_device = shard(batch.to(torch_xla.device()), BATCH_SHARDING)
    loss = model.causal_lm_loss(built, on_device, recompute=recompute)
    loss.backward()
    torch_xla.sync()
    return loss.item(), {n: p.grad.cpu() for n, p in built.named_parameters()}


def reference(built, config: dict, batch):
    eager = MixtralForCausalLM._from_config(
        MixtralConfig.from_dict(config),
        attn_implementation="eager",
        experts_implementation="eager",
        dtype=torch.float32,
    )
    state = {name: value.cpu() for name, value in built.state_dict().items()}
    eager.load_state_dict(state)
    loss = eager(input_ids=batch, labels=batch).loss
    loss.backward()
    return loss.item(), {n: p.grad for n, p in eager.named_parameters()}


def assert_agree(ours, theirs, relative=1e-5):
    assert ours[0] == pytest.approx(theirs[0], rel=relative)
    assert ours[1].keys() == theirs[1].keys()
    for name, expected in theirs[1].items():
        error = (ours[1][name] - expected).norm() / expected.norm()
        assert error < relative, f"{name}: {error:.1e}"


@pytest.mark.parametrize("mode", experts.MODES)
def test_loss_and_every_gradient_equal_transformers(mode):
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
    ],
    ids=["tied", "window", "top 3", "rope theta, no groups"],
)
def test_what_the_config_says_reaches_the_gradients(change):
    config = TINY | {"num_hidden_layers": 2} | change
    built, batch = on_mesh(config, "gmm"), tokens(config)
    ours = loss_and_gradients(built, batch, recompute=True)
    assert_agree(ours, reference(built, config, batch))


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
    for name, expected in other.named_parameters():
        assert torch.equal(built.get_parameter(name).cpu(), expected), name
