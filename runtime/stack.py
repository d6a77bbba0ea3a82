"""Install a software stack into the environment of the Python that runs this program.

    python stack.py torch STACK                  install torch alone
    python stack.py rest STACK [--also FILE]     install all else; FILE: one more lock file
    python stack.py newest STACK                 print the newest day that has a nightly, YYYYMMDD

``container/Dockerfile`` runs ``torch`` and ``rest`` while it builds the image. The role
``torch_xla`` runs both on a worker with ``-e runtime=native``, in the worker's virtual environment.
The role ``nightly`` runs ``newest`` on the controller.

requirements/ beside this file defines the stacks: STACK.env has the Python version and the sources,
STACK.txt all packages but torch. A stack with a STACK.torch.txt is locked: every package, down to
the last dependency, is pinned with its hash. A stack without is a nightly: the day of its torch
decides the versions of torch_xla, libtpu and jax.

The environment overrides the variables of STACK.env, and the file of KEY=VALUE lines that the
environment variable STACK_SOURCES names overrides the environment. An address may contain a login,
which is never printed and appears neither in arguments of processes nor in the clone of a
repository.

pip's own configuration, SSL_CERT_FILE and GIT_SSL_CAINFO apply as well. Exit code 1, with one
message on stderr, if anything fails.
"""

import argparse
import base64
import http.client
import importlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from datetime import datetime
from pathlib import Path
from urllib.parse import unquote, urlsplit

REQUIREMENTS = Path(__file__).resolve().with_name("requirements")
# The platform tags of the nightly wheels for TPU VMs
PLATFORMS = ("manylinux_2_28_x86_64", "linux_x86_64")
DAY = re.compile(r"\.dev(\d{8})\b")
# Of requests by this program itself; pip's are configured by pip
ATTEMPTS = 4
SECONDS = 10  # until a request times out
# For a day without nightly, the number of nearby days that are checked as alternatives
NEIGHBOURS = 10

PIPS_INDEX = "pip's index"
LOCKED = ("--no-deps", "--require-hashes")
# No progress bar in a build's log, and no look for newer pips, which a mirror may lack
QUIET = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_PROGRESS_BAR": "off", "PIP_NO_INPUT": "1"}
MISMATCH = r"DO NOT MATCH .*HASHES.*\n\s+(\S+)(?: from (\S+?))?:?(?: |\n)"
DOWN = r"Retrying \(|Could not fetch URL|[Cc]onnection (broken|error|timed out)|IncompleteRead"
DOWN += r"|Max retries exceeded|HTTP error (5\d\d|429)|incomplete-download|ReadTimeout"


class Failure(Exception):
    """Ends this program; the message says what was wrong, from which source, and what to do."""


def masked(text: str) -> str:
    """Return ``text`` without the logins of the addresses in it."""
    return re.sub(r"://[^/\s]+@", "://***@", text)


def split_login(url: str) -> tuple[str, dict[str, str]]:
    """Return an address without its login, and the HTTP header with the login, if any."""
    parts = urlsplit(url)
    login, _, host = parts.netloc.rpartition("@")
    if not login or parts.scheme not in ("http", "https"):
        return url, {}
    token = base64.b64encode(unquote(login).encode()).decode()
    return parts._replace(netloc=host).geturl(), {"Authorization": f"Basic {token}"}


def declared(path: Path) -> dict[str, str]:
    """Return the KEY=VALUE lines of a file."""
    lines = path.read_text(encoding="utf-8").splitlines()
    pairs = (line.partition("=") for line in lines if line.strip() and not line.startswith("#"))
    return {name.strip(): value.strip() for name, _, value in pairs}


def sources(stack: str) -> dict[str, str]:
    """Return the variables of STACK.env, overridden by the environment and STACK_SOURCES."""
    known = sorted(path.stem for path in REQUIREMENTS.glob("*.env"))
    if stack not in known:
        raise Failure(f"there is no stack {stack!r}. There are: {', '.join(known)}")
    values = declared(REQUIREMENTS / f"{stack}.env")
    given = dict(os.environ)
    if path := os.environ.get("STACK_SOURCES"):
        given |= declared(Path(path))
    # The Python version cannot be overridden: lock files and Ansible rely on that of the file.
    replaced = {name: given[name] for name in values if name != "PYTHON" and given.get(name)}
    return values | replaced


def is_locked(stack: str) -> bool:
    """Return whether a stack is pinned and hashed."""
    return (REQUIREMENTS / f"{stack}.torch.txt").exists()


def torch_version() -> str:
    """Return the version of torch in this environment; "" if it is not installed."""
    importlib.invalidate_caches()
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return ""


def install(what: str, source: str, *arguments: str, **variables: str) -> None:
    """Run ``pip install`` with its output on screen; raise Failure with an explanation."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pip", "install", *arguments],
        env=os.environ | QUIET | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    lines = []
    for line in process.stdout:
        lines.append(masked(line))
        print(lines[-1], end="", flush=True)
    if process.wait():
        raise Failure(explain("".join(lines), what, masked(source)))


def explain(words: str, what: str, source: str) -> str:
    """Return what pip's output means and what to do, after installing ``what`` failed."""
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    if source == PIPS_INDEX and (indexes := re.search(r"^Looking in indexes: (.+)$", words, re.M)):
        source = f"{source}, {indexes[1]},"
    if "No space left on device" in words:
        places = (sys.prefix, tempfile.gettempdir())
        free = (f"{shutil.disk_usage(place).free >> 20} MiB free in {place}" for place in places)
        return f"no space left on the disk for {what}: {', '.join(free)}. Free some, run it again"
    if wrong := re.search(MISMATCH, words):
        return (
            f"{wrong[1]} from {wrong[2] or source} has another hash than it should: the file there "
            "is broken, or not the one that was locked. Run it again; if it stays, name another "
            "source"
        )
    if unfit := re.search(r"(\S+\.whl) is not a supported wheel on this platform", words):
        return f"{unfit[1]} from {source} is not for this Python, {python} on linux_x86_64"
    if gone := re.search(r"HTTP error (4\d\d) while getting (\S+)", words):
        return f"{what}: HTTP {gone[1]} for {gone[2]}. Name another source, or another version"
    absent = re.search(r"No matching distribution found for (.+?)(?: \(from|\n|$)", words)
    if re.search(DOWN, words) and "conflicting dependencies" not in words:
        page = re.search(r"Could not fetch URL (\S+?):? ", words)
        return (
            f"{absent[1] if absent else what} could not be had from {page[1] if page else source}, "
            "which is down or breaks off. Run it again; if it stays, name another source"
        )
    if absent:
        return (
            f"{source} has no {absent[1]} with a wheel for {python} on linux_x86_64, or does not "
            "answer. Name a source that has it"
        )
    errors = [line for line in words.splitlines() if line.lower().startswith("error")]
    return f"{what} from {source}: {(errors or words.splitlines() or ['pip failed'])[-1]}"


def versions(index: str, *options: str) -> list[str]:
    """Return the versions of torch in an index, the newest first; none if it does not answer."""
    command = [sys.executable, "-m", "pip", "index", "versions", "torch", *options]
    listed = subprocess.run(
        command,
        env=os.environ | QUIET | {"PIP_INDEX_URL": index},
        capture_output=True,
        text=True,
        check=False,
    )
    found = re.search(r"^Available versions: (.*)$", listed.stdout, re.MULTILINE)
    return found[1].split(", ") if found else []


def missing(url: str) -> str:
    """Return "" if there is a file at ``url``, else the server's answer; raises Failure."""
    plain, headers = split_login(url)
    said = ""
    for attempt in range(ATTEMPTS):
        try:
            request = urllib.request.Request(plain, headers=headers, method="HEAD")
            with urllib.request.urlopen(request, timeout=SECONDS):
                return ""
        except urllib.error.HTTPError as error:
            said = f"HTTP {error.code}"
            # Google's storage answers 403 for a missing file in a bucket that may not be listed.
            if error.code in (403, 404, 410):
                return said
        except (OSError, http.client.HTTPException) as error:
            said = str(getattr(error, "reason", error))
        if attempt + 1 < ATTEMPTS:
            time.sleep(0.5 * 2**attempt)
    raise Failure(
        f"torch_xla could not be had from {plain}: {said}, {ATTEMPTS} times. Run it again later, "
        "or name another TORCH_XLA_WHEEL"
    )


def builds(values: dict[str, str]) -> dict[str, str]:
    """Return the nightly version of torch by day, for the stack's Python."""
    options = ["--pre", "--python-version", values["PYTHON"]]
    for platform in PLATFORMS:
        options += ["--platform", platform]
    found: dict[str, str] = {}
    for version in versions(values["TORCH_INDEX"], *options):
        if day := DAY.search(version):
            found.setdefault(day[1], version)
    if not found:
        raise Failure(
            f"{values['TORCH_INDEX']} lists no nightly torch for {tag(values)} on "
            f"{' or '.join(PLATFORMS)}: it is down, or has none. Run it again later, or name "
            "another TORCH_INDEX"
        )
    return found


def date(day: str) -> datetime:
    """Return the date of a day written as YYYYMMDD."""
    return datetime.strptime(day, "%Y%m%d")


def tag(values: dict[str, str]) -> str:
    """Return the tag of the stack's Python in names of wheels, such as cp311."""
    return "cp" + values["PYTHON"].replace(".", "")


def wheel(values: dict[str, str], torch: str) -> str:
    """Return the address of the torch_xla wheel for the nightly version ``torch``."""
    version, _, date = torch.partition("+")[0].partition(".dev")
    url = values["TORCH_XLA_WHEEL"]
    for name, value in {"version": version, "date": date, "python": tag(values)}.items():
        url = url.replace(f"{{{name}}}", value)
    return url


def choose(values: dict[str, str]) -> str:
    """Return torch's version of NIGHTLY_DATE, or of the newest day that also has torch_xla."""
    day = values["NIGHTLY_DATE"]
    if day:
        try:
            date(day)
        except ValueError:
            message = f"NIGHTLY_DATE={day} is no day: YYYYMMDD, such as 20250929"
            raise Failure(message) from None
    found = builds(values)
    if not day:
        for version in found.values():
            if not missing(wheel(values, version)):
                return version
        newest = wheel(values, next(iter(found.values())))
        raise Failure(
            f"{values['TORCH_INDEX']} has torch of {len(found)} days for {tag(values)}, and none "
            f"of them has torch_xla: the newest would be {newest}. Name another TORCH_XLA_WHEEL"
        )
    if day not in found:
        lacking = f"torch for {tag(values)} in {values['TORCH_INDEX']}"
    elif answer := missing(wheel(values, found[day])):
        lacking = f"torch_xla for {tag(values)}: {answer} for {wheel(values, found[day])}"
    else:
        return found[day]
    others = sorted(set(found) - {day}, reverse=True)
    others.sort(key=lambda other: abs(date(other) - date(day)))
    near = [other for other in others[:NEIGHBOURS] if not missing(wheel(values, found[other]))]
    hint = f"The nearest days with both: {', '.join(near[:2])}" if near else "Nor have days near it"
    raise Failure(f"NIGHTLY_DATE={day} has no {lacking}. {hint}")


def install_torch(stack: str, values: dict[str, str]) -> None:
    """Install torch: a nightly, or the locked version, as CPU build if its index answers."""
    index = values["TORCH_INDEX"]
    if not is_locked(stack):
        pin = f"torch=={choose(values)}"
        install(pin, f"TORCH_INDEX {index}", pin, PIP_INDEX_URL=index)
        return
    lock = REQUIREMENTS / f"{stack}.torch.txt"
    wanted = re.search(r"^torch==(\S+)", lock.read_text(encoding="utf-8"), re.MULTILINE)[1]
    arguments = (*LOCKED, "--requirement", str(lock))
    found = versions(index, "--retries", "0", "--timeout", "5")
    if wanted in (version.partition("+")[0] for version in found):
        install("torch", f"TORCH_INDEX {index}", *arguments, PIP_INDEX_URL=index)
    else:
        print(f"No torch {wanted} from {masked(index)}: taking the default build", flush=True)
        install("torch", PIPS_INDEX, *arguments)
    if not torch_version().endswith("+cpu"):
        cuda = REQUIREMENTS / f"{stack}.cuda.txt"
        install("CUDA's libraries", PIPS_INDEX, *LOCKED, "--requirement", str(cuda))


def install_rest(stack: str, values: dict[str, str], also: Path | None) -> None:
    """Install all packages but torch, and keep the installed torch."""
    torch = torch_version()
    if not torch:
        raise Failure(f"torch is not there yet: stack.py torch {stack} comes first")
    requirements = str(REQUIREMENTS / f"{stack}.txt")
    if is_locked(stack):
        install(f"the stack {stack}", PIPS_INDEX, *LOCKED, "--requirement", requirements)
    else:
        day = DAY.search(torch)
        if not day or values["NIGHTLY_DATE"] not in ("", day[1]):
            raise Failure(
                f"torch is {torch}, and not the nightly {values['NIGHTLY_DATE']}: stack.py "
                f"torch {stack} comes first"
            )
        values = values | {"TORCH_XLA_WHEEL": wheel(values, torch)}
        pages = ", ".join(value for name, value in values.items() if name.endswith("_RELEASES"))
        with tempfile.TemporaryDirectory() as directory:
            constraint = Path(directory, "torch.txt")
            constraint.write_text(f"torch=={torch}\n", encoding="utf-8")
            install(
                f"the stack {stack} for torch {torch}",
                f"{values['TORCH_XLA_WHEEL']}, {pages} or {PIPS_INDEX}",
                "--requirement", requirements, "--constraint", str(constraint), **values,
            )  # fmt: skip
    if also:
        install(also.name, PIPS_INDEX, *LOCKED, "--requirement", str(also))
    if "TRANSFORMERS_REPOSITORY" in values:
        install_transformers(values["TRANSFORMERS_REPOSITORY"], values["TRANSFORMERS_BRANCH"])


def install_transformers(repository: str, branch: str) -> None:
    """Clone a branch of transformers into the environment, with its examples, and install it."""
    clone = Path(sys.prefix, "transformers")
    shutil.rmtree(clone, ignore_errors=True)
    plain, login = split_login(repository)
    environment = os.environ | {"GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}
    for header, value in login.items():
        environment |= {
            "GIT_CONFIG_COUNT": "1",
            "GIT_CONFIG_KEY_0": "http.extraHeader",
            "GIT_CONFIG_VALUE_0": f"{header}: {value}",
        }
    command = ["git", "clone", "--depth", "1", "--branch", branch, plain, str(clone)]
    try:
        cloned = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        raise Failure("git is not installed: the guide's transformers is a git branch") from None
    if cloned.returncode:
        reason = masked(cloned.stderr).strip().splitlines() or ["no word"]
        raise Failure(
            f"transformers: git cannot clone branch {branch} from {plain}: {reason[-1]}. Run it "
            "again, or name another TRANSFORMERS_REPOSITORY or TRANSFORMERS_BRANCH"
        )
    # Built with the setuptools of the lock file. Not installed as git+file://, for which pip makes
    # a filtered clone of this one: git hangs when it filters a shallow clone.
    install("transformers", plain, "--no-deps", "--no-build-isolation", str(clone))


def run(command: str, stack: str, also: Path | None) -> None:
    """Run one command of the command line; raises Failure."""
    values = sources(stack)
    if command == "newest":
        if is_locked(stack):
            raise Failure(f"the stack {stack} is locked: it has no nightlies")
        print(DAY.search(choose(values | {"NIGHTLY_DATE": ""}))[1])
        return
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    if python != values["PYTHON"]:
        raise Failure(
            f"the stack {stack} is for Python {values['PYTHON']}, and {sys.executable} is "
            f"{python}: make the environment with python{values['PYTHON']}"
        )
    if command == "torch":
        install_torch(stack, values)
    else:
        install_rest(stack, values, also)


def main() -> int:
    """Parse and run the command line; print what failed. Return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("command", choices=("torch", "rest", "newest"))
    parser.add_argument("stack", metavar="STACK")
    parser.add_argument("--also", type=Path, metavar="FILE", help="rest: one more lock file")
    options = parser.parse_args()
    try:
        run(options.command, options.stack, options.also)
    except (Failure, OSError) as failure:
        print(f"stack.py: {masked(str(failure))}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
