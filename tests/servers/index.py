"""A package index on 127.0.0.1 that the real pip talks to, and that can have a bad day.

    with Index() as index:
        index.put("whl/cpu", wheel("torch", "2.9.1+cpu", tag="cp311-cp311-linux_x86_64"))
        index.faults.append(Fault("GET /whl/cpu/torch/", times=2))
        subprocess.run(["pip", "install", "--index-url", f"{index.origin}/whl/cpu", "torch"])

A directory of wheels is what the real ones are: `/whl/cpu/torch/` is its page of a project (PEP
503), `/whl/cpu/index.html`, or any other `.html`, a page with links to all of it, for --find-links,
and `/whl/cpu/FILE` a wheel. Links are relative, so that it may be reached through a forwarded port.
Below `/git/` are the repositories of a directory, for git to clone. Standard library and git only.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import re
import subprocess
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from tests.servers.service import Handler, Service

BRANCH = "alanwaketan/moe"
RUN_CLM = "examples/pytorch/language-modeling/run_clm.py"

# A build backend that needs no package, so that an environment needs none to build this.
BACKEND = """
import zipfile

def build_wheel(directory, config_settings=None, metadata_directory=None):
    name = "transformers-4.40.0.dev0-py3-none-any.whl"
    info = "transformers-4.40.0.dev0.dist-info"
    with zipfile.ZipFile(f"{directory}/{name}", "w") as wheel:
        wheel.write("src/transformers/__init__.py", "transformers/__init__.py")
        metadata = "Metadata-Version: 2.1\\nName: transformers\\nVersion: 4.40.0.dev0\\n"
        wheel.writestr(f"{info}/METADATA", metadata)
        tags = "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n"
        wheel.writestr(f"{info}/WHEEL", tags)
        wheel.writestr(f"{info}/RECORD", "")
    return name
"""
PROJECT = """
[build-system]
requires = []
build-backend = "setup"
backend-path = ["."]
"""
FORK = {
    "pyproject.toml": PROJECT,
    "setup.py": BACKEND,
    "src/transformers/__init__.py": '__version__ = "4.40.0.dev0"\n',
    RUN_CLM: "import transformers\n\nprint('trained with', transformers.__version__)\n",
}


@dataclass
class Wheel:
    """A wheel: the name of its file, and its content."""

    name: str
    data: bytes

    @property
    def sha256(self) -> str:
        """Its hash, as a lock file has it."""
        return hashlib.sha256(self.data).hexdigest()

    @property
    def project(self) -> str:
        """The name of its project, as an index has it in addresses."""
        return normalized(self.name.partition("-")[0])


def normalized(project: str) -> str:
    """Return the name of a project as PEP 503 writes it."""
    return re.sub(r"[-_.]+", "-", project).lower()


def wheel(
    name: str,
    version: str,
    tag: str = "py3-none-any",
    requires: Sequence[str] = (),
    extras: Sequence[str] = (),
    files: Mapping[str, str | bytes] | None = None,
) -> Wheel:
    """Make a wheel of ``files``, by default one module that knows its version."""
    module = re.sub(r"[-.]+", "_", name)
    info = f"{module}-{version}.dist-info"
    metadata = [
        "Metadata-Version: 2.1",
        f"Name: {name}",
        f"Version: {version}",
        *(f"Provides-Extra: {extra}" for extra in extras),
        *(f"Requires-Dist: {requirement}" for requirement in requires),
    ]
    files = files or {f"{module}/__init__.py": f"__version__ = {version!r}\n"}
    content = {
        **files,
        f"{info}/METADATA": "\n".join([*metadata, ""]),
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n",
        f"{info}/RECORD": "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"]),
    }
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as packed:
        for path, text in content.items():
            # With a fixed date, so that the same wheel has the same hash.
            packed.writestr(zipfile.ZipInfo(path), text)
    return Wheel(f"{module}-{version}-{tag}.whl", archive.getvalue())


def fork(
    directory: Path,
    branch: str = BRANCH,
    files: Mapping[str, str] = FORK,
    name: str = "transformers",
) -> str:
    """Make a repository below ``directory`` with one commit on ``branch``; return its address."""
    repository = directory / f"{name}.git"
    repository.mkdir(parents=True)
    for path, text in files.items():
        (repository / path).parent.mkdir(parents=True, exist_ok=True)
        (repository / path).write_text(text, encoding="utf-8")
    author = ["-c", "user.name=Ada", "-c", "user.email=ada@example.com"]
    for command in (
        ["init", "--quiet", f"--initial-branch={branch}"],
        ["add", "."],
        [*author, "commit", "--quiet", "--message=A branch"],
    ):
        subprocess.run(["git", *command], cwd=repository, check=True)
    return repository.as_uri()


class Index(Service):
    """The server: what it holds, what goes wrong, and what it was asked."""

    def __init__(self, repositories: Path | None = None) -> None:
        super().__init__(_Handler)
        self.directories: dict[str, list[Wheel]] = {}
        self.repositories = repositories
        self.login = ""
        (self.origin,) = self.origins
        self.host = self.origin.removeprefix("http://")

    def put(self, directory: str, *wheels: Wheel) -> None:
        """Put wheels into a directory, such as whl/cpu."""
        self.directories.setdefault(directory, []).extend(wheels)


class _Handler(Handler):
    """Pages, wheels and repositories."""

    def route(self) -> None:
        index, path = self.server.service, self.asked_for
        login = base64.b64encode(index.login.encode()).decode()
        if index.login and self.headers.get("Authorization") != f"Basic {login}":
            self.refuse(401, "who are you?", {"WWW-Authenticate": 'Basic realm="index"'})
        if path.startswith("/git/") and index.repositories:
            self.git(index.repositories, path.removeprefix("/git"))
        directory, _, name = path.strip("/").rpartition("/")
        held = index.directories.get(directory, [])
        for it in held:
            if it.name == name:
                self.answer(200, it.data, {"Content-Type": "application/octet-stream"})
        if name.endswith(".html"):
            self.page("", held)
        if links := [it for it in held if it.project == normalized(name)]:
            self.page("../", links)
        self.refuse(404, "not found")

    def page(self, up: str, wheels: list[Wheel]) -> None:
        """Send a page with a link to every wheel."""
        links = (
            f'<a href="{up}{quote(it.name)}#sha256={it.sha256}">{it.name}</a><br>\n'
            for it in wheels
        )
        body = f"<!DOCTYPE html>\n<html><body>\n{''.join(links)}</body></html>\n".encode()
        self.answer(200, body, {"Content-Type": "text/html"})

    def git(self, repositories: Path, path: str) -> None:
        """Let git itself answer, which is a CGI program."""
        environment = os.environ | {
            "GIT_PROJECT_ROOT": str(repositories),
            "GIT_HTTP_EXPORT_ALL": "1",
            "REQUEST_METHOD": self.command,
            "PATH_INFO": path,
            "QUERY_STRING": self.url.query,
            "CONTENT_TYPE": self.headers.get("Content-Type", ""),
            "CONTENT_LENGTH": str(len(self.body)),
            "HTTP_CONTENT_ENCODING": self.headers.get("Content-Encoding", ""),
            "GIT_PROTOCOL": self.headers.get("Git-Protocol", ""),
        }
        ran = subprocess.run(
            ["git", "http-backend"],
            env=environment, input=self.body, capture_output=True, check=True,
        )  # fmt: skip
        head, _, content = ran.stdout.partition(b"\r\n\r\n")
        headers = dict(line.split(": ", 1) for line in head.decode().split("\r\n"))
        status = int(headers.pop("Status", "200").split()[0])
        self.answer(status, content, headers)
