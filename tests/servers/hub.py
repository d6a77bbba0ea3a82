"""A Hugging Face hub on 127.0.0.1 that the real clients talk to, and that can have a bad day.

    with Hub() as hub:
        hub.add("org/model", {"config.json": b"{}"}, gated=True)
        token = hub.token(reads=["org/model"])
        hub.faults.append(Fault("GET /api/whoami-v2", status=503))
        snapshot_download("org/model", endpoint=hub.endpoint, token=token)

It speaks what huggingface_hub, transformers and datasets ask for to read a repository. Large files
are on another origin, as on the real hub: their links are signed, and whoever sends his token there
is refused. With ``tls`` it speaks https. Standard library only, so that it also runs where the
trainer's image does. ``requests`` is what it was asked, ``reads`` whom it gave which file.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
import ssl
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs

from tests.servers.service import Handler, Service

LARGE = 1_000_000  # from here on a file is not in git but in the large file storage
STAMP = "2026-01-02T03:04:05.000Z"

API = re.compile(
    r"/api/(?P<kind>model|dataset)s/(?P<name>.+?)"
    r"(?:/(?P<what>revision|tree|paths-info|refs|auth-check)(?:/(?P<revision>[^/]+)(?:/(?P<path>.+))?)?)?"
)
RESOLVE = re.compile(
    r"/(?P<dataset>datasets/)?(?P<name>.+?)/resolve/(?P<revision>[^/]+)/(?P<path>.+)"
)


@dataclass
class Repository:
    """A repository and what is in it."""

    kind: str
    name: str
    files: dict[str, bytes]
    gated: bool
    private: bool

    @property
    def commit(self) -> str:
        """The id of the one commit."""
        listing = json.dumps({path: git_id(data) for path, data in self.files.items()})
        return hashlib.sha1(f"{self.kind} {self.name} {listing}".encode()).hexdigest()

    def entry(self, path: str) -> dict[str, Any]:
        """A file as a listing has it."""
        data = self.files[path]
        entry = {"type": "file", "path": path, "size": len(data), "oid": git_id(data)}
        if len(data) >= LARGE:
            entry["lfs"] = {"oid": sha256(data), "size": len(data), "pointerSize": 134}
        return entry

    def tree(self, below: str, recursive: bool) -> list[dict[str, Any]]:
        """Files and directories below a directory, "" for all."""
        prefix = f"{below}/" if below else ""
        entries: dict[str, dict[str, Any]] = {}
        for path in sorted(self.files):
            if path.startswith(prefix):
                steps = path.removeprefix(prefix).split("/")
                for depth in range(1, len(steps) if recursive else min(len(steps), 2)):
                    directory = prefix + "/".join(steps[:depth])
                    oid = git_id(directory.encode())
                    entries[directory] = {
                        "type": "directory", "path": directory, "size": 0, "oid": oid,
                    }  # fmt: skip
                if recursive or len(steps) == 1:
                    entries[path] = self.entry(path)
        return list(entries.values())


@dataclass
class Access:
    """What a token is good for."""

    user: str
    expired: bool
    reads: frozenset[str]


def git_id(data: bytes) -> str:
    """The id of a blob in git."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def sha256(data: bytes) -> str:
    """The id of a blob in the large file storage."""
    return hashlib.sha256(data).hexdigest()


class Hub(Service):
    """The hub: what it holds, whom it knows, and what it was asked."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        super().__init__(_Front, _Storage, tls=tls)
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.moved: dict[str, str] = {}
        self.tokens: dict[str, Access] = {}
        self.reads: list[tuple[str | None, str]] = []
        self._key = secrets.token_bytes(16)
        self.endpoint, self._storage = self.origins

    def add(
        self, name: str, files: dict[str, bytes], *, kind: str = "model",
        gated: bool = False, private: bool = False,
    ) -> Repository:  # fmt: skip
        """Add a repository, or replace it by a new commit."""
        repository = Repository(kind, name, files, gated, private)
        self.repositories[kind, name] = repository
        return repository

    def token(self, user: str = "ada", *, expired: bool = False, reads: Iterable[str] = ()) -> str:
        """Return a new token that may read the gated and private repositories ``reads``."""
        token = f"hf_{secrets.token_hex(17)}"
        self.tokens[token] = Access(user, expired, frozenset(reads))
        return token

    def link(self, digest: str) -> str:
        """Return the signed address of a large file."""
        return f"{self._storage}/{digest}?Signature={self.signature(digest)}"

    def signature(self, digest: str) -> str:
        """Return what makes the address of a large file valid."""
        return hmac.new(self._key, digest.encode(), hashlib.sha256).hexdigest()


class _Handler(Handler):
    """What both origins have in common: the numbers of answers, and the hub's errors."""

    @property
    def hub(self) -> Hub:
        return self.server.service

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        number = {"X-Request-Id": f"Root=1-{secrets.token_hex(12)}"}
        super().answer(status, body, number | (headers or {}))

    def refuse(
        self, status: int, message: str, headers: dict[str, str] | None = None, code: str = ""
    ) -> None:
        """Send an error as the hub words it: in a header for HEAD, and in the body."""
        headers = {"X-Error-Message": message} | (headers or {})
        if code:
            headers["X-Error-Code"] = code
        self.json({"error": message}, status, headers)


class _Storage(_Handler):
    """Where large files are. A link is all that is needed, and all that is taken."""

    def route(self) -> None:
        digest = self.asked_for.strip("/")
        if self.headers.get("Authorization"):
            self.refuse(400, "Only one auth mechanism allowed")
        if not hmac.compare_digest(self.query.get("Signature", ""), self.hub.signature(digest)):
            self.refuse(403, "AccessDenied")
        for repository in self.hub.repositories.values():
            for data in repository.files.values():
                if len(data) >= LARGE and sha256(data) == digest:
                    self.file(data, {"ETag": f'"{digest}"'})
        self.refuse(404, "NoSuchKey")


class _Front(_Handler):
    """The hub itself."""

    def route(self) -> None:
        self.access = self.identify()
        if self.asked_for == "/api/whoami-v2":
            self.whoami()
        if found := API.fullmatch(self.asked_for):
            self.api(self.repository(found["kind"], found["name"]), **found.groupdict())
        if found := RESOLVE.fullmatch(self.asked_for):
            kind = "dataset" if found["dataset"] else "model"
            self.resolve(self.repository(kind, found["name"]), found["revision"], found["path"])
        self.refuse(404, "Sorry, we can't find the page you are looking for.")

    def identify(self) -> Access | None:
        """Return whose request it is, None for anybody's. What claims to be a token must be one."""
        header = self.headers.get("Authorization")
        if header is None:
            return None
        access = self.hub.tokens.get(header.removeprefix("Bearer "))
        if access is None:
            self.refuse(401, "Invalid credentials in Authorization header")
        if access.expired:
            self.refuse(401, 'User Access Token "training" is expired')
        return access

    def whoami(self) -> None:
        if not self.access:
            self.refuse(401, "Invalid username or password.")
        role = {"displayName": "training", "role": "read", "createdAt": STAMP}
        self.json(
            {
                "type": "user",
                "id": "0123456789abcdef01234567",
                "name": self.access.user,
                "fullname": self.access.user,
                "isPro": False,
                "orgs": [],
                "auth": {"type": "access_token", "accessToken": role},
            }
        )

    def may_read(self, repository: Repository) -> bool:
        return bool(self.access) and repository.name in self.access.reads

    def repository(self, kind: str, name: str) -> Repository:
        """Return a repository; one that is private is not there for those who may not read it.

        The present address of one that has moved is told.
        """
        if new := self.hub.moved.get(name):
            self.answer(307, b"", {"Location": self.path.replace(name, new, 1)})
        repository = self.hub.repositories.get((kind, name))
        if not repository or (repository.private and not self.may_read(repository)):
            if self.access:
                self.refuse(404, "Repository not found", code="RepoNotFound")
            self.refuse(401, "Invalid username or password.", code="RepoNotFound")
        return repository

    def pass_gate(self, repository: Repository) -> None:
        """Refuse those who may not read the content of a gated repository."""
        if not repository.gated or self.may_read(repository):
            return
        restricted = f"Access to {repository.kind} {repository.name} is restricted"
        if not self.access:
            self.refuse(
                401,
                f"{restricted}. You must have access to it and be authenticated to access it. "
                "Please log in.",
                code="GatedRepo",
            )
        self.refuse(
            403,
            f"{restricted} and you are not in the authorized list. Visit {self.hub.endpoint}/"
            f"{repository.name} to ask for access.",
            code="GatedRepo",
        )

    def check_revision(self, repository: Repository, revision: str) -> None:
        if revision not in ("main", repository.commit):
            self.refuse(404, f"Invalid rev id: {revision}", code="RevisionNotFound")

    def api(
        self, repository: Repository, what: str | None, revision: str | None, path: str | None,
        **_: str,
    ) -> None:  # fmt: skip
        self.check_revision(repository, revision or "main")
        if what == "auth-check":
            self.pass_gate(repository)
            self.answer(200, b"OK", {"Content-Type": "text/plain"})
        if what == "refs":
            main = {"name": "main", "ref": "refs/heads/main", "targetCommit": repository.commit}
            self.json({"branches": [main], "converts": [], "tags": []})
        if what == "tree":
            entries = repository.tree(path or "", self.query.get("recursive") in ("true", "True"))
            if path and not entries:
                self.refuse(404, f"{path} does not exist on {revision}", code="EntryNotFound")
            self.json(entries)
        if what == "paths-info":
            listing = {it["path"]: it for it in repository.tree("", True)}
            asked = parse_qs(self.body.decode()).get("paths", [])
            if self.headers.get("Content-Type", "").startswith("application/json"):
                asked = json.loads(self.body)["paths"]
            self.json([listing[it] for it in asked if it in listing])
        identity = {f"{repository.kind}Id": repository.name} if repository.kind == "model" else {}
        self.json(
            identity
            | {
                "_id": "0123456789abcdef01234567",
                "id": repository.name,
                "author": repository.name.partition("/")[0],
                "sha": repository.commit,
                "lastModified": STAMP,
                "createdAt": STAMP,
                "private": repository.private,
                "gated": "auto" if repository.gated else False,
                "disabled": False,
                "downloads": 0,
                "likes": 0,
                "tags": [],
                "siblings": [{"rfilename": path} for path in sorted(repository.files)],
            }
        )

    def resolve(self, repository: Repository, revision: str, path: str) -> None:
        self.pass_gate(repository)
        self.check_revision(repository, revision)
        if self.command == "GET":
            user = self.access.user if self.access else None
            self.hub.reads.append((user, f"{repository.name}/{path}"))
        headers = {"X-Repo-Commit": repository.commit}
        data = repository.files.get(path)
        if data is None:
            self.refuse(404, "Entry not found", headers, code="EntryNotFound")
        if len(data) < LARGE:
            name = path.rpartition("/")[2]
            disposition = f"inline; filename*=UTF-8''{name}; filename=\"{name}\";"
            headers |= {"ETag": f'"{git_id(data)}"', "Content-Disposition": disposition}
            self.file(data, headers)
        headers |= {
            "Location": self.hub.link(sha256(data)),
            "X-Linked-Etag": f'"{sha256(data)}"',
            "X-Linked-Size": str(len(data)),
        }
        self.answer(302, b"Found. Redirecting", headers)
