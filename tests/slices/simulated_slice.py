"""A simulated slice to break, the playbooks that have to notice, and what they leave behind."""

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import docker

from tests import playbook
from tests.playbook import ROOT

# Scenarios run side by side, on two slices whose workers have the same names in the inventory.
SLICE = {"gw1": "sim2"}.get(os.environ.get("PYTEST_XDIST_WORKER", ""), "sim")
os.environ["SIMULATED_NAME"] = SLICE
KEY = ROOT / f".cache/simulated-slice/{SLICE}/id_ed25519"
REGISTRY = f"{SLICE}-registry"
WORKERS = ["sim-w0", "sim-w1"]
# An image that takes seconds: it validates, but cannot train. Its name is its own, so that the
# trainer's layers stay on the workers.
SMALL_IMAGE = {
    "trainer_image_name": "mixtral-trainer-small",
    "trainer_image_dockerfile": "molecule/shared/trainer/Dockerfile",
    "worker_preflight_image": "mixtral-trainer-small:release",
    "worker_preflight_install_gib": 2,
    "train_image": "mixtral-trainer-small:release",
}
# A Mixtral that is compiled in seconds
SMALL_MODEL = {
    "model": str(ROOT / "molecule/shared/mixtral-micro.json"),
    "block_size": 32,
    "per_device_train_batch_size": 4,
    "train_poll_seconds": 2,
}


class Playbook(playbook.Playbook):
    """An ansible-playbook on the simulated slice, unless another inventory is named."""

    def __init__(
        self, name: str, *options: str, inventory: str = "inventory/simulated", **more: object
    ) -> None:
        super().__init__(name, *options, inventory=inventory, **more)


class Worker:
    """A worker of the slice, reached from below: also when its network is gone."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.machine = docker.from_env().containers.get(name.replace("sim", SLICE))

    def run(self, command: str, **options: object) -> str:
        """Run a shell command as root; it must succeed."""
        code, output = self.machine.exec_run(["sh", "-c", command], **options)
        assert not code, f"{self.name}: {command}: {output.decode()}"
        return output.decode() if output else ""

    def answers(self, command: str) -> bool:
        """Tell whether a shell command succeeds."""
        return self.machine.exec_run(["sh", "-c", command])[0] == 0

    def processes(self, words: str) -> list[int]:
        """Return the processes, by their ids on the worker, whose command line has ``words``."""
        lines = self.run(
            "for directory in /proc/[0-9]*; do"
            ' echo "${directory#/proc/} $(tr "\\0" " " < $directory/cmdline 2> /dev/null)"; done'
        ).splitlines()
        return [int(line.split()[0]) for line in lines if words in line]

    def trainers(self) -> list[int]:
        """Return the processes of the trainer, without the supervisor of its lease."""
        supervisors = self.processes("--log=")
        return [pid for pid in self.processes("python -m trainer") if pid not in supervisors]

    @property
    def address(self) -> str:
        """Where it is on the slice's network."""
        (network,) = self.machine.attrs["NetworkSettings"]["Networks"].values()
        return network["IPAddress"]

    @contextmanager
    def small_disk(self) -> Iterator[str]:
        """Put the runs' files on a disk of 64 MiB; yields where it is mounted."""
        path = "/home/tpu/mixtral-trainer"
        self.run(
            f"install -d -o tpu -g tpu {path} && mount -t tmpfs -o size=64m,uid=1000 tmpfs {path}"
        )
        try:
            yield path
        finally:
            # Its last run's container holds it.
            self.run(f"docker rm --force mixtral-trainer 2> /dev/null; umount {path}")

    @contextmanager
    def cut_off(self) -> Iterator[None]:
        """Let no packet through to the worker, and none from it."""
        self.run("iptables -I INPUT -i eth0 -j DROP && iptables -I OUTPUT -o eth0 -j DROP")
        try:
            yield
        finally:
            self.run("iptables -D INPUT -i eth0 -j DROP && iptables -D OUTPUT -o eth0 -j DROP")

    def power_on(self) -> None:
        """Start the worker, and its engine, after it was switched off."""
        self.machine.start()
        wait_until(lambda: self.answers("docker version"), f"{self.name}'s engine")


@contextmanager
def forwarded(*ports: int) -> Iterator[None]:
    """Let every worker reach these ports of the controller's 127.0.0.1 under its own 127.0.0.1."""
    with ExitStack() as tunnels:
        for worker in map(Worker, WORKERS):
            tunnel = subprocess.Popen(
                ["ssh", "-N", "-i", KEY]
                + ["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"]
                + ["-o", "LogLevel=ERROR", "-o", "ExitOnForwardFailure=yes"]
                + [f"-R127.0.0.1:{port}:127.0.0.1:{port}" for port in ports]
                + [f"tpu@{worker.address}"]
            )
            tunnels.enter_context(tunnel)
            tunnels.callback(tunnel.terminate)
            for port in ports:
                knock = f"bash -c '< /dev/tcp/127.0.0.1/{port}'"
                wait_until(partial(worker.answers, knock), f"port {port} on {worker.name}")
        yield


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 180) -> None:
    """Return when ``condition`` holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what} did not come within {seconds} s"
        time.sleep(0.5)


class Runs:
    """What runs have brought home."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def worker(self, name: str) -> Path:
        """Return where the newest run keeps what is of a worker."""
        return self.directory / "latest/workers" / name

    def steps(self, name: str) -> list[int]:
        """Return the steps of a worker that the controller knows of."""
        path = self.worker(name) / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line)["step"] for line in lines]

    def end(self, name: str) -> dict:
        """Return the record of a worker's end."""
        return json.loads((self.worker(name) / "exit.json").read_text())

    def number(self) -> int:
        """Return how many runs there were."""
        return sum(not path.is_symlink() for path in self.directory.glob("*"))

    def assert_healthy(self, run: Playbook, count: int) -> None:
        """The newest is a run of ``count`` steps that ended as it should, on every worker."""
        assert run.end() == 0
        assert "succeeded" in run.table
        report = json.loads((self.directory / "latest/report.json").read_text())
        assert [it["status"] for it in report["workers"]] == ["succeeded"] * len(WORKERS)
        assert [self.steps(name) for name in WORKERS] == [list(range(count))] * len(WORKERS)

    def assert_survivor(self, name: str, culprit: str) -> None:
        """A worker was stopped because of another one, and all of its files are here."""
        assert self.end(name)["error"] == f"stopped, because {culprit} failed"
        assert self.steps(name)
        assert (self.worker(name) / "trainer.log").stat().st_size
        assert list(self.worker(name).glob("profile/**/*.xplane.pb"))
