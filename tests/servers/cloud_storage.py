"""Google Cloud Storage on 127.0.0.1, as tensorstore's client talks to it, and having a bad day.

    with CloudStorage() as storage:
        storage.buckets["my-bucket"] = {}
        storage.faults.append(Fault("POST .*/o", 503))
        subprocess.run([...], env=os.environ | storage.environment)

It speaks the JSON API: objects are listed in pages, read whole, in part or for their metadata,
written in one request and removed. What is not written to its end is not there. The metadata server
of a Google machine is here as well, and gives the token that everything else asks for. Standard
library only, because it runs where the trainer's image does. ``requests`` is what it was asked.
"""

from __future__ import annotations

import re
import secrets
import zlib
from typing import Any
from urllib.parse import quote, unquote

from tests.servers.faults import Fault
from tests.servers.service import Handler, Service

ACCOUNT = "trainer@my-project.iam.gserviceaccount.com"
OBJECTS = re.compile(r"(?P<upload>/upload)?/storage/v1/b/(?P<bucket>[^/]+)/o(?:/(?P<name>[^/]+))?")
IDENTITY = "/computeMetadata/v1/instance/service-accounts/"
REASONS = {400: "invalid", 401: "authError", 403: "forbidden", 404: "notFound", 503: "backendError"}
PERMISSIONS = {"GET": "get", "POST": "create", "DELETE": "delete"}


class CloudStorage(Service):
    """The storage: its buckets, with their objects by name, and what it was asked."""

    def __init__(self) -> None:
        super().__init__(_Handler)
        self.buckets: dict[str, dict[str, bytes]] = {}
        self.denied: set[str] = set()  # list, get, create or delete
        self.page = 1000
        self.token = secrets.token_hex(16)
        # Where the client looks for the storage, and for a Google machine's metadata server
        self.environment = {
            "TENSORSTORE_GCS_HTTP_URL": self.origins[0],
            "GCE_METADATA_ROOT": self.origins[0].removeprefix("http://"),
        }


def generation(data: bytes) -> str:
    """Return the number of an object's version; here the same content has the same one."""
    return str(1 + zlib.crc32(data))


class _Handler(Handler):
    timeout = None  # a client that gets no answer leaves when it likes

    @property
    def storage(self) -> CloudStorage:
        return self.server.service

    def next_fault(self) -> Fault | None:
        """Note the request by its object. What the metadata server is asked does not count."""
        self.found = OBJECTS.fullmatch(self.url.path)
        if not self.found:
            return None
        self.name = unquote(self.found["name"] or "") or self.query.get("name", "")
        wanted = self.headers.get("Range", "")
        return self.storage.fault(
            f"{self.command} {self.found['bucket']}/{self.name} {wanted}".strip()
        )

    def route(self) -> None:
        if self.asked_for.startswith(IDENTITY):
            self.identity(self.asked_for.removeprefix(IDENTITY))
        if not self.found:
            self.refuse(404, "Not Found")
        self.objects(self.found["bucket"], self.name, bool(self.found["upload"]))

    def identity(self, path: str) -> None:
        """Answer as the metadata server, which speaks only to those who know what it is."""
        if self.headers.get("Metadata-Flavor") != "Google":
            self.refuse(403, "Missing Metadata-Flavor:Google header.")
        if path == "default/":
            scopes = ["https://www.googleapis.com/auth/cloud-platform"]
            self.json({"email": ACCOUNT, "scopes": scopes, "aliases": ["default"]})
        if path in (f"{ACCOUNT}/token", "default/token"):
            token = {"access_token": self.storage.token, "expires_in": 3599, "token_type": "Bearer"}
            self.json(token)
        self.refuse(404, "Not Found")

    def objects(self, bucket: str, name: str, upload: bool) -> None:
        """Answer a request for the objects of a bucket, or for the one of that name."""
        if self.headers.get("Authorization") != f"Bearer {self.storage.token}":
            self.refuse(401, "Invalid Credentials")
        if bucket not in self.storage.buckets:
            self.refuse(404, "The specified bucket does not exist.")
        permission = PERMISSIONS[self.command] if name else "list"
        objects = self.storage.buckets[bucket]
        # Whoever writes where there is something removes it.
        needed = {permission, "delete"} if upload and name in objects else {permission}
        if name not in objects and not upload:
            needed |= {"list"}  # for what is not there is not told from what may not be seen
        for permission in needed & self.storage.denied:
            self.refuse(
                403,
                f"{ACCOUNT} does not have storage.objects.{permission} access to the Google Cloud "
                f"Storage object. Permission 'storage.objects.{permission}' denied on resource (or "
                "it may not exist).",
            )
        if upload and self.command == "POST" and self.query.get("uploadType") == "media" and name:
            objects[name] = self.body
            self.json(self.metadata(bucket, name))
        if not name and self.command == "GET":
            self.listing(bucket)
        if name not in objects:
            self.refuse(404, f"No such object: {bucket}/{name}")
        if self.command == "DELETE":
            del objects[name]
            self.answer(204, b"")
        if self.command == "GET" and self.query.get("alt") == "media":
            self.file(objects[name], {"X-Goog-Generation": generation(objects[name])})
        if self.command == "GET":
            self.json(self.metadata(bucket, name))
        self.refuse(400, "Invalid request")

    def listing(self, bucket: str) -> None:
        first = self.query.get("pageToken") or self.query.get("startOffset", "")
        last = self.query.get("endOffset")
        names = [
            name
            for name in sorted(self.storage.buckets[bucket])
            if name >= first
            and (not last or name < last)
            and name.startswith(self.query.get("prefix", ""))
        ]
        page = names[: self.storage.page]
        answer: dict[str, Any] = {"kind": "storage#objects"}
        if page:
            answer["items"] = [self.metadata(bucket, name) for name in page]
        if len(names) > len(page):
            answer["nextPageToken"] = quote(names[len(page)])
        self.json(answer)

    def metadata(self, bucket: str, name: str) -> dict[str, Any]:
        return {
            "kind": "storage#object",
            "bucket": bucket,
            "name": name,
            "size": str(len(self.storage.buckets[bucket][name])),
            "generation": generation(self.storage.buckets[bucket][name]),
            "metageneration": "1",
            "timeCreated": "2026-01-02T03:04:05.678Z",
            "updated": "2026-01-02T03:04:05.678Z",
        }

    def refuse(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        """Send an error as Google words it."""
        reason = {"message": message, "domain": "global", "reason": REASONS.get(status, "invalid")}
        error = {"code": status, "message": message, "errors": [reason]}
        self.json({"error": error}, status, headers)
