"""Nightlies on two workers, and runs without Docker.

The index is the tests' own, and so are its wheels: they carry the versions of nightlies, and
torch's leads to the packages in the trainer's image. So both what installs and what trains is real.
"""

import secrets
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.servers.faults import ALWAYS, Fault
from tests.servers.index import Index, Wheel, wheel
from tests.slices.simulated_slice import (
    ROOT,
    SMALL_MODEL,
    WORKERS,
    Playbook,
    Runs,
    Worker,
    forwarded,
    wait_until,
)

IMAGE = "/opt/image"
PACKAGES = f"{IMAGE}/opt/venv/lib/python3.11/site-packages"
HOME = "/home/tpu/mixtral-trainer"
STEPS = 5
LEASE_SECONDS = 30
PASSWORD = secrets.token_hex(8)
FIRST, SECOND, TORCH_ALONE = "20250929", "20250930", "20251001"

Finished = Callable[..., Playbook]


def nightly(name: str, version: str, tag: str = "py3-none-any", **options: object) -> Wheel:
    """A wheel that has the name and nothing else: the package itself is the image's."""
    return wheel(name, version, tag, files={f"{name}.nightly": ""}, **options)


def torch(day: str) -> Wheel:
    tag = "cp311-cp311-manylinux_2_28_x86_64"
    return wheel("torch", f"2.9.0.dev{day}+cpu", tag, files={"image.pth": f"{PACKAGES}\n"})


def torch_xla(day: str) -> Wheel:
    return nightly(
        "torch_xla",
        f"2.9.0.dev{day}",
        "cp311-cp311-linux_x86_64",
        requires=[
            f'libtpu==0.0.24.dev{day}+nightly; extra == "tpu"',
            f'jax==0.8.0.dev{day}; extra == "pallas"',
            f'jaxlib==0.8.0.dev{day}; extra == "pallas"',
        ],
        extras=["tpu", "pallas"],
    )


@pytest.fixture(scope="module")
def index() -> Iterator[Index]:
    """PyTorch's and Google's, as controller and workers reach them."""
    with Index() as index, forwarded(int(index.host.rpartition(":")[2])):
        index.login = f"ada:{PASSWORD}"
        for day in (FIRST, SECOND):
            index.put("torch", torch(day))
            index.put("tpuvm", torch_xla(day))
            index.put("libtpu", nightly("libtpu", f"0.0.24.dev{day}+nightly"))
            index.put("jax", nightly("jax", f"0.8.0.dev{day}"))
            index.put("jaxlib", nightly("jaxlib", f"0.8.0.dev{day}"))
        index.put("torch", torch(TORCH_ALONE))
        yield index


@pytest.fixture(scope="module", autouse=True)
def _image_below() -> Iterator[None]:
    """Show the workers what is in the trainer's image."""
    layers = "{{.GraphDriver.Data.UpperDir}}:{{.GraphDriver.Data.LowerDir}}"
    for worker in map(Worker, WORKERS):
        worker.run(f"rm -rf {HOME}/stacks {HOME}/stack {HOME}/nightly_date")
        worker.run(
            f"mkdir -p {IMAGE} && mount -t overlay overlay {IMAGE} -o ro,lowerdir=$("
            f"docker image inspect mixtral-trainer:release --format '{layers}')"
        )
    yield
    for worker in map(Worker, WORKERS):
        worker.run(f"umount {IMAGE}; rm -rf {HOME}/stacks {HOME}/stack {HOME}/nightly_date")


@pytest.fixture(scope="module")
def native(index: Index) -> Iterator[Finished]:
    """Start playbooks for the nightly stack without Docker."""
    started = []
    origin = f"http://{index.login}@{index.host}"
    file = "torch_xla-{version}.dev{date}-{python}-{python}-linux_x86_64.whl"
    sources = {
        "torch_index": f"{origin}/torch",
        "torch_xla_wheel": f"{origin}/tpuvm/{file}",
        "libtpu_releases": f"{origin}/libtpu/index.html",
        "jax_releases": f"{origin}/jax/index.html",
        "jaxlib_releases": f"{origin}/jaxlib/index.html",
    }

    def start(name: str, *options: str, **variables: object) -> Playbook:
        wanted = {"runtime": "native", "stack": "nightly", "torch_xla_install_gib": 1}
        started.append(Playbook(name, *options, **(wanted | sources | variables)))
        return started[-1]

    yield start
    for one in started:
        one.abort()
        assert PASSWORD not in one.screen


@pytest.fixture(scope="module")
def finished(native: Finished) -> Finished:
    """Run playbooks to their end."""

    def run(*words: str, **variables: object) -> Playbook:
        one = native(*words, **variables)
        one.end()
        return one

    return run


@pytest.fixture(scope="module")
def installed(finished: Finished) -> Playbook:
    """The first of the nightlies on every worker."""
    run = finished("site.yml", nightly_date=FIRST)
    assert run.code == 0
    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def train(native: Finished, installed: Playbook, runs: Runs, tmp_path: Path) -> Finished:
    """Start a run of a small model."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"Line {number} of a text to learn.\n" for number in range(2000)))

    def start(**variables: object) -> Playbook:
        small = {
            "gmm": True,
            "train_file": str(text),
            "runs_dir": str(runs.directory),
        }
        return native("train.yml", **(SMALL_MODEL | small | variables))

    return start


def used(worker: Worker) -> str:
    """The stack that the link leads to, which works."""
    worker.run(f"{HOME}/stack/bin/python -c 'import torch'")
    return worker.run(f"readlink {HOME}/stack").strip()


def versions(worker: Worker) -> str:
    names = ("torch", "torch_xla", "libtpu", "jax", "jaxlib")
    code = f"from importlib.metadata import version; print(*map(version, {names}))"
    return worker.run(f'{HOME}/stack/bin/python -c "{code}"').strip()


def test_a_nightly_is_installed_on_every_worker(installed: Playbook) -> None:
    for worker in map(Worker, WORKERS):
        assert versions(worker) == (
            f"2.9.0.dev{FIRST}+cpu 2.9.0.dev{FIRST} 0.0.24.dev{FIRST}+nightly "
            f"0.8.0.dev{FIRST} 0.8.0.dev{FIRST}"
        )


# Without a date it is the one that the workers have, although there is a newer one.
@pytest.mark.usefixtures("installed")
def test_a_second_time_changes_nothing_and_asks_no_index(finished: Finished, index: Index) -> None:
    before = len(index.requests)
    run = finished("site.yml")
    assert run.code == 0
    assert run.screen.count("changed=0") == len(WORKERS)
    assert index.requests[before:] == []


def test_it_trains(train: Finished, runs: Runs) -> None:
    runs.assert_healthy(train(max_steps=STEPS), STEPS)
    for name in WORKERS:
        assert runs.end(name)["exit_code"] == 0
        assert (runs.worker(name) / "trainer.log").stat().st_size
        assert list(runs.worker(name).glob("profile/**/*.xplane.pb"))
    variables = (runs.directory / "latest/variables.yml").read_text()
    assert "://***@127.0.0.1" in variables
    assert PASSWORD not in variables


def test_a_run_ends_when_it_is_asked_to_and_when_nobody_follows_it(
    train: Finished, finished: Finished, w0: Worker, w1: Worker
) -> None:
    run = train(max_steps=1_000_000, train_lease_seconds=LEASE_SECONDS)
    run.wait_for(" step ")
    (trainer,) = w1.trainers()
    preloaded = w1.run(f"tr '\\0' '\\n' < /proc/{trainer}/environ | grep LD_PRELOAD")
    assert preloaded.strip() == "LD_PRELOAD="
    assert not w1.run("docker ps --quiet")
    status = finished("status.yml")
    assert "training since" in status.screen
    run.signal(signal.SIGKILL)
    stop = finished("stop.yml", "--limit=sim-w0")
    assert stop.code == 0
    assert "changed=1" in stop.table
    assert not w0.trainers()
    wait_until(lambda: not w1.trainers(), "the end of the lease")
    assert "was not renewed" in w1.run(f"tail -5 {HOME}/run/trainer.log")


def test_the_doctor_finds_the_stack_whole(finished: Finished, installed: Playbook) -> None:
    run = finished("doctor.yml", "--limit=sim-w0")
    assert run.code == 0
    assert "kernels compile for v5p: gmm forward, gmm backward" in " ".join(run.screen.split())


def test_a_download_that_breaks_off_leaves_the_stack_that_works(
    finished: Finished, installed: Playbook, index: Index, w1: Worker
) -> None:
    before = used(w1)
    index.faults.append(Fault(f"GET /tpuvm/torch_xla-2.9.0.dev{SECOND}", after=100, times=ALWAYS))
    run = finished("site.yml", "--tags=stack", "--limit=sim-w1", nightly_date=SECOND)
    index.faults.clear()
    assert run.code != 0
    assert f"***@{index.host}/tpuvm/torch_xla" in run.table
    assert f"dev{SECOND}-cp311-cp311-linux_x86_64.whl is invalid" in run.table
    assert used(w1) == before
    assert w1.run(f"ls {HOME}/stacks").split() == [before.removeprefix("stacks/")]


def test_another_stack_and_back_to_the_one_before(
    finished: Finished, installed: Playbook, index: Index, w1: Worker
) -> None:
    before = used(w1)
    bring = ("site.yml", "--tags=stack", "--limit=sim-w1")
    assert finished(*bring, nightly_date=SECOND).code == 0
    assert f"dev{SECOND}" in versions(w1)
    asked = len(index.requests)
    assert finished(*bring, nightly_date=FIRST).code == 0
    assert index.requests[asked:] == []
    assert used(w1) == before


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        pytest.param({"nightly_date": TORCH_ALONE}, SECOND, id="a date with half a build"),
        pytest.param(
            {"nightly_date": TORCH_ALONE, "torch_xla_install_gib": 100_000},
            "100000 are needed to install the stack nightly",
            id="too little room",
        ),
    ],
)
def test_what_cannot_be_installed_is_named_and_leaves_the_worker_as_it_was(
    finished: Finished, installed: Playbook, w1: Worker, variables: dict[str, object], said: str
) -> None:
    before = used(w1), w1.run(f"ls {HOME}/stacks"), w1.run(f"cat {HOME}/nightly_date")
    run = finished("site.yml", "--tags=stack", "--limit=sim-w1", **variables)
    assert run.code != 0
    assert said in run.table
    assert (used(w1), w1.run(f"ls {HOME}/stacks"), w1.run(f"cat {HOME}/nightly_date")) == before


def test_a_python_that_the_worker_lacks_and_nobody_has(
    finished: Finished, installed: Playbook, index: Index, w1: Worker, tmp_path: Path
) -> None:
    shutil.copytree(ROOT / "runtime", tmp_path / "runtime")
    declared = tmp_path / "runtime/requirements/nightly.env"
    declared.write_text(declared.read_text().replace("PYTHON=3.11", "PYTHON=3.13"))
    before = used(w1)
    run = finished(
        "site.yml",
        "--tags=stack",
        "--limit=sim-w1",
        torch_xla_source_dir=str(tmp_path),
        python_mirror=f"{index.origin}/python",
    )
    assert run.code != 0
    assert "uv could not install Python 3.13, which the stack nightly needs" in run.table
    assert f"from {index.origin}/python" in run.table
    assert index.asked("/python/")
    assert used(w1) == before
