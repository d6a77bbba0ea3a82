"""Plan Mixtral 8x7B or 8x22B on many slices and print the tables of docs/plan.md; needs no TPU.

    docker run --rm --volume "$PWD:/src:ro" --workdir /src --entrypoint python \\
        mixtral-trainer:release -m benchmarks.plan [slices|smallest|modes|guide] \\
        [--model mixtral-8x22b]

runs inside the trainer's image.

``slices``: a large batch of sequences of 4096 tokens on v5p-256, v6e-256, v5e-256 and v4-128. The
columns are memory; the bytes moved by the layers' collectives, relative to the minimum of FSDP
(all-gather every weight for forward and again for backward, reduce-scatter every gradient once);
the share of all-gathers and reduce-scatters in these bytes; FLOPs relative to the model FLOPs, with
and without recomputation; and the modelled step, with Pallas kernels at the chip's peak and at 75
%.

``smallest``: the guide's own configuration, 32 sequences of 4096 tokens, on the smallest slice of
each generation that it fits. Starts with one sequence per chip, then halves the number of chips
until the step does not fit. Where not even one sequence per chip fits, two chips share one sequence
(``--spmd_2d_sharding 2``).

``modes``: every expert mode, with flash and with dense attention, in both shardings, and on two
slices: 256 sequences on 128 chips of v5p. FLOPs are without recomputation.

``guide``: the step on v5p-256 beside the guide's formulation of the step (benchmarks/guide.py).
That formulation has no loop over the layers, so it is compiled with two and with four layers, and
extrapolated linearly to all of them.

Without an argument all four are printed. A plan takes some minutes, the longest ones where the
compiler tries to save memory before it gives up.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from trainer.plan import compile as compiling
from trainer.plan.__main__ import read
from trainer.plan.estimate import verdict
from trainer.tpu import CHIPS, Chip, Slice, parse_slice, topology_of

ROOT = Path(__file__).resolve().parent.parent
PRESETS = ROOT / "trainer/presets"
BLOCK = 4096
GUIDE_BATCH, MODES_BATCH = 32, 256
MODES = ("--gmm", "--gmm_stack", "--static")
FLASH, FSDP, TWO_D = "--flash_attention", ("--fsdp", "full_shard"), ("--spmd_2d_sharding", "2")
SLICES = {"v5p-256": 1024, "v6e-256": 1024, "v5e-256": 256, "v4-128": 256}
# Measured by others on TPUs, for the same model and batch (docs/plan.md)
MEASURED = {"v5p-256": "15.2 s, 39 %", "v6e-256": "29.6 %"}
HEAD = (
    "slice, batch",
    "HBM per chip",
    "bytes of the layers' collectives over FSDP's minimum",
    "of these, all-gather and reduce-scatter",
    "activations all-gathered",
    "FLOPs over model FLOPs, all and without recomputation",
    "step with and without overlap",
    "MFU",
    "MFU, kernels at 75 %",
    "tracing, compiling, host memory",
    "measured elsewhere",
)


def planned(
    slice_: Slice,
    batch: int,
    model: str,
    flags: tuple[str, ...] = ("--gmm", FLASH, *FSDP),
    *,
    layers: int = 0,
    guide: bool = False,
) -> dict:
    """Return the content of plan.json for the guide's flags with ``batch`` and other changes.

    ``layers``: number of layers, 0 for the model's own; ``guide``: the guide's formulation.
    """
    with tempfile.TemporaryDirectory() as directory:
        config = json.loads((PRESETS / f"{model}.json").read_text(encoding="utf-8"))
        config["num_hidden_layers"] = layers or config["num_hidden_layers"]
        config_file, result = Path(directory, "config.json"), Path(directory, "result.json")
        config_file.write_text(json.dumps(config), encoding="utf-8")
        flags = (
            *("--do_train", "--output_dir", directory, "--config_name", str(config_file)),
            *("--dataset_name", "python-help", "--block_size", str(BLOCK), *flags),
            *("--per_device_train_batch_size", str(batch), "--torch_dtype", "bfloat16"),
            *("--fsdp_config", str(PRESETS / "fsdp_config.json")),
        )
        shape, slices = "x".join(map(str, slice_.topology)), str(slice_.slices)
        command = [
            *(sys.executable, "-m", "benchmarks.guide" if guide else "trainer.plan.compile"),
            *(str(result), slice_.chip.name, shape, slices, *flags),
        ]
        environment = os.environ | compiling.ENVIRONMENT
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        if not result.exists():
            raise SystemExit(f"{slice_}: {done.stdout}{done.stderr}")
        named = ["--accelerator_type", slice_.chip.name, "--topology", shape, "--slices", slices]
        arguments = read([*named, *flags])[1]
        return verdict(arguments, slice_, json.loads(result.read_text(encoding="utf-8")))


def layer_parameters(config: dict) -> int:
    """Return the parameters of one layer."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    kept = hidden // heads * config["num_key_value_heads"]
    experts = config["num_local_experts"] * (3 * hidden * config["intermediate_size"] + hidden)
    return experts + 2 * hidden * (hidden + kept) + 2 * hidden


def memory(found: dict) -> str:
    """Return the table cell with HBM per chip, in bold if the step does not fit."""
    if "hbm_per_chip_gib" not in found:
        return f"does not compile: {found['error'].splitlines()[0]}"
    sizes = found["hbm_per_chip_gib"]
    used = f"{sizes['total']:.1f} of {sizes['limit']:.0f} GiB"
    return used if found["fits"] else f"**{used}**"


def row(found: dict, config: dict) -> list[str]:
    """Return the table row of one plan."""
    name = f"{found['accelerator_type']}, {found['global_batch']}"
    if not found["fits"]:
        return [name, memory(found), *[""] * (len(HEAD) - 2)]
    each_way = 2 * layer_parameters(config) * config["num_hidden_layers"]
    least = 3 * each_way * (1 - 1 / found["chips"])
    inside = [total for total in found["collectives"] if total["in_layers"]]
    moved = sum(total["bytes_per_chip"] for total in inside)
    plain = sum(
        total["bytes_per_chip"]
        for total in inside
        if total["kind"] in ("all-gather", "reduce-scatter")
    )
    gathered = sum(
        total["bytes_per_chip"]
        for total in found["collectives"]
        if (total["kind"], total["moves"]) == ("all-gather", "activations")
    )
    times = found["modelled"]
    flops, again = found["flops_per_chip"], found["recomputed_flops_per_chip"]
    model = found["model_flops"]
    return [
        name,
        memory(found),
        f"{moved / least:.3f}×",
        f"{plain / moved:.1%}",
        f"{gathered / 2**30:.0f} GiB",
        f"{flops / model:.3f}×, {(flops - again) / model:.3f}×",
        f"{times['step_time_overlapped_s']:.2f} s, {times['step_time_s']:.2f} s",
        f"{times['mfu']:.1%}",
        f"{times['with_kernels_at_75_percent']['mfu']:.1%}",
        f"{found['trace_seconds']:.1f} s, {found['compile_seconds']:.0f} s, "
        f"{found['compiler_memory_gib']:.1f} GiB",
        MEASURED.get(found["accelerator_type"], "–"),
    ]


def print_row(cells: list[str]) -> None:
    """Print one row of a table."""
    print(f"| {' | '.join(cells)} |", flush=True)


def print_slices(model: str, config: dict) -> None:
    """Large batches on large slices"""
    print_row(list(HEAD))
    print_row(["---"] * len(HEAD))
    for name, batch in SLICES.items():
        print_row(row(planned(parse_slice(name), batch, model), config))


def print_smallest(model: str, config: dict) -> None:
    """The guide's configuration on ever smaller slices of each chip"""
    head = ("slice, chips", "sharding", "HBM per chip", "step", "tokens/s per chip", "MFU")
    print_row(list(head))
    print_row(["---"] * len(head))

    def fits(chip: Chip, chips: int, *sharding: str) -> bool:
        slice_ = Slice(chip, topology_of(chip, chips))
        found = planned(slice_, GUIDE_BATCH, model, ("--gmm", FLASH, *sharding))
        cells = [f"{found['accelerator_type']}, {chips}", " ".join(sharding), memory(found)]
        if found["fits"]:
            seconds, mfu = found["modelled"]["step_time_overlapped_s"], found["modelled"]["mfu"]
            tokens = GUIDE_BATCH * BLOCK / seconds / chips
            cells += [f"{seconds:.2f} s", f"{tokens:,.0f}", f"{mfu:.0%}"]
        print_row(cells)
        return found["fits"]

    for chip in CHIPS.values():
        largest, *smaller = (chips for chips in (32, 16, 8, 4) if chips in chip.slice_chips)
        if not fits(chip, largest, *FSDP):
            fits(chip, 2 * largest, *TWO_D)
            continue
        for chips in smaller:
            if not fits(chip, chips, *FSDP):
                break


def print_modes(model: str, config: dict) -> None:
    """Every expert mode, attention and sharding on one slice, and two slices"""
    head = ("flags", "HBM", "FLOPs", "step", "MFU", "compiling, host memory")
    print_row(list(head))
    print_row(["---"] * len(head))
    one, two = parse_slice("v5p-256"), parse_slice("v5p-128", slices=2)
    every = [
        (one, mode, *attention, *sharding)
        for mode in MODES
        for attention in ((FLASH,), ())
        for sharding in (FSDP, TWO_D)
    ]
    for slice_, *flags in (*every, (two, "--gmm", FLASH, *FSDP)):
        found = planned(slice_, MODES_BATCH, model, tuple(flags))
        cells = [f"{' '.join(flags)}{', two slices' if slice_ is two else ''}", memory(found)]
        if found["fits"]:
            once = found["flops_per_chip"] - found["recomputed_flops_per_chip"]
            step = found["modelled"]
            cells += [
                f"{once / found['model_flops']:.3f}×",
                f"{step['step_time_overlapped_s']:.2f} s",
                f"{step['mfu']:.1%}",
                f"{found['compile_seconds']:.0f} s, {found['compiler_memory_gib']:.1f} GiB",
            ]
        print_row(cells)


def print_guide(model: str, config: dict) -> None:
    """The trainer's step beside the guide's formulation of the step, on v5p-256"""
    slice_, batch, layers = parse_slice("v5p-256"), 1024, config["num_hidden_layers"]
    two, four = (planned(slice_, batch, model, layers=n, guide=True)["modelled"] for n in (2, 4))
    ours = planned(slice_, batch, model)["modelled"]
    head = (
        "modelled, in seconds",
        "computing",
        "collectives",
        "step with overlap",
        "step without overlap",
    )
    names = ("computing_s", "collectives_s", "step_time_overlapped_s", "step_time_s")
    print_row(list(head))
    print_row(["---"] * len(head))
    theirs = [two[name] + (four[name] - two[name]) / 2 * (layers - 2) for name in names]
    mine = [ours[name] for name in names]
    print_row(["the guide's formulation", *(f"{value:.2f}" for value in theirs)])
    print_row(["the trainer's", *(f"{value:.2f}" for value in mine)])
    ratios = (a / b for a, b in zip(theirs, mine, strict=True))
    print_row(["ratio", *(f"{ratio:.2f}×" for ratio in ratios)])


PARTS = {
    "slices": print_slices,
    "smallest": print_smallest,
    "modes": print_modes,
    "guide": print_guide,
}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="*", default=list(PARTS), metavar="|".join(PARTS))
    parser.add_argument("--model", default="mixtral-8x7b")
    options = parser.parse_args()
    config = json.loads((PRESETS / f"{options.model}.json").read_text(encoding="utf-8"))
    for part in options.parts:
        print(f"\n{PARTS[part].__doc__}\n", flush=True)
        PARTS[part](options.model, config)


if __name__ == "__main__":
    main()
