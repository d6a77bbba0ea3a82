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

import contextlib
import json
import re
import secrets
import threading
import zlib
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

ACCOUNT = "trainer@my-project.iam.gserviceaccount.com"
OBJECTS = re.compile(r"(?P<upload>/upload)?/storage/v1/b/(?P<bucket>[^/]+)/o(?:/(?P<name>[^/]+))?")
IDENTITY = "/computeMetadata/v1/instance/service-accounts/"
REASONS = {400: "invalid", 401: "authError", 403: "forbidden", 404: "notFound", 503: "backendError"}
PERMISSIONS = {"GET": "get", "POST": "create", "DELETE": "delete"}


@dataclass
class Fault:
    """What goes wrong with the next ``times`` requests (method and path) that match ``where``.

    Without a status there is no answer.
    """

    where: str
    status: int | None = None
    times: int = 1


class CloudStorage:
    """The storage: its buckets, with their objects by name, and what it was asked."""

    def __init__(self) -> None:
        self.buckets: dict[str, dict[str, bytes]] = {}
        self.denied: set[str] = set()  # list, get, create or delete
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.page = 1000
        self.token = secrets.token_hex(16)
        self.stuck = threading.Event()  # a request is there that gets no answer
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), type("H", (_Handler,), {"storage": self}))
        self._host = f"127.0.0.1:{self._server.server_address[1]}"
        # Where the client looks for the storage, and for a Google machine's metadata server
        self.environment = {
            "TENSORSTORE_GCS_HTTP_URL": f"http://{self._host}",
            "GCE_METADATA_ROOT": self._host,
        }

    def __enter__(self) -> CloudStorage:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def fault(self, request: str) -> Fault | None:
        """Take note of a request, and return what is to go wrong with it."""
        with self._lock:
            self.requests.append(request)
            for fault in self.faults:
                if fault.times and re.search(fault.where, request):
                    fault.times -= 1
                    return fault
        return None


def generation(data: bytes) -> str:
    """Return the number of an object's version; here the same content has the same one."""
    return str(1 + zlib.crc32(data))


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        # A client that leaves early is no news.
        pass


class _Answered(Exception):
    """The answer has been given."""


class _Handler(BaseHTTPRequestHandler):
    storage: CloudStorage
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or an answer's body waits 40 ms for its head to be received

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        self.query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        with contextlib.suppress(_Answered):
            if url.path.startswith(IDENTITY):
                self.identity(url.path.removeprefix(IDENTITY))
            found = OBJECTS.fullmatch(url.path)
            if not found:
                self.refuse(404, "Not Found")
            name = unquote(found["name"] or "") or self.query.get("name", "")
            self.objects(found["bucket"], name, bool(found["upload"]))

    def do_POST(self) -> None:
        self.do_GET()

    def do_DELETE(self) -> None:
        self.do_GET()

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
        length = int(self.headers.get("Content-Length", 0))
        fault = self.storage.fault(
            f"{self.command} {bucket}/{name} {self.headers.get('Range', '')}".strip()
        )
        if fault and fault.status is None:
            self.storage.stuck.set()
            length += 1  # which comes never: the client leaves
        body = self.rfile.read(length)
        if len(body) < length:
            self.close_connection = True
            raise _Answered
        if fault:
            self.refuse(fault.status, "a bad day")
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
            objects[name] = body
            self.json(self.metadata(bucket, name))
        if not name and self.command == "GET":
            self.listing(bucket)
        if name not in objects:
            self.refuse(404, f"No such object: {bucket}/{name}")
        if self.command == "DELETE":
            del objects[name]
            self.answer(204, b"", {})
        if self.command == "GET" and self.query.get("alt") == "media":
            self.media(objects[name])
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

    def media(self, data: bytes) -> None:
        """Send an object, or the range of it that was asked for."""
        headers = {
            "Content-Type": "application/octet-stream",
            "X-Goog-Generation": generation(data),
        }
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not wanted:
            self.answer(200, data, headers)
        first, last = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
        if first > last:
            headers["Content-Range"] = f"bytes */{len(data)}"
            self.refuse(416, "The requested range cannot be satisfied.", headers)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        self.answer(206, data[first : last + 1], headers)

    def json(self, value: Any) -> None:
        body = json.dumps(value).encode()
        self.answer(200, body, {"Content-Type": "application/json; charset=UTF-8"})

    def refuse(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        """Send an error as Google words it."""
        reason = {"message": message, "domain": "global", "reason": REASONS.get(status, "invalid")}
        error = {"code": status, "message": message, "errors": [reason]}
        body = json.dumps({"error": error}).encode()
        self.answer(status, body, {"Content-Type": "application/json"} | (headers or {}))

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        """Send an answer, and say no more."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        raise _Answered

    def log_message(self, *_: object) -> None:
        pass
