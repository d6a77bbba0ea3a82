"""The Cloud TPU API on 127.0.0.1, which the real client talks to, and which can have a bad day.

    with TpuApi() as api:
        api.add("my-tpu", "v5p-16")
        api.faults.append(Fault("GET .*/nodes", 429, message="Quota exceeded"))
        CloudTpu(PROJECT, ZONE, {"auth_kind": "anonymous", "api_endpoint": api.endpoint})

It speaks API version 2 as JSON over HTTP, with pages, operations that take their time, and the
errors in Google's words. What ``seconds`` have passed is looked at whenever something is asked.
``requests`` is what it was asked.
"""

from __future__ import annotations

import itertools
import json
import re
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from tests.servers.service import Handler, Service

PROJECT, ZONE = "my-project", "us-east5-a"
# Name of the type → topology and number of hosts
TYPES = {
    "v4-8": ("2x2x1", 1),
    "v5litepod-4": ("2x2", 1),
    "v5litepod-16": ("4x4", 4),
    "v5p-8": ("2x2x1", 1),
    "v5p-16": ("2x2x2", 2),
    "v5p-128": ("4x4x4", 16),
    "v5p-512": ("4x8x8", 64),
    "v6e-4": ("2x2", 1),
}
CHIPS = {"V4": "v4", "V5LITE_POD": "v5litepod", "V5P": "v5p", "V6E": "v6e"}
VERSIONS = {"tpu-ubuntu2204-base", "v2-alpha-tpuv5", "v2-alpha-tpuv5-lite", "v2-alpha-tpuv6e"}
STATUS = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    409: "ALREADY_EXISTS",
    429: "RESOURCE_EXHAUSTED",
    500: "INTERNAL",
    503: "UNAVAILABLE",
}
PATH = re.compile(
    r"/v2/projects/(?P<project>[^/]+)/locations/(?P<zone>[^/]+)/"
    r"(?P<kind>nodes|queuedResources|operations)(?:/(?P<name>[^/:]+))?(?::(?P<verb>\w+))?"
)
Json = dict[str, Any]
# The client asks for the numbers of enumerations in place of their names.
NUMBERS = {
    "nodes": {
        "state": {
            "CREATING": 1, "READY": 2, "RESTARTING": 3, "REIMAGING": 4, "DELETING": 5,
            "REPAIRING": 6, "STOPPED": 8, "STOPPING": 9, "STARTING": 10,
            "PREEMPTED": 11, "TERMINATED": 12,
        },
        "health": {
            "HEALTHY": 1, "TIMEOUT": 3, "UNHEALTHY_TENSORFLOW": 4, "UNHEALTHY_MAINTENANCE": 5,
        },
        "type": {"V4": 7, "V5LITE_POD": 9, "V5P": 10, "V6E": 11},
        "symptomType": {
            "LOW_MEMORY": 1, "OUT_OF_MEMORY": 2, "EXECUTE_TIMED_OUT": 3, "MESH_BUILD_FAIL": 4,
            "HBM_OUT_OF_MEMORY": 5, "PROJECT_ABUSE": 6,
        },
    },
    "queuedResources": {
        "state": {
            "CREATING": 1, "ACCEPTED": 2, "PROVISIONING": 3, "FAILED": 4, "DELETING": 5,
            "ACTIVE": 6, "SUSPENDING": 7, "SUSPENDED": 8, "WAITING_FOR_RESOURCES": 9,
        },
    },
}  # fmt: skip


class _Refused(Exception):
    def __init__(self, status: int, message: str, reason: str = "") -> None:
        self.status, self.message, self.reason = status, message, reason


class TpuApi(Service):
    """The API: the projects and zones it knows, what is there, and what it was asked."""

    def __init__(self) -> None:
        super().__init__(_Handler)
        self.projects, self.zones = {PROJECT}, {ZONE, "us-central1-a"}
        self.nodes: dict[str, Json] = {}
        self.resources: dict[str, Json] = {}
        self.operations: dict[str, Json] = {}
        self.tokens: set[str] | None = None  # None: it asks nobody for one
        self.page = 500
        self.latency = 0.0
        self.seconds = 0.0  # how long creating and deleting take
        self.refusal: tuple[int, str] | None = None  # code and message that creating ends with
        self.addresses: Callable[[str, int], tuple[str, str]] = self._addresses
        self._numbers = itertools.count(1)
        (self.endpoint,) = self.origins

    def add(
        self, name: str, accelerator_type: str = "v5p-16", *, zone: str = ZONE,
        hours: float = 0, request: str = "", **more: Any,
    ) -> Json:  # fmt: skip
        """Add a slice that is there since ``hours``; ``more`` are fields of its JSON."""
        path = f"projects/{PROJECT}/locations/{zone}/nodes/{name}"
        node = self._node(path, {"acceleratorType": accelerator_type}, request)
        node |= {"state": "READY", "health": "HEALTHY", "createTime": stamp(-hours)}
        self._give_addresses(node)
        self.nodes[path] = node | more
        if request:
            where = f"projects/{PROJECT}/locations/{zone}/queuedResources/{request}"
            self.resources.setdefault(where, {"name": where, "state": {"state": "ACTIVE"}})
        return self.nodes[path]

    def node(self, name: str, zone: str = ZONE) -> Json | None:
        """Return a slice as it is now."""
        with self._lock:
            self._pass_time()
            return self.nodes.get(f"projects/{PROJECT}/locations/{zone}/nodes/{name}")

    # What the handler asks for

    def answer(self, method: str, path: str, query: Json, body: Json, token: str) -> Json:
        """Return what a request is answered; raises _Refused."""
        time.sleep(self.latency)
        with self._lock:
            self._pass_time()
            found = PATH.fullmatch(path)
            if not found:
                raise _Refused(404, "The requested URL was not found on this server.")
            self._admit(found, token)
            name, kind = path.removeprefix("/v2/").partition(":")[0], found["kind"]
            store = getattr(
                self, {"queuedResources": "resources"}.get(found["kind"], found["kind"])
            )
            if method == "GET" and not found["name"]:
                return self._list(kind, name, store, query)
            if method == "POST" and not found["name"]:
                create = self._create_node if kind == "nodes" else self._create_resource
                return create(name, query, body)
            if name not in store:
                raise _Refused(404, f"Resource '{name}' was not found")
            if method == "GET":
                return store[name]
            if method == "DELETE":
                return self._delete(name, query)
            if found["verb"] == "getGuestAttributes":
                return self._guest_attributes(name)
            return self._patch(name, query, body)

    def _admit(self, found: re.Match, token: str) -> None:
        if self.tokens is not None and token not in self.tokens:
            raise _Refused(401, "Request had invalid authentication credentials.")
        project, zone = found["project"], found["zone"]
        if project not in self.projects:
            raise _Refused(403, f"Permission denied on resource project {project}.")
        if zone not in self.zones | {"-"}:
            raise _Refused(
                403, f"Location {zone} is not found or access is unauthorized.", "PERMISSION_DENIED"
            )

    def _list(self, kind: str, name: str, store: dict[str, Json], query: Json) -> Json:
        pattern = re.escape(name).replace(r"locations/\-/", "locations/[^/]+/") + "/"
        names = sorted(it for it in store if re.match(pattern, it))
        start = int(query.get("pageToken") or 0)
        end = start + min(int(query.get("pageSize") or self.page), self.page)
        answer: Json = {kind: [store[it] for it in names[start:end]]} if names else {}
        return answer | ({"nextPageToken": str(end)} if end < len(names) else {})

    def _create_node(self, parent: str, query: Json, body: Json) -> Json:
        path = f"{parent}/{query['nodeId']}"
        if path in self.nodes:
            raise _Refused(409, f"Resource '{path}' already exists")
        node = self._node(path, body, "")
        self.nodes[path] = node | {"state": "CREATING", "due": time.monotonic() + self.seconds}
        return self._operation(path, "create")

    def _create_resource(self, parent: str, query: Json, body: Json) -> Json:
        path = f"{parent}/{query['queuedResourceId']}"
        if path in self.resources:
            raise _Refused(409, f"Resource '{path}' already exists")
        (spec,) = body["tpu"]["nodeSpec"]
        several = spec.get("multisliceParams")
        names = (
            [f"{several['nodeIdPrefix']}-{number}" for number in range(int(several["nodeCount"]))]
            if several
            else [spec["nodeId"]]
        )
        where = parent.replace("queuedResources", "nodes")
        nodes = {
            f"{where}/{it}": self._node(f"{where}/{it}", spec["node"], path.rpartition("/")[2])
            for it in names
        }
        due = time.monotonic() + self.seconds
        self.resources[path] = body | {
            "name": path, "state": {"state": "WAITING_FOR_RESOURCES"}, "due": due, "nodes": nodes,
        }  # fmt: skip
        return self._operation(path, "create", 0)

    def _node(self, path: str, body: Json, request: str) -> Json:
        kind, config = body.get("acceleratorType"), body.get("acceleratorConfig")
        if config:
            families = {number: name for name, number in NUMBERS["nodes"]["type"].items()}
            family = families.get(config["type"], config["type"])
            fits = [
                name
                for name, (topology, _) in TYPES.items()
                if topology == config["topology"]
                and name.startswith(CHIPS.get(family, "none") + "-")
            ]
            if not fits:
                raise _Refused(400, f"Invalid accelerator config: {config['topology']}")
            kind = fits[0]
        if kind not in TYPES:
            raise _Refused(400, f'Accelerator type "{kind}" is not found in this location.')
        if body.get("runtimeVersion", "v2-alpha-tpuv5") not in VERSIONS:
            raise _Refused(400, f"Runtime version {body['runtimeVersion']!r} is unknown.")
        family = next(name for name, chip in CHIPS.items() if kind.startswith(f"{chip}-"))
        project = path.split("/")[1]
        node = body | {
            "name": path,
            "id": str(1_000_000_000_000 + next(self._numbers)),
            "acceleratorType": kind,
            "acceleratorConfig": {"type": family, "topology": TYPES[kind][0]},
            "createTime": stamp(),
            "apiVersion": "V2",
        }
        node.setdefault("runtimeVersion", "v2-alpha-tpuv5")
        # What is false is left out of a message.
        asked = body.get("networkConfig", {"enableExternalIps": True})
        network = f"projects/{project}/global/networks/default"
        node["networkConfig"] = {"network": network, "enableExternalIps": False} | asked
        if request:
            node["queuedResource"] = f"{path.rpartition('/nodes/')[0]}/queuedResources/{request}"
            node["multisliceNode"] = not path.endswith(f"/{request}")
        return node

    def _give_addresses(self, node: Json) -> None:
        name = node["name"].rpartition("/")[2]
        node["networkEndpoints"] = []
        for worker in range(TYPES[node["acceleratorType"]][1]):
            internal, external = self.addresses(name, worker)
            endpoint = {"ipAddress": internal, "port": 8470}
            if external:
                endpoint["accessConfig"] = {"externalIp": external}
            node["networkEndpoints"].append(endpoint)

    def _addresses(self, name: str, worker: int) -> tuple[str, str]:
        number = next(self._numbers)
        return f"10.0.{number // 250}.{number % 250}", f"203.0.113.{number % 250}"

    def _patch(self, path: str, query: Json, body: Json) -> Json:
        for field in query["updateMask"].split(","):
            if field not in ("labels", "metadata", "tags", "description", "dataDisks"):
                raise _Refused(400, f"Field {field} cannot be updated.")
            self.nodes[path][field] = body[field]
        return self._operation(path, "update", 0)

    def _delete(self, path: str, query: Json) -> Json:
        gone = time.monotonic() + self.seconds
        if path in self.nodes:
            if self.nodes[path]["state"] == "CREATING":
                raise _Refused(400, "The TPU is being created.", "FAILED_PRECONDITION")
            if self.nodes[path].get("queuedResource"):
                raise _Refused(400, "The TPU belongs to a queued resource.", "FAILED_PRECONDITION")
            self.nodes[path] |= {"state": "DELETING", "due": gone}
        else:
            owned = [it for it in self.nodes.values() if it.get("queuedResource") == path]
            if owned and query.get("force") != "true":
                raise _Refused(400, "The queued resource has nodes.", "FAILED_PRECONDITION")
            for node in owned:
                node |= {"state": "DELETING", "due": gone}
            self.resources[path] |= {"state": {"state": "DELETING"}, "due": gone}
        return self._operation(path, "delete")

    def _guest_attributes(self, path: str) -> Json:
        machines = [
            {"namespace": "hostkeys", "key": "hostname", "value": f"t1v-n-0a1b2c3d-w-{worker}"}
            for worker in range(len(self.nodes[path]["networkEndpoints"]))
        ]
        return {"guestAttributes": [{"queryValue": {"items": [machine]}} for machine in machines]}

    def _operation(self, target: str, verb: str, seconds: float | None = None) -> Json:
        number = f"operation-{next(self._numbers)}-5f0a"
        name = f"{'/'.join(target.split('/')[:4])}/operations/{number}"
        self.operations[name] = {
            "name": name,
            "metadata": {
                "@type": "type.googleapis.com/google.cloud.common.OperationMetadata",
                "createTime": stamp(),
                "target": target,
                "verb": verb,
                "cancelRequested": False,
                "apiVersion": "v2",
            },
            "done": False,
            "due": time.monotonic() + (self.seconds if seconds is None else seconds),
        }
        return self.operations[name]

    def _pass_time(self) -> None:
        """Let happen what is due."""
        now = time.monotonic()
        for path, resource in list(self.resources.items()):
            if "due" in resource and resource["due"] <= now:
                del resource["due"]
                if resource["state"]["state"] == "DELETING":
                    del self.resources[path]
                elif self.refusal:
                    error = {"code": self.refusal[0], "message": self.refusal[1]}
                    resource["state"] = {"state": "FAILED", "failedData": {"error": error}}
                else:
                    resource["state"] = {"state": "ACTIVE"}
                    for name, node in resource["nodes"].items():
                        self.nodes[name] = node | {"state": "CREATING", "due": now}
        for path, node in list(self.nodes.items()):
            if "due" in node and node["due"] <= now:
                del node["due"]
                if node["state"] == "DELETING" or self.refusal:
                    del self.nodes[path]
                else:
                    node |= {"state": "READY", "health": "HEALTHY"}
                    self._give_addresses(node)
        for operation in self.operations.values():
            if not operation["done"] and operation["due"] <= now:
                operation["done"] = True
                made = operation["metadata"]
                if self.refusal and made["verb"] == "create" and "/nodes/" in made["target"]:
                    operation["error"] = {"code": self.refusal[0], "message": self.refusal[1]}
                else:
                    operation["response"] = self._response(**operation["metadata"])

    def _response(self, verb: str, target: str, **_: object) -> Json:
        """Return what an operation that went well has made."""
        if verb == "delete":
            return {"@type": "type.googleapis.com/google.protobuf.Empty"}
        kind = "Node" if "/nodes/" in target else "QueuedResource"
        made = self.nodes.get(target) or {"name": target}
        return {"@type": f"type.googleapis.com/google.cloud.tpu.v2.{kind}"} | made


class _Handler(Handler):
    """HTTP and JSON, and the errors as Google words them."""

    timeout = 30

    def route(self) -> None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        body = json.loads(self.body) if self.body else {}
        try:
            answer = self.server.service.answer(
                self.command, self.url.path, self.query, body, token
            )
        except _Refused as refused:
            self.refuse(refused.status, refused.message, reason=refused.reason)
        kind = "nodes" if "/nodes" in self.path else "queuedResources"
        self.json(_public(answer, NUMBERS[kind]))

    def refuse(
        self, status: int, message: str, headers: dict[str, str] | None = None, reason: str = ""
    ) -> None:
        """Send an error as Google words it."""
        error = {"code": status, "message": message, "status": reason or STATUS[status]}
        self.json({"error": error}, status, headers)


def _public(value: Any, numbers: Json, key: str = "") -> Any:
    """Return a value as it is sent: without what the server keeps for itself."""
    if isinstance(value, dict):
        hidden = ("due", "nodes") if "state" in value else ("due",)
        return {
            name: _public(it, numbers, name) for name, it in value.items() if name not in hidden
        }
    if isinstance(value, list):
        return [_public(it, numbers, key) for it in value]
    return numbers.get(key, {}).get(value, value) if isinstance(value, str) else value


def stamp(hours: float = 0) -> str:
    """Return the time in so many hours, as the API writes it."""
    moment = datetime.now(UTC) + timedelta(hours=hours)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%f000Z")
