"""Weights in and out, against transformers' own from_pretrained and save_pretrained."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

from tests.trainer.stack.layout import as_transformers
from trainer import data, model, weights
from trainer.flags import BadInput

TINY = {
    "model_type": "mixtral",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 320,
    "max_position_embeddings": 128,
}


def theirs(seed: int = 0, **changes) -> MixtralForCausalLM:
    torch.manual_seed(seed)
    return MixtralForCausalLM(MixtralConfig(**TINY | changes)).eval()


def load(directory: Path, dtype: torch.dtype = torch.float32, **changes) -> MixtralForCausalLM:
    config = TINY | changes
    built = model.build(config, experts_mode="gmm", flash_attention=False, dtype=dtype)
    model.load(built, weights.Weights(directory).read)
    return built


def assert_equal(ours: MixtralForCausalLM, expected: MixtralForCausalLM) -> None:
    """Compare all parameters, and the buffers that no file holds."""
    tensors = as_transformers(dict(ours.named_parameters()) | dict(ours.named_buffers()))
    others = dict(expected.named_parameters()) | dict(expected.named_buffers())
    assert tensors.keys() == others.keys()
    for name, other in others.items():
        assert tensors[name].dtype == other.dtype, name
        assert torch.equal(tensors[name], other), name


@pytest.mark.parametrize("published", [True, False], ids=["w1 w2 w3", "fused"])
@pytest.mark.parametrize("shard_size", ["5GB", "100KB"], ids=["one file", "sharded"])
def test_what_transformers_saves_is_loaded(tmp_path, published, shard_size):
    saved = theirs()
    saved.save_pretrained(tmp_path, max_shard_size=shard_size, save_original_format=published)
    assert (tmp_path / "model.safetensors").exists() == (shard_size == "5GB")
    names = {name for file in tmp_path.glob("*.safetensors") for name in load_file(file)}
    assert any("block_sparse_moe.experts.7.w3" in name for name in names) == published
    assert_equal(load(tmp_path), saved)


def test_the_weights_take_the_type_that_is_asked_for(tmp_path):
    theirs().save_pretrained(tmp_path)
    expected = MixtralForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert_equal(load(tmp_path, torch.bfloat16), expected)


def test_a_tied_head_stays_tied(tmp_path):
    saved = theirs(tie_word_embeddings=True)
    saved.save_pretrained(tmp_path)
    ours = load(tmp_path, tie_word_embeddings=True)
    assert_equal(ours, saved)
    assert ours.lm_head.weight is ours.model.embed_tokens.weight


@pytest.fixture(scope="module")
def tokenizer():
    return data._train_tokenizer(["the quick brown fox"], TINY["vocab_size"])


@pytest.mark.parametrize("file_bytes", [2**30, 100_000], ids=["one file", "sharded"])
@pytest.mark.parametrize("tied", [False, True])
def test_transformers_loads_what_is_saved(tmp_path, monkeypatch, tokenizer, file_bytes, tied):
    """Identical logits from what began as transformers' own, went over the mesh, and came back."""
    monkeypatch.setattr(weights, "FILE_BYTES", file_bytes)
    first = theirs(tie_word_embeddings=tied)
    first.save_pretrained(tmp_path / "theirs")
    out = tmp_path / "ours"
    out.mkdir()
    for stale in ("model.safetensors", "model-00001-of-00009.safetensors"):
        (out / stale).write_bytes(b"of an earlier run")
    weights.save(load(tmp_path / "theirs", tie_word_embeddings=tied), tokenizer, out)
    assert (len(list(out.glob("model*.safetensors"))) > 1) == (file_bytes == 100_000)

    second, info = MixtralForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    tokens = torch.arange(40).view(2, 20)
    with torch.no_grad():
        assert torch.equal(second.eval()(tokens).logits, first(tokens).logits)
    text = "the fox is quick"
    assert AutoTokenizer.from_pretrained(out)(text).input_ids == tokenizer(text).input_ids


def refusal(directory: Path, **changes) -> str:
    with pytest.raises(BadInput) as caught:
        load(directory, **changes)
    return str(caught.value)


def test_a_directory_without_weights_is_refused(tmp_path):
    assert f"{tmp_path} has neither model.safetensors.index.json nor" in refusal(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"half a header")
    assert f"{tmp_path}/model.safetensors cannot be read" in refusal(tmp_path)


def test_a_missing_file_is_named(tmp_path):
    theirs().save_pretrained(tmp_path, max_shard_size="100KB")
    missing = sorted(tmp_path.glob("model-*.safetensors"))[2]
    missing.unlink()
    assert f"{missing} is missing" in refusal(tmp_path)


def test_a_missing_tensor_is_named(tmp_path):
    theirs().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.block_sparse_moe.experts.5.w2.weight"
    save_file({key: tensors[key] for key in tensors if key != name}, file)
    assert f"has no tensor {name}" in refusal(tmp_path)


@pytest.mark.parametrize("published", [True, False])
def test_a_wrong_shape_is_named(tmp_path, published):
    theirs().save_pretrained(tmp_path, save_original_format=published)
    message = refusal(tmp_path, intermediate_size=64)
    assert "model.safetensors" in message
    if published:
        assert "experts.0.w1.weight is [96, 64], but the config makes it [64, 64]" in message
    else:
        assert "gate_up_proj is [8, 192, 64], but the config makes it [8, 128, 64]" in message


def test_what_is_neither_a_directory_nor_a_name_on_the_hub_is_refused(tmp_path):
    with pytest.raises(BadInput, match="is no directory here"):
        weights.fetch(str(tmp_path / "nowhere"), None)


MEMORY = """
import sys
from pathlib import Path
from trainer.__main__ import start_client
start_client()
import torch, torch_xla, torch_xla.runtime as xr
from trainer import model, sharding, weights
sharding.make_mesh(xr.global_runtime_device_count())

def mib(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))

def peak(begin):
    before = mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    result = begin()
    return mib("VmHWM") - before, result

class NoTokenizer:
    def save_pretrained(self, directory): pass

directory, config = Path(sys.argv[1]), __import__("json").loads(sys.argv[2])
weights.FILE_BYTES = 8 * 2**20
built = model.build(config, experts_mode="gmm", flash_attention=False, dtype=torch.float32)
loading, _ = peak(lambda: model.load(built, weights.Weights(directory).read))
saving, _ = peak(lambda: weights.save(built, NoTokenizer(), directory))
print(loading, saving)
"""


def test_host_memory_holds_a_few_tensors_not_the_model(tmp_path, devices):
    """Peak memory above the weights themselves, which on CPU devices are in the process, too.

    To be saved, a tensor is gathered on every device.
    """
    config = TINY | {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 24}
    saved = MixtralForCausalLM(MixtralConfig(**config))
    sizes = [parameter.nbytes / 2**20 for parameter in saved.parameters()]
    saved.save_pretrained(tmp_path, max_shard_size="64MB")
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path), json.dumps(config)],
        # Freed memory goes back to the system at once, so that what is counted is in use.
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)},
        capture_output=True,
        text=True,
        timeout=900,
        check=True,
    )
    loading, saving = map(float, done.stdout.split())
    allowed = (4 + 2 * devices) * max(sizes) + 32
    assert allowed < sum(sizes) / 2  # or the bound would say nothing
    assert loading - sum(sizes) < allowed
    assert saving < allowed
