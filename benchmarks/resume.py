"""Measure what checkpoints cost, and how many steps a killed run loses, on CPU devices.

    docker run --rm --volume "$PWD:/src:ro" --workdir /src --entrypoint python \\
        mixtral-trainer:release benchmarks/resume.py [--kills 20] [--save_steps 5]

runs inside the trainer's image. There are three runs with the same flags: one without checkpoints;
one with checkpoints; and one with checkpoints that is repeatedly killed with SIGKILL, each time at
a random moment after its first step, and resumed. Prints two step times, each relative to a step of
the run without checkpoints: of the steps during which the state is copied to the host, and of all
others, during which a checkpoint may be written. Prints also the number of steps that kills cost,
and the largest difference between the losses of the killed run and the run without checkpoints.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def start(output_dir: Path, steps: int, *flags: str) -> subprocess.Popen[bytes]:
    """Start a run on two CPU devices."""
    config = json.loads((ROOT / "trainer/presets/mixtral-tiny.json").read_text())
    config |= {"num_hidden_layers": 1, "hidden_size": 128, "intermediate_size": 256}
    config_file = output_dir.with_name("config.json")
    config_file.write_text(json.dumps(config))
    command = [
        *(sys.executable, "-m", "trainer", "--do_train", "--output_dir", str(output_dir)),
        *("--config_name", str(config_file), "--static"),
        *("--dataset_name", "python-help", "--block_size", "64", "--max_steps", str(steps)),
        *("--per_device_train_batch_size", "4", "--logging_strategy", "no", *flags),
    ]
    environment = os.environ | {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "2", "PROFILE_LOGDIR": ""}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)


def lines(output_dir: Path) -> list[dict]:
    """Return the lines of metrics.jsonl, without an incomplete last line."""
    path = output_dir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]


def finish(run: subprocess.Popen[bytes], output_dir: Path) -> list[dict]:
    """Wait for a run; return its metrics after checking that every step is there once."""
    if run.wait():
        raise SystemExit(f"a run ended with exit code {run.returncode}")
    metrics = lines(output_dir)
    if [line["step"] for line in metrics] != list(range(len(metrics))):
        raise SystemExit(f"{output_dir}: steps are missing, or there twice")
    return metrics


def kill(output_dir: Path, steps: int, flags: list[str], moments: random.Random) -> int | None:
    """Start a run, kill it, and return how many finished steps are in no checkpoint.

    None: the run ended before it was killed.
    """
    run = start(output_dir, steps, *flags)
    began = datetime.now(UTC)

    def made_a_step() -> bool:
        return any(datetime.fromisoformat(line["time"]) > began for line in lines(output_dir)[-1:])

    while run.poll() is None and not made_a_step():
        time.sleep(0.01)
    time.sleep(moments.uniform(0, 1))
    if run.poll() is not None:
        return None
    run.kill()
    run.wait()
    saved = [int(path.name.partition("-")[2]) for path in output_dir.glob("checkpoint-*")]
    return len(lines(output_dir)) - max(saved, default=0)


def main() -> None:
    """Print the costs."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--save_steps", type=int, default=5)
    options = parser.parse_args()
    every, steps = options.save_steps, 30 * options.kills
    flags = ["--save_strategy", "steps", "--save_steps", str(every), "--save_total_limit", "2"]
    moments = random.Random(0)
    with tempfile.TemporaryDirectory() as directory:
        plain, saving, killed = (Path(directory) / name for name in ("plain", "saving", "killed"))
        expected = finish(start(plain, steps), plain)
        metrics = finish(start(saving, steps, *flags), saving)
        size = sum(file.stat().st_size for file in (saving / f"checkpoint-{steps}").iterdir())
        lost = []
        resume = [*flags, "--resume_from_checkpoint", "auto"]
        while len(lost) < options.kills:
            steps_lost = kill(killed, steps, resume, moments)
            if steps_lost is None:
                break
            lost.append(steps_lost)
        found = finish(start(killed, steps, *resume), killed)

    usual = statistics.median(line["step_time_s"] for line in expected[1:])
    # A step's time runs from one loss to the next, so copying counts for the step after.
    after = [line["step_time_s"] for line in metrics[every:] if line["step"] % every == 0]
    others = [line["step_time_s"] for line in metrics[1:] if line["step"] % every]
    difference = max(abs(a["loss"] - b["loss"]) for a, b in zip(expected, found, strict=True))
    print(f"a checkpoint of {size / 2**20:.1f} MiB every {every} steps of {usual:.3f} s")
    print(f"the step after its start: {statistics.median(after) / usual:.2f}×")
    print(f"all other steps:          {statistics.median(others) / usual:.2f}×")
    print(f"killed {len(lost)} times in {steps} steps, which cost {sum(lost)} steps, {lost}")
    print(f"largest difference of a loss to the uninterrupted run: {difference:.1e}")


if __name__ == "__main__":
    main()
