"""The stacks as users get them: the real pip and the real git, against an index on this machine."""

import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable, Iterator
from pathlib import Path

import pip
import pytest

from tests.servers.faults import ALWAYS, Fault
from tests.servers.index import BRANCH, RUN_CLM, Index, Wheel, fork, wheel

RUNTIME = Path(__file__).parents[2] / "runtime"
REQUIREMENTS = RUNTIME / "requirements"
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
TAG = f"cp{PYTHON.replace('.', '')}"
MANYLINUX = f"{TAG}-{TAG}-manylinux_2_28_x86_64"
# An origin that nobody answers at: the port of TCP's own multiplexer, which nobody speaks
NOBODY = "http://127.0.0.1:1"


def nightly_torch(day: str, tag: str = TAG) -> Wheel:
    return wheel("torch", f"2.9.0.dev{day}+cpu", f"{tag}-{tag}-manylinux_2_28_x86_64", ["filelock"])


def nightly_torch_xla(day: str, jax: str, tag: str = TAG) -> Wheel:
    """torch_xla's nightly, which asks for a libtpu of its own day and a jax of another one."""
    return wheel(
        "torch_xla",
        f"2.9.0.dev{day}",
        f"{tag}-{tag}-linux_x86_64",
        [
            "absl-py>=1.0.0",
            f'libtpu==0.0.24.dev{day}+nightly; extra == "tpu"',
            'tpu-info; extra == "tpu"',
            f'jax==0.8.0.dev{jax}; extra == "pallas"',
            f'jaxlib==0.8.0.dev{jax}; extra == "pallas"',
        ],
        ["tpu", "pallas"],
    )


CPU = wheel("torch", "2.9.1+cpu", MANYLINUX)
CUDA = wheel("torch", "2.9.1", MANYLINUX)
LIBRARY = wheel("nvidia-cublas-cu12", "12.8.4.1")
XLA = wheel("torch_xla", "2.9.0", MANYLINUX)
PYTEST = wheel("pytest", "9.0")
DAYS = {"20250928": "20250927", "20250929": "20251001", "20251002": "20251003"}


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Index]:
    """The default index, PyTorch's and Google's, each in a directory."""
    (tmp_path / "git").mkdir()
    with Index(tmp_path / "git") as index:
        index.put("whl/cpu", CPU)
        index.put("simple", CUDA, LIBRARY, XLA, PYTEST)
        index.put("simple", *(wheel(name, "1.0") for name in ("absl-py", "tpu-info", "filelock")))
        # Newer ones, and one that wants another torch: neither must get in.
        for name, versions in {"transformers": ("5.23.0", "6.0"), "datasets": ("5.2.0",)}.items():
            index.put("simple", *(wheel(name, it, requires=["torch"]) for it in versions))
        index.put("simple", wheel("flax", "0.12.0", requires=["jax>=0.7.1"]))
        index.put("nightly/cpu", wheel("filelock", "1.0"))
        for day, jax in DAYS.items():
            index.put("nightly/cpu", nightly_torch(day))
            index.put("tpuvm", nightly_torch_xla(day, jax))
            index.put("libtpu", wheel("libtpu", f"0.0.24.dev{day}+nightly"))
            index.put("jax", wheel("jax", f"0.8.0.dev{jax}"), wheel("jax", f"0.9.0.dev{jax}"))
            index.put("jaxlib", wheel("jaxlib", f"0.8.0.dev{jax}", MANYLINUX))
        # A day with torch alone, and one with another Python's wheels
        index.put("nightly/cpu", nightly_torch("20251004"), nightly_torch("20251005", "cp310"))
        index.put("tpuvm", nightly_torch_xla("20251005", "20251005", "cp310"))
        yield index


@pytest.fixture(scope="session")
def empty_environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment that holds pip and nothing else."""
    directory = tmp_path_factory.mktemp("environment") / "venv"
    venv.create(directory, symlinks=True)
    packages = directory / f"lib/python{PYTHON}/site-packages"
    (packages / "pip").symlink_to(Path(pip.__file__).parent)
    return directory


class Environment:
    """A virtual environment with the program and its requirements beside it."""

    def __init__(self, directory: Path, program: Path, variables: dict[str, str]) -> None:
        self.directory = directory
        self.program = program
        self.variables = variables
        self.packages = directory / f"lib/python{PYTHON}/site-packages"

    def stack(self, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.directory / "bin/python", self.program, *words],
            env=self.variables | variables,
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip

    def held(self) -> dict[str, str]:
        """Return what is installed, as the directory says."""
        names = (path.name.removesuffix(".dist-info") for path in self.packages.glob("*-info"))
        return dict(name.split("-", 1) for name in names)


@pytest.fixture
def environment(tmp_path: Path, index: Index, empty_environment: Path) -> Environment:
    """An empty environment, and the stacks of small packages."""
    # Its python says where it is by where it lies, so that a copy is another one.
    directory = tmp_path / "venv"
    shutil.copytree(empty_environment, directory, symlinks=True)
    program = tmp_path / "runtime/stack.py"
    shutil.copytree(REQUIREMENTS, program.parent / "requirements")
    shutil.copy(RUNTIME / "stack.py", program)
    write_lock(program, "release.torch", CPU, CUDA)
    write_lock(program, "release.cuda", LIBRARY)
    write_lock(program, "release", XLA)
    write_lock(program, "guide.torch", CPU, CUDA)
    write_lock(program, "guide.cuda", LIBRARY)
    write_lock(program, "guide", XLA)
    write_lock(program, "test", PYTEST)
    variables = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "NO_PROXY": "127.0.0.1",
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_INDEX_URL": f"{index.origin}/simple",
        # Of pip's patience a test needs little.
        "PIP_RETRIES": "1",
        "LIBTPU_RELEASES": f"{index.origin}/libtpu/index.html",
        "JAX_RELEASES": f"{index.origin}/jax/nightly.html",
        "JAXLIB_RELEASES": f"{index.origin}/jaxlib/nightly.html",
        "TORCH_XLA_WHEEL": index.origin
        + "/tpuvm/torch_xla-{version}.dev{date}-{python}-{python}-linux_x86_64.whl",
        "TRANSFORMERS_REPOSITORY": f"{index.origin}/git/transformers.git",
    }
    return Environment(directory, program, variables)


@pytest.fixture
def nightly(environment: Environment, index: Index) -> Callable:
    """Return what runs the program for the stack nightly."""

    def run(command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        variables = {"TORCH_INDEX": f"{index.origin}/nightly/cpu"} | variables
        return environment.stack(command, "nightly", **variables)

    return run


@pytest.fixture
def release(environment: Environment, index: Index) -> Callable:
    """Return what runs the program for the stack release."""

    def run(command: str, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        variables = {"TORCH_INDEX": f"{index.origin}/whl/cpu"} | variables
        return environment.stack(command, "release", *words, **variables)

    return run


def write_lock(program: Path, name: str, *wheels: Wheel) -> None:
    """Write a lock file of one package; a wheel beside the first is another build of it."""
    project, version = wheels[0].name.split("-")[:2]
    hashes = " ".join(f"--hash=sha256:{it.sha256}" for it in wheels)
    text = f"{project}=={version.partition('+')[0]} {hashes}\n"
    program.with_name("requirements").joinpath(f"{name}.txt").write_text(text)


def complaint(ran: subprocess.CompletedProcess[str]) -> str:
    """Return the one message of a program that has failed."""
    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert "Traceback" not in ran.stderr
    (line,) = (it for it in ran.stderr.splitlines() if it.startswith("stack.py: "))
    return line


def assert_success(ran: subprocess.CompletedProcess[str]) -> None:
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_release_is_the_cpu_build_and_what_is_locked(release, environment):
    assert_success(release("torch"))
    assert environment.held() == {"torch": "2.9.1+cpu"}
    tests = environment.program.parent / "requirements/test.txt"
    assert_success(release("rest", "--also", str(tests)))
    assert environment.held() == {"torch": "2.9.1+cpu", "torch_xla": "2.9.0", "pytest": "9.0"}


@pytest.mark.parametrize("cpu", [NOBODY, "{origin}/down", "{origin}/libtpu"])
def test_without_a_cpu_index_it_is_the_default_build_with_its_libraries(
    release, environment, index, cpu
):
    index.faults.append(Fault("GET /down", times=ALWAYS))
    assert_success(release("torch", TORCH_INDEX=cpu.format(origin=index.origin)))
    assert environment.held() == {"torch": "2.9.1", "nvidia_cublas_cu12": "12.8.4.1"}
    # Asked once: a worker that cannot reach it must not wait long.
    assert index.asked("/down") <= 1


def test_a_day_decides_about_every_nightly(nightly, environment):
    day = {"NIGHTLY_DATE": "20250929"}
    assert_success(nightly("torch", **day))
    assert_success(nightly("rest", **day))
    assert environment.held() == {
        "torch": "2.9.0.dev20250929+cpu",
        "torch_xla": "2.9.0.dev20250929",
        "libtpu": "0.0.24.dev20250929+nightly",
        "jax": "0.8.0.dev20251001",
        "jaxlib": "0.8.0.dev20251001",
        "transformers": "5.23.0",
        "datasets": "5.2.0",
        "flax": "0.12.0",
        **dict.fromkeys(("absl_py", "tpu_info", "filelock"), "1.0"),
    }
    # Another day is refused rather than mixed in, and so is a stack without torch.
    assert "torch is 2.9.0.dev20250929+cpu, and not the nightly 20251002" in complaint(
        nightly("rest", NIGHTLY_DATE="20251002")
    )


def test_without_a_day_it_is_the_newest_that_torch_and_torch_xla_have(nightly, environment):
    newest = nightly("newest")
    assert (newest.returncode, newest.stdout) == (0, "20251002\n")
    assert_success(nightly("torch"))
    assert environment.held()["torch"] == "2.9.0.dev20251002+cpu"


def test_the_newest_is_that_of_the_stacks_python_whichever_runs_this(nightly, environment, index):
    declaration = environment.program.parent / "requirements/nightly.env"
    text = declaration.read_text()
    declaration.write_text(text.replace("PYTHON=3.11", "PYTHON=3.10"))
    assert nightly("newest").stdout == "20251005\n"
    # A Makefile's PYTHON is none of this program's.
    declaration.write_text(text)
    assert nightly("newest", PYTHON="python3.10").stdout == "20251002\n"


def test_a_busy_server_is_asked_again(nightly, index):
    index.faults.append(Fault("HEAD /tpuvm/torch_xla-2.9.0.dev20251002", status=502))
    index.faults.append(Fault("HEAD /tpuvm/torch_xla-2.9.0.dev20251002", status=429))
    assert nightly("newest").stdout == "20251002\n"
    assert index.asked("HEAD /tpuvm/torch_xla-2.9.0.dev20251002") == 3


def test_a_server_that_is_down_is_named(nightly, index):
    index.faults.append(Fault("HEAD /tpuvm", times=ALWAYS))
    said = complaint(nightly("newest"))
    assert f"torch_xla could not be had from {index.origin}/tpuvm/" in said
    assert "HTTP 503, 4 times" in said
    assert f"{NOBODY} lists no nightly torch for {TAG}" in complaint(
        nightly("torch", TORCH_INDEX=NOBODY)
    )


@pytest.mark.parametrize(
    ("day", "said"),
    [
        ("20250930", f"NIGHTLY_DATE=20250930 has no torch for {TAG} in {{origin}}/nightly/cpu. "),
        ("20251004", f"NIGHTLY_DATE=20251004 has no torch_xla for {TAG}: HTTP 404 for {{origin}}"),
        ("20251005", f"NIGHTLY_DATE=20251005 has no torch for {TAG} in {{origin}}/nightly/cpu. "),
    ],
)
def test_a_day_without_a_build_is_told_the_nearest_with_one(nightly, environment, index, day, said):
    words = complaint(nightly("torch", NIGHTLY_DATE=day))
    assert said.format(origin=index.origin) in words
    nearest = "20250929, 20251002" if day == "20250930" else "20251002, 20250929"
    assert words.endswith(f"The nearest days with both: {nearest}")
    assert not environment.held()


def test_what_is_no_day_is_refused(nightly, index):
    assert "NIGHTLY_DATE=20251332 is no day: YYYYMMDD" in complaint(
        nightly("torch", NIGHTLY_DATE="20251332")
    )
    assert not index.requests


def test_an_unknown_stack_is_told_the_known_ones(environment):
    said = complaint(environment.stack("torch", "nightli"))
    assert said == "stack.py: there is no stack 'nightli'. There are: guide, nightly, release"


def test_another_python_is_refused(environment):
    declaration = environment.program.parent / "requirements/release.env"
    declaration.write_text("PYTHON=3.9\nTORCH_INDEX=\n")
    said = complaint(environment.stack("torch", "release"))
    assert f"the stack release is for Python 3.9, and {environment.directory}" in said


def test_a_wheel_for_another_python_is_named_with_the_tag_that_was_asked_for(
    release, environment, index
):
    index.directories["simple"] = [wheel("torch_xla", "2.9.0", "cp310-cp310-linux_x86_64")]
    assert_success(release("torch"))
    said = complaint(release("rest"))
    assert f"has no torch_xla==2.9.0 with a wheel for {TAG} on linux_x86_64" in said


@pytest.mark.parametrize("fault", [{}, {"after": 100}], ids=["503", "breaks off"])
def test_a_download_that_fails_once_is_made_again(release, environment, index, fault):
    index.faults.append(Fault("GET /whl/cpu/torch-", **fault))
    assert_success(release("torch"))
    assert environment.held() == {"torch": "2.9.1+cpu"}


@pytest.mark.parametrize("fault", [{}, {"after": 100}], ids=["503", "breaks off"])
def test_a_download_that_always_fails_is_named(release, index, fault):
    index.faults.append(Fault("GET /whl/cpu/torch-", times=ALWAYS, **fault))
    said = complaint(release("torch"))
    assert "torch" in said
    assert f"TORCH_INDEX {index.origin}/whl/cpu, which is down or breaks off" in said


def test_a_default_index_that_is_down_is_named(release, index):
    assert_success(release("torch"))
    index.faults.append(Fault("GET /simple", times=ALWAYS))
    said = complaint(release("rest"))
    assert f"pip's index, {index.origin}/simple, has no torch_xla==2.9.0" in said
    assert "or does not answer" in said


def test_other_bytes_than_the_locked_ones_are_refused(release, environment, index):
    index.faults.append(Fault("GET /whl/cpu/torch-", wrong=True, times=ALWAYS))
    said = complaint(release("torch"))
    assert said.startswith("stack.py: torch")
    assert f"from {index.origin}/whl/cpu/" in said
    assert "has another hash than it should" in said
    assert not environment.held()


def test_a_full_disk_is_named_with_what_is_left(release, environment, index, tmp_path):
    big = wheel("torch_xla", "2.9.0", MANYLINUX, files={"torch_xla/lib.so": os.urandom(4 << 20)})
    index.directories["simple"] = [big]
    write_lock(environment.program, "release", big)
    assert_success(release("torch"))
    small = environment.packages.parent
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M", "small", small], check=True)
    try:
        environment.packages.mkdir()
        (environment.packages / "pip").symlink_to(Path(pip.__file__).parent)
        assert_success(release("torch"))
        said = complaint(release("rest"))
    finally:
        subprocess.run(["umount", small], check=True)
    assert "no space left on the disk for the stack release: " in said
    assert f"MiB free in {environment.directory}" in said


def test_a_login_opens_the_sources_and_is_shown_nowhere(environment, index, tmp_path):
    index.login = "ada:se%cret"
    sources = tmp_path / "sources"
    origin = f"http://ada:se%25cret@{index.host}"
    (tmp_path / "pip.conf").write_text(f"[global]\nindex-url = {origin}/simple\n")
    sources.write_text(
        f"TORCH_INDEX={origin}/nightly/cpu\nTORCH_XLA_WHEEL={origin}/tpuvm/"
        "torch_xla-{version}.dev{date}-{python}-{python}-linux_x86_64.whl\n"
        f"LIBTPU_RELEASES={origin}/libtpu/index.html\n"
        f"JAX_RELEASES={origin}/jax/index.html\nJAXLIB_RELEASES={origin}/jaxlib/index.html\n"
        f"TRANSFORMERS_REPOSITORY={origin}/git/transformers.git\nNIGHTLY_DATE=20250929\n"
    )
    environment.variables |= {
        "STACK_SOURCES": str(sources),
        "PIP_CONFIG_FILE": str(tmp_path / "pip.conf"),
    }
    del environment.variables["PIP_INDEX_URL"]
    runs = [environment.stack(command, "nightly") for command in ("torch", "rest")]
    for ran in runs:
        assert_success(ran)
    assert environment.held()["jax"] == "0.8.0.dev20251001"

    sources.write_text(sources.read_text().replace("tpuvm", "nowhere"))
    runs.append(environment.stack("torch", "nightly"))
    assert f"HTTP 404 for http://***@{index.host}/nowhere" in complaint(runs[-1])
    assert not [ran for ran in runs if "cret" in ran.stdout + ran.stderr]


@pytest.fixture
def guide(environment: Environment, index: Index) -> Callable:
    """Return what runs the second half of the stack guide, with torch there."""
    ran = environment.stack("torch", "guide", TORCH_INDEX=f"{index.origin}/whl/cpu")
    assert_success(ran)
    return lambda **variables: environment.stack("rest", "guide", **variables)


def test_guide_has_the_branch_and_its_script(guide, environment, index, tmp_path):
    fork(tmp_path / "git")
    assert_success(guide())
    run_clm = environment.directory / "transformers" / RUN_CLM
    ran = subprocess.run(
        [environment.directory / "bin/python", run_clm], capture_output=True, text=True, check=True
    )
    assert ran.stdout == "trained with 4.40.0.dev0\n"
    assert environment.held() == {
        "torch": "2.9.1+cpu", "torch_xla": "2.9.0", "transformers": "4.40.0.dev0",
    }  # fmt: skip
    # What has moved on since is taken at the next time.
    script = tmp_path / "git/transformers.git" / RUN_CLM
    script.write_text("print('anew')\n")
    commit = ["commit", "--quiet", "--all", "--message=Anew"]
    author = ["-c", "user.name=Ada", "-c", "user.email=ada@example.com"]
    subprocess.run(["git", *author, *commit], cwd=script.parents[3], check=True)
    assert_success(guide())
    assert run_clm.read_text() == "print('anew')\n"


def test_guides_repository_may_need_a_login_that_the_clone_does_not_keep(
    guide, environment, index, tmp_path
):
    fork(tmp_path / "git")
    index.login = "ada:secret"
    address = f"http://ada:secret@{index.host}"
    ran = guide(
        PIP_INDEX_URL=f"{address}/simple",
        TRANSFORMERS_REPOSITORY=f"{address}/git/transformers.git",
    )
    assert_success(ran)
    assert "secret" not in ran.stdout + ran.stderr
    config = (environment.directory / "transformers/.git/config").read_text()
    assert f"url = {index.origin}/git/transformers.git" in config


def test_a_branch_that_is_not_there_is_named(guide, index, tmp_path):
    fork(tmp_path / "git", branch="main")
    said = complaint(guide())
    assert f"cannot clone branch {BRANCH} from {index.origin}/git/transformers.git: " in said
    assert f"Remote branch {BRANCH} not found" in said
    assert "name another TRANSFORMERS_REPOSITORY or TRANSFORMERS_BRANCH" in said
    assert f"cannot clone branch main from {NOBODY}/it.git" in complaint(
        guide(TRANSFORMERS_REPOSITORY=f"{NOBODY}/it.git", TRANSFORMERS_BRANCH="main")
    )
