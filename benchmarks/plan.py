"""What the plan says of Mixtral 8x7B on whole slices: inside the trainer's image, without a TPU.

    docker run --rm --volume "$PWD:/src:ro" --workdir /src --entrypoint python \\
        mixtral-trainer:release benchmarks/plan.py [v5p-256=1024 v6e-256=1024 ...]

Each argument is an accelerator type and a global batch, in sequences of 4096 tokens. Printed are,
as rows of a table: memory; the bytes that the layers' collectives move over those that FSDP has to
(every weight in for forward and for backward, every gradient out once); what share of them are
all-gathers and reduce-scatters; FLOPs over the model's own, with and without what is recomputed;
and the modelled step, with Pallas kernels at the chip's peak and at 75 % of it. Some minutes each.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "trainer/presets/mixtral-8x7b.json"
BLOCK = 4096
# Published for this job, measured (docs/plan.md)
MEASURED = {"v5p-256": "39 %", "v6e-256": "29.6 %"}
HEAD = (
    "slice, batch",
    "HBM",
    "layers' bytes",
    "of these gather, scatter",
    "activations gathered",
    "FLOPs",
    "step",
    "MFU",
    "MFU at 75 %",
    "traced, compiled",
    "measured elsewhere",
)


def plan(accelerator_type: str, batch: int) -> dict:
    """Return plan.json of the guide's flags with another batch."""
    with tempfile.TemporaryDirectory() as directory:
        command = [
            *(sys.executable, "-m", "trainer.plan", "--accelerator_type", accelerator_type),
            *("--do_train", "--output_dir", directory, "--config_name", str(CONFIG), "--gmm"),
            *("--dataset_name", "python-help", "--block_size", str(BLOCK), "--flash_attention"),
            *("--per_device_train_batch_size", str(batch), "--torch_dtype", "bfloat16"),
            *("--fsdp_config", str(CONFIG.with_name("fsdp_config.json")), "--fsdp", "full_shard"),
        ]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        written = Path(directory, "plan.json")
        if not written.exists():
            raise SystemExit(f"{accelerator_type}: {done.stdout}{done.stderr}")
        return json.loads(written.read_text(encoding="utf-8"))


def row(found: dict) -> list[str]:
    """Return the cells of one plan."""
    memory = found.get("hbm_per_chip_gib", {})
    used = f"{memory['total']:.1f} of {memory['limit']:.0f} GiB" if memory else "–"
    name = f"{found['accelerator_type']}, {found['global_batch']}"
    if not found["fits"]:
        return [name, f"**{used}**" if memory else "does not compile", *[""] * (len(HEAD) - 2)]
    config = json.loads(CONFIG.read_text(encoding="utf-8"))
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    kept = hidden // heads * config["num_key_value_heads"]
    layer = config["num_local_experts"] * (3 * hidden * config["intermediate_size"] + hidden)
    layer += 2 * hidden * (hidden + kept) + 2 * hidden
    least = 3 * 2 * layer * config["num_hidden_layers"] * (1 - 1 / found["chips"])
    inside = [one for one in found["collectives"] if one["in_layers"]]
    moved = sum(one["bytes_per_chip"] for one in inside)
    plain = sum(
        one["bytes_per_chip"] for one in inside if one["kind"] in ("all-gather", "reduce-scatter")
    )
    gathered = sum(
        one["bytes_per_chip"]
        for one in found["collectives"]
        if (one["kind"], one["moves"]) == ("all-gather", "activations")
    )
    times = found["modelled"]
    flops, again = found["flops_per_chip"], found["recomputed_flops_per_chip"]
    model = found["model_flops"]
    return [
        name,
        used,
        f"{moved / least:.3f}×",
        f"{plain / moved:.2%}",
        f"{gathered / 2**30:.2f} GiB",
        f"{flops / model:.3f}×, {(flops - again) / model:.3f}×",
        f"{times['step_time_overlapped_s']:.2f} s, {times['step_time_s']:.2f} s",
        f"{times['mfu']:.1%}",
        f"{times['with_kernels_at_75_percent']['mfu']:.1%}",
        f"{found['trace_seconds']:.1f} s, {found['compile_seconds']:.0f} s",
        MEASURED.get(found["accelerator_type"], "–"),
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    default = ["v5p-256=1024", "v6e-256=1024", "v5e-256=256", "v4-128=256"]
    parser.add_argument("slices", nargs="*", default=default, metavar="TYPE=BATCH")
    print(f"| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}")
    for text in parser.parse_args().slices:
        accelerator_type, _, batch = text.partition("=")
        print(f"| {' | '.join(row(plan(accelerator_type, int(batch))))} |", flush=True)


if __name__ == "__main__":
    main()
