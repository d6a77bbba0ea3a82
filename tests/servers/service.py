"""What the servers of these tests have in common: HTTP on 127.0.0.1, TLS, faults and a record.

Standard library only, because some of them run where the trainer's image does.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import socketserver
import ssl
import threading
from http.server import BaseHTTPRequestHandler
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

from tests.servers.faults import Fault

IDLE_SECONDS = 10


class Service:
    """Servers on free ports of 127.0.0.1, one for each handler; ``requests`` is what they got."""

    def __init__(self, *handlers: type[Handler], tls: ssl.SSLContext | None = None) -> None:
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.stuck = threading.Event()  # a request is there that gets no answer
        self._lock = threading.RLock()
        self._servers = [_Server(self, handler, tls) for handler in handlers]
        self.ports = [server.server_address[1] for server in self._servers]
        scheme = "https" if tls else "http"
        self.origins = [f"{scheme}://127.0.0.1:{port}" for port in self.ports]

    def __enter__(self) -> Self:
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def asked(self, pattern: str) -> int:
        """Return how many requests there were that match ``pattern``, as in Fault."""
        return sum(bool(re.search(pattern, request)) for request in self.requests)

    def fault(self, request: str) -> Fault | None:
        """Take note of a request, and return what is to go wrong with it."""
        with self._lock:
            self.requests.append(request)
            for fault in self.faults:
                if fault.times and re.search(fault.where, request):
                    fault.times -= 1
                    return fault
        return None


class Answered(Exception):
    """The answer has been given."""


class Handler(BaseHTTPRequestHandler):
    """A request: ``route`` answers it, by one of the methods that send an answer and return never.

    It finds the address in ``url``, its unquoted path in ``asked_for``, the last value of every
    parameter in ``query``, and the body in ``body``.
    """

    server: _Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or an answer's body waits 40 ms for its head to be received
    timeout = IDLE_SECONDS

    def do_GET(self) -> None:
        self.url = urlsplit(self.path)
        self.query = {name: values[-1] for name, values in parse_qs(self.url.query).items()}
        self.asked_for = unquote(self.url.path)
        self.fault = self.next_fault()
        # An unread body would be taken for the next request.
        length = int(self.headers.get("Content-Length", 0))
        if self.fault and self.fault.status is None:
            self.server.service.stuck.set()
            length += 1  # which comes never: the client leaves
        self.body = self.rfile.read(length)
        if len(self.body) < length:
            self.close_connection = True
            return
        with contextlib.suppress(Answered):
            if self.fault and not self.fault.spoils_the_body:
                self.refuse(self.fault.status, self.fault.message, self.fault.headers)
            self.route()

    do_HEAD = do_POST = do_PATCH = do_DELETE = do_GET  # noqa: N815

    def next_fault(self) -> Fault | None:
        """Have the request noted, and return what is to go wrong with it."""
        wanted = self.headers.get("Range", "")
        return self.server.service.fault(f"{self.command} {self.asked_for} {wanted}".strip())

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        """Send an answer, and say no more."""
        self.send_response(status)
        length = {} if status == 204 else {"Content-Length": str(len(body))}
        for name, value in (length | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.fault and self.fault.spoils_the_body:
            body = self.fault.spoil(body)
            self.close_connection |= self.fault.after is not None
        if self.command != "HEAD":
            self.wfile.write(body)
        raise Answered

    def json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        """Answer in JSON."""
        kind = {"Content-Type": "application/json; charset=UTF-8"}
        self.answer(status, json.dumps(value).encode(), kind | (headers or {}))

    def refuse(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        """Answer with an error."""
        self.answer(status, message.encode(), headers)

    def file(self, data: bytes, headers: dict[str, str] | None = None) -> None:
        """Answer with a file, or with the range of it that was asked for."""
        headers = {"Content-Type": "application/octet-stream"} | (headers or {})
        headers["Accept-Ranges"] = "bytes"
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not wanted:
            self.answer(200, data, headers)
        first, last = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
        if first > last:
            headers["Content-Range"] = f"bytes */{len(data)}"
            self.refuse(416, "The requested range cannot be satisfied.", headers)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        self.answer(206, data[first : last + 1], headers)

    def log_message(self, *_: object) -> None:
        pass


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 32

    def __init__(
        self, service: Service, handler: type[Handler], tls: ssl.SSLContext | None
    ) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.service = service
        self.tls = tls

    def process_request_thread(self, request: socket.socket, client_address: Any) -> None:
        try:
            if self.tls:
                # Here, so that nobody waits for a client that does not shake hands.
                request.settimeout(IDLE_SECONDS)
                request = self.tls.wrap_socket(request, server_side=True)
            super().process_request_thread(request, client_address)
        except OSError:
            # A client that trusts another authority is no news.
            self.shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        # A client that leaves early is no news.
        pass
