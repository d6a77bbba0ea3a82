"""The step as it runs on a TPU, by the real TPU compiler: two layers of Mixtral 8x7B."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.plan import __main__ as plan
from trainer.tpu import CHIPS, parse_accelerator_type

ROOT = Path(__file__).parents[3]
PRESETS = ROOT / "trainer/presets"
# Without the flags that make compiling for CPU quick: the TPU's compiler reads them too.
ENVIRONMENT = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "XLA_FLAGS": ""}
LAYERS, BLOCK, BATCH = 2, 1024, 8
# Bytes of one layer in bfloat16: experts, attention, router and two norms
LAYER_BYTES = 2 * (8 * 3 * 4096 * 14336 + 2 * 4096 * (4096 + 1024) + 8 * 4096 + 2 * 4096)


def planned(
    tmp_path: Path, accelerator_type: str, *flags: str, preset: str = "mixtral-8x7b"
) -> tuple[int, dict, str]:
    """Run trainer.plan on two layers; return its exit code, plan.json and what it printed."""
    config = tmp_path / "config.json"
    whole = json.loads((PRESETS / f"{preset}.json").read_text())
    config.write_text(json.dumps(whole | {"num_hidden_layers": LAYERS}))
    command = [
        *(sys.executable, "-m", "trainer.plan", "--accelerator_type", accelerator_type),
        *("--do_train", "--output_dir", str(tmp_path), "--config_name", str(config)),
        *("--dataset_name", "python-help", "--block_size", str(BLOCK), "--flash_attention"),
        *("--per_device_train_batch_size", str(BATCH), "--torch_dtype", "bfloat16"),
        *("--fsdp_config", str(PRESETS / "fsdp_config.json"), *flags),
    ]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=3600,
        check=False,
    )
    written = tmp_path / "plan.json"
    found = json.loads(written.read_text()) if written.exists() else {}
    return done.returncode, found, done.stdout + done.stderr


def in_layers(found: dict, kind: str, moves: str) -> int:
    return sum(
        one["bytes_per_chip"]
        for one in found["collectives"]
        if one["in_layers"] and (one["kind"], one["moves"]) == (kind, moves)
    )


# Splash attention: forward, the same recomputed, two kernels in backward. Megablox: three products
# forward, two of them recomputed, and two for each in backward.
STEPS = [
    ("v5p-8", "gmm", 1, 15),
    ("v5p-8", "gmm_stack", 1, 15),
    ("v5p-8", "static", 1, 4),
    ("v4-8", "gmm", 2, 15),
    ("v5litepod-8", "gmm", 1, 15),
    ("v6e-4", "gmm", 1, 15),
]


def test_a_step_is_compiled_for_every_chip():
    assert {parse_accelerator_type(step[0])[0].name for step in STEPS} == CHIPS.keys()


@pytest.mark.parametrize(("accelerator_type", "mode", "tensor", "kernels"), STEPS)
def test_the_step_compiles(tmp_path, accelerator_type, mode, tensor, kernels):
    flags = ["--spmd_2d_sharding", str(tensor)] if tensor > 1 else ["--fsdp", "full_shard"]
    if accelerator_type == "v6e-4":
        flags.append("--reset_attention_mask")
    code, found, said = planned(tmp_path, accelerator_type, f"--{mode}", *flags)
    assert code == plan.FITS, said
    assert found["pallas_calls"] == kernels
    # What FSDP has to move: every weight in for forward and for backward, every gradient out once.
    chips = found["chips"]
    least = LAYERS * LAYER_BYTES / tensor * (1 - tensor / chips)
    assert 2 * least <= in_layers(found, "all-gather", "weights") <= 2.01 * least
    # The compiler makes all-reduces, of twice the bytes, of some small ones.
    scattered = in_layers(found, "reduce-scatter", "gradients")
    reduced = in_layers(found, "all-reduce", "gradients") / 2
    assert scattered + reduced == pytest.approx(least, rel=0.01)
    assert reduced < 0.05 * least
    if tensor == 1:
        moved = [one["moves"] for one in found["collectives"] if one["in_layers"]]
        assert "activations" not in moved
    # The model's FLOPs count attention whole, of which causal kernels compute half; static computes
    # all eight experts where two are chosen.
    attention = 12 * LAYERS * 4096 * BLOCK / 2 * BATCH * BLOCK / chips
    expert = 6 * LAYERS * 3 * 4096 * 14336 * BATCH * BLOCK / chips
    expected = found["model_flops"] - attention + (6 * expert if mode == "static" else 0)
    once = found["flops_per_chip"] - found["recomputed_flops_per_chip"]
    assert once == pytest.approx(expected, rel=0.03)
    # Adafactor keeps a fraction of the weights, which are bfloat16 and split over all chips.
    parameters = LAYERS * LAYER_BYTES / 2 + (2 * 32000 + 1) * 4096
    memory = found["hbm_per_chip_gib"]
    assert memory["weights"] == pytest.approx(2 * parameters / chips / 2**30, rel=0.01)
    assert memory["total"] < memory["limit"]
    assert 0 < found["modelled"]["mfu"] < 1


def test_what_is_too_large_does_not_fit_and_what_would_is_named(tmp_path):
    # Attention without a kernel keeps every score.
    flags = ["--static", "--per_device_train_batch_size", "512"]
    code, found, said = planned(tmp_path, "v5litepod-1", *flags, preset="mixtral-tiny")
    assert code == plan.DOES_NOT_FIT, said
    assert found["fits"] is False
    assert any("v5e-" in change for change in found["what_to_change"])


def test_grouped_products_of_any_size_compile():
    """The largest of Mixtral 8x22B, with the tiles of the 8x7B's, and sizes that no tile fits."""
    cases = ["bfloat16,16384,6144,32768", "bfloat16,1000,1100,2000", "float32,40,72,1300"]
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("compile_products.py"), "v5p-8", *cases],
        env=ENVIRONMENT | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=3600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.splitlines()[-1]) == 3 * len(cases)
