"""Measure the inventory plugin of Cloud TPU slices: python -m benchmarks.inventory

A slice of 64 hosts is listed from a simulated API on this machine that answers after 100 ms, from
the plugin's cache, and from a file with the same hosts. Listing the file takes Ansible's own time;
anything beyond is the plugin's. Prints the best of three runs in seconds, and ratios to the file.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.servers.cloud_tpu import PROJECT, ZONE, TpuApi

ROOT = Path(__file__).resolve().parents[1]
ANSIBLE_INVENTORY = Path(sys.executable).with_name("ansible-inventory")


def seconds(inventory: str, environment: dict[str, str]) -> float:
    """Return the seconds that listing all hosts takes."""
    began = time.perf_counter()
    subprocess.run(
        [ANSIBLE_INVENTORY, "--inventory", inventory, "--list"],
        cwd=ROOT,
        env=os.environ | environment,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return time.perf_counter() - began


def main() -> None:
    """Measure, and print a table."""
    with TpuApi() as api, tempfile.TemporaryDirectory() as directory:
        api.latency = 0.1
        api.add("big", "v5p-512")
        reach = {
            "TPU_API_ENDPOINT": api.endpoint,
            "GCP_AUTH_KIND": "anonymous",
            "NO_PROXY": "127.0.0.1",
            "PROJECT": PROJECT,
            "ZONE": ZONE,
            "TPU_NAME": "big",
        }
        cache = {
            "ANSIBLE_INVENTORY_CACHE": "true",
            "ANSIBLE_INVENTORY_CACHE_PLUGIN": "ansible.builtin.jsonfile",
            "ANSIBLE_INVENTORY_CACHE_CONNECTION": directory,
        }
        file = Path(directory) / "hosts.yml"
        listed = subprocess.run(
            [ANSIBLE_INVENTORY, "--inventory", "inventory/gcp", "--list", "--yaml"],
            cwd=ROOT, env=os.environ | reach, check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip
        file.write_text(listed)
        inventories = {
            "file": (str(file), {}),
            "API": ("inventory/gcp", reach),
            "cache": ("inventory/gcp", reach | cache),
        }
        seconds(*inventories["cache"])
        api.requests.clear()
        # In turns, so that other load of the machine affects all three alike.
        times: dict[str, list[float]] = {name: [] for name in inventories}
        for _ in range(3):
            for name, inventory in inventories.items():
                times[name].append(seconds(*inventory))
        best = {name: min(runs) for name, runs in times.items()}
        print("inventory of 64 hosts   seconds   × file   seconds beyond the file")
        for name, fastest in best.items():
            beyond = fastest - best["file"]
            print(f"{name:22} {fastest:8.2f} {fastest / best['file']:8.2f} {beyond:12.2f}")
        print(f"requests for each reading of the API: {len(api.requests) / 3:g}")


if __name__ == "__main__":
    main()
