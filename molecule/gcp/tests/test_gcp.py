"""A slice is made, trained on and deleted, as a user of Cloud TPU does it."""

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.servers.cloud_tpu import PROJECT, ZONE, TpuApi
from tests.slices.simulated_slice import KEY, ROOT, SMALL_MODEL, WORKERS, Playbook, Worker

STEPS = 3
KNOWN_HOSTS = Path.home() / ".ssh/mixtral_tpu_known_hosts"
# What trains on these machines, which have no TPU
CPU = SMALL_MODEL | {
    "pjrt_device": "CPU",
    "cpu_num_devices": 2,
    "tokenizer_name": "",
    "dataset_name": "python-help",
    "dataset_config_name": "",
    "max_steps": STEPS,
    "torch_dtype": "float32",
    "image_source": "ship",
    "trainer_image_ship_at_a_time": 1,
    "torch_xla_on_host": False,
}
Finished = Callable[..., Playbook]


@pytest.fixture(scope="module")
def api() -> Iterator[TpuApi]:
    """An API whose slices have the simulated workers' addresses."""
    with TpuApi() as api:
        api.seconds = 2
        api.addresses = lambda name, worker: ("10.0.0.1", Worker(WORKERS[worker]).address)
        yield api


@pytest.fixture(scope="module")
def environment(api: TpuApi) -> dict[str, str]:
    return {
        "TPU_NAME": "my-tpu",
        "ZONE": ZONE,
        "PROJECT": PROJECT,
        "TPU_API_ENDPOINT": api.endpoint,
        "GCP_AUTH_KIND": "anonymous",
        "TPU_USER": "tpu",
        "TPU_SSH_KEY": str(KEY),
        "NO_PROXY": "127.0.0.1",
    }


@pytest.fixture(scope="module")
def finished(
    finished: Finished, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Finished:
    return partial(
        finished,
        inventory="inventory/gcp",
        environment=environment,
        runs_dir=str(tmp_path_factory.mktemp("runs")),
    )


def graph(environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = ["ansible-inventory", "--inventory=inventory/gcp", "--graph"]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )


def test_from_no_slice_to_a_trained_model_and_back(
    api: TpuApi, environment: dict[str, str], finished: Finished
) -> None:
    make = {"state": "present", "accelerator_type": "v5p-16", "slice_poll_seconds": 0.5}
    made = finished("slice.yml", **make)
    assert made.code == 0
    assert "my-tpu is READY: 2 workers" in made.screen
    # Its addresses were nobody's before, and each worker has been logged in to.
    assert made.screen.count("ok: [my-tpu-w") == len(WORKERS)
    node = api.node("my-tpu")
    known = KNOWN_HOSTS.read_text()
    for worker in range(len(WORKERS)):
        assert f"my-tpu-w{worker}.{ZONE}.{PROJECT}.{node['id']} ssh-ed25519 " in known
    assert "my-tpu-w1" in graph(environment).stdout

    again = finished("slice.yml", **make)
    assert again.code == 0
    assert "changed=1" not in again.screen

    assert finished("site.yml", **CPU).code == 0
    run = finished("train.yml", gmm=True, **CPU)
    assert run.code == 0
    assert "succeeded" in run.table
    artifacts = Path(run.screen.rpartition("artifacts")[2].split()[0])
    report = json.loads((artifacts / "report.json").read_text())
    assert [row["host"] for row in report["workers"]] == ["my-tpu-w0", "my-tpu-w1"]

    # What the TPU says of a worker stands in the table of a run that fails.
    node["symptoms"] = [{"workerId": "1", "symptomType": "HBM_OUT_OF_MEMORY", "details": "1 chip"}]
    failed = finished("train.yml", train_free_gib=1_000_000, **CPU)
    assert failed.code != 0
    assert "HBM_OUT_OF_MEMORY 1 chip" in failed.table
    status = " ".join(finished("status.yml").screen.split())
    assert "my-tpu: v5p-16, READY, healthy, 0." in status
    assert "worker 1 HBM_OUT_OF_MEMORY 1 chip" in status

    gone = finished("slice.yml", state="absent", slice_poll_seconds=0.5)
    assert gone.code == 0
    assert "my-tpu is deleted: 2 workers" in gone.screen
    assert not api.nodes
    assert "my-tpu-w" not in KNOWN_HOSTS.read_text()
    after = graph(environment)
    assert after.returncode != 0
    assert "there is no TPU slice my-tpu" in " ".join(after.stderr.split())
