"""A run of an earlier version, whose supervisor was lease.py: stop.yml ends it, too."""

import base64
import json
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from tests.slices.simulated_slice import ROOT, Playbook, Worker, wait_until

HOME = "/home/tpu/mixtral-trainer"
RUN = f"{HOME}/run"
LABELS = {"run_id": "earlier", "started_by": "me@here", "detached": "false"}
# It was today's supervisor by another name; what it supervises here is no trainer.
LEASE = base64.b64encode((ROOT / "runtime/supervisor.py").read_bytes()).decode()
COMMAND = "sleep 600"
# 128 + SIGTERM: it was asked to end, and did.
ASKED = 143


@pytest.fixture
def in_a_container(w0: Worker) -> Iterator[Worker]:
    labels = " ".join(f"--label {name}={value}" for name, value in LABELS.items())
    w0.run(
        f"echo {LEASE} | base64 -d > /tmp/lease.py; docker rm --force mixtral-trainer;"
        f"docker create --name mixtral-trainer {labels}"
        " --entrypoint /opt/venv/bin/python mixtral-trainer:release"
        " /opt/mixtral-trainer/lease.py --lease=/tmp/lease --seconds=300 --grace=120"
        f" --log=/tmp/trainer.log -- {COMMAND}"
        " && docker cp /tmp/lease.py mixtral-trainer:/opt/mixtral-trainer/"
        " && docker start mixtral-trainer"
    )
    yield w0
    w0.run("docker rm --force mixtral-trainer")


@pytest.fixture
def without_one(w1: Worker) -> Iterator[Worker]:
    directory = f"{HOME}/runs/earlier"
    process = json.dumps(LABELS | {"detached": False, "command": [], "environment": {}})
    w1.run(
        f"mkdir -p {directory}/code/container && ln -sfn {directory} {RUN} && cd {RUN}"
        f" && echo {LEASE} | base64 -d > code/container/lease.py && touch lease"
        f" && echo '{process}' > process.json && /sbin/start-stop-daemon --start --background"
        f" --chdir {RUN} --make-pidfile --pidfile {RUN}/pid --startas /usr/bin/python3 --"
        f" {RUN}/code/container/lease.py --lease={RUN}/lease --seconds=300"
        f" --state={RUN}/state.json --grace=120 --log={RUN}/trainer.log -- {COMMAND}",
        user="tpu",
    )
    yield w1
    w1.run(f"rm -r {RUN} {directory}")


def test_a_run_of_an_earlier_version_is_stopped(
    in_a_container: Worker, without_one: Worker, playbook: Callable[..., Playbook]
) -> None:
    for worker in (in_a_container, without_one):
        # The supervisor, and what it supervises
        both = partial(lambda worker: len(worker.processes(COMMAND)) == 2, worker)
        wait_until(both, f"the run on {worker.name}")
    stop = playbook("stop.yml")
    assert stop.end() == 0
    assert stop.screen.count("changed=1") == 2
    for worker in (in_a_container, without_one):
        assert not worker.processes(COMMAND)
    ended = in_a_container.run("docker inspect --format {{.State.ExitCode}} mixtral-trainer")
    assert int(ended) == ASKED
    assert json.loads(without_one.run(f"cat {RUN}/state.json"))["exit_code"] == ASKED
