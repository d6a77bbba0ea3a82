"""Train one step on two CPU devices, to show that a freshly built image works.

    python smoke_step.py [RUN_CLM]

``container/Dockerfile`` runs it as the last step of every build, with the trainer in the image. For
the stack ``guide`` RUN_CLM is the script of the guide's branch of transformers, which is run
instead. Exit code 1, with the reason, if the step fails.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

MODEL = {
    "model_type": "mixtral",
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32,
}
FSDP = {
    "fsdp_transformer_layer_cls_to_wrap": ["MixtralDecoderLayer"],
    "xla": True,
    "xla_fsdp_v2": True,
    "xla_fsdp_grad_ckpt": True,
}
TEXT = "the quick brown fox jumps over the lazy dog\n"
TOKENIZER = {
    "version": "1.0",
    "added_tokens": [],
    "pre_tokenizer": {"type": "Whitespace"},
    "model": {
        "type": "WordLevel",
        "vocab": {word: number for number, word in enumerate(sorted({"?", *TEXT.split()}))},
        "unk_token": "?",
    },
}
DEVICES = 2


def check_step(run_clm: str | None) -> None:
    """Train a Mixtral of one small layer for one step, sharded over two devices."""
    environment = os.environ | {
        "PJRT_DEVICE": "CPU",
        "CPU_NUM_DEVICES": str(DEVICES),
        # With fewer threads, collectives of XLA's CPU devices deadlock.
        "NPROC": str(2 * DEVICES),
        # The program runs only once, so optimizing it would take longer than it saves.
        "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
    }
    with tempfile.TemporaryDirectory() as directory:
        config, fsdp, text, output = (
            Path(directory, name) for name in ("config.json", "fsdp.json", "text.txt", "output")
        )
        config.write_text(json.dumps(MODEL), encoding="utf-8")
        fsdp.write_text(json.dumps(FSDP), encoding="utf-8")
        text.write_text(TEXT * 100, encoding="utf-8")
        flags = {
            "config_name": config,
            "fsdp": "full_shard",
            "fsdp_config": fsdp,
            "train_file": text,
            "block_size": 32,
            "per_device_train_batch_size": 2 * DEVICES,
            "max_steps": 1,
            "output_dir": output,
        }
        if run_clm:
            write_tokenizer(Path(directory, "tokenizer"))
            command = [sys.executable, run_clm, "--do_train", "--static"]
            flags |= {"tokenizer_name": Path(directory, "tokenizer"), "cache_dir": directory}
            flags |= {"optim": "adafactor", "save_strategy": "no", "report_to": "none"}
            environment |= {"XLA_USE_SPMD": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": directory}
        else:
            command = [sys.executable, "-m", "trainer", "--do_train", "--gmm"]
        command += [f"--{name}={value}" for name, value in flags.items()]
        trained = subprocess.run(command, env=environment)
        if trained.returncode:
            sys.exit(f"smoke_step: the trainer failed, exit code {trained.returncode}")
        loss = guides_loss(output) if run_clm else trainers_loss(output)
    # An untrained model predicts a nearly uniform distribution.
    even = math.log(MODEL["vocab_size"])
    if not math.isclose(loss, even, rel_tol=0.1):
        sys.exit(f"smoke_step: the first loss is {loss}, and not about ln(vocabulary) = {even:.2f}")
    print(f"smoke_step: one step on {DEVICES} devices, loss {loss:.3f}")


def trainers_loss(output: Path) -> float:
    """Return the loss in metrics.jsonl, after checking the number of devices in summary.json."""
    summary = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    if summary["device"]["count"] != DEVICES:
        sys.exit(f"smoke_step: {summary['device']} where {DEVICES} devices were asked for")
    last = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1]
    return json.loads(last)["loss"]


def guides_loss(output: Path) -> float:
    """Return the loss that the guide's script has written to train_results.json."""
    return json.loads((output / "train_results.json").read_text(encoding="utf-8"))["train_loss"]


def write_tokenizer(directory: Path) -> None:
    """Write a tokenizer of a few words, which the guide's script requires."""
    directory.mkdir()
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "?"}
    for name, content in {"tokenizer": TOKENIZER, "tokenizer_config": kind}.items():
        (directory / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run_clm", nargs="?", metavar="RUN_CLM", help="the guide's script")
    check_step(parser.parse_args().run_clm)
