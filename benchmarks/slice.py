"""Measure how launch and provisioning times grow with the number of workers, on simulated slices.

    python benchmarks/slice.py [--workers 1 2 4 8]

For every size a fresh slice is started on this machine and provisioned with a small image, which
takes seconds. Measured are a second site.yml, which changes nothing, in seconds and relative to the
first size; and a train.yml: the time until the last container has started, and the time between the
first and the last start. The small image cannot train, so the run ends right after its start.
A simulated slice that already runs is replaced.
"""

import argparse
import datetime
import json
import subprocess
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SMALL_IMAGE = {
    "trainer_image_name": "mixtral-trainer-small",
    "trainer_image_dockerfile": "molecule/shared/trainer/Dockerfile",
    "train_image": "mixtral-trainer-small:release",
    "worker_preflight_image": "mixtral-trainer-small:release",
    "worker_preflight_install_gib": 2,
}


def playbook(name: str, **variables: object) -> tuple[float, subprocess.CompletedProcess[str]]:
    """Run a playbook on the simulated slice; return its seconds and how it ended."""
    began = time.monotonic()
    ran = subprocess.run(
        ["ansible-playbook", "-i", "inventory/simulated", name, "-e", json.dumps(variables)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return time.monotonic() - began, ran


def provision(workers: int) -> float:
    """Start and provision a slice; return the seconds of a second site.yml."""
    for name, variables in (
        ("molecule/shared/create.yml", {"simulated_workers": workers}),
        ("site.yml", SMALL_IMAGE),
    ):
        _, ran = playbook(name, **variables)
        if ran.returncode:
            raise SystemExit(f"{name} on {workers} workers failed:\n{ran.stdout[-3000:]}")
    seconds, ran = playbook("site.yml", **SMALL_IMAGE)
    if ran.returncode or ran.stdout.count("changed=0") != workers:
        raise SystemExit(f"a second site.yml on {workers} workers:\n{ran.stdout[-3000:]}")
    return seconds


def launch(workers: int) -> tuple[float, float]:
    """Start a run; return the seconds to the last start of a container, and from the first."""
    with tempfile.TemporaryDirectory() as runs:
        began = datetime.datetime.now(datetime.UTC)
        _, ran = playbook("train.yml", gmm=True, runs_dir=runs, **SMALL_IMAGE)
        ends = [
            json.loads(path.read_text()) for path in Path(runs).glob("latest/workers/*/exit.json")
        ]
        if len(ends) != workers:
            raise SystemExit(f"{len(ends)} of {workers} workers started:\n{ran.stdout[-3000:]}")
    starts = [datetime.datetime.fromisoformat(end["started"][:26] + "+00:00") for end in ends]
    return (max(starts) - began).total_seconds(), (max(starts) - min(starts)).total_seconds()


def main() -> None:
    """Print a row for each size of the slice."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8], help="1 to 8 each")
    sizes = parser.parse_args().workers
    print("workers   second site.yml   to the last start   first to last start")
    first = None
    for workers in sizes:
        second = provision(workers)
        first = first or second
        last, spread = launch(workers)
        print(
            f"{workers:7}   {second:6.1f} s  {second / first:4.2f}×"
            f"   {last:15.1f} s   {spread:17.2f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
