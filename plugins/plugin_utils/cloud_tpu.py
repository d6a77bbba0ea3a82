"""The Cloud TPU API: list, create, update and delete TPU slices, and explain what failed.

Only this module uses Google's client library, on its REST transport. It returns plain data, which
an inventory cache can store, and raises CloudTpuError, whose message is meant for a user. Another
provider of TPU slices is another class with the methods of CloudTpu.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

import google.auth
import requests.exceptions
from google.api_core import exceptions
from google.api_core.operation import Operation
from google.api_core.retry import Retry
from google.auth import compute_engine
from google.auth import exceptions as auth_exceptions
from google.auth.credentials import AnonymousCredentials
from google.cloud import tpu_v2
from google.cloud.tpu_v2.services.tpu.transports.rest import TpuRestTransport
from google.oauth2 import credentials as oauth2
from google.oauth2 import service_account
from google.protobuf import descriptor_pb2, descriptor_pool
from google.protobuf.json_format import MessageToDict, ParseError

from ...trainer.tpu import CHIP_NAMES, parse_accelerator_type
from .cloud_chips import CLOUD_CHIPS

SCOPE = "https://www.googleapis.com/auth/cloud-platform"
ENDPOINT = "https://tpu.googleapis.com"
CALL_SECONDS = 30
RETRY_SECONDS = 20
# Errors that a second attempt may get past, when it reads or deletes. Creation is not repeated:
# there, 429 means that quota or capacity is missing.
TRANSIENT = (
    exceptions.InternalServerError,
    exceptions.BadGateway,
    exceptions.ServiceUnavailable,
    exceptions.GatewayTimeout,
    exceptions.TooManyRequests,
    requests.exceptions.ConnectionError,
    requests.exceptions.Timeout,
)
# The label that holds max_hours, in minutes: a label cannot hold a decimal point.
MAX_MINUTES = "max-minutes"

# The options of a connection, named as in the collection google.cloud, and their environment
# variables
ENVIRONMENT = {
    "auth_kind": "GCP_AUTH_KIND",
    "service_account_file": "GCP_SERVICE_ACCOUNT_FILE",
    "service_account_contents": "GCP_SERVICE_ACCOUNT_CONTENTS",
    "service_account_email": "GCP_SERVICE_ACCOUNT_EMAIL",
    "access_token": "GCP_ACCESS_TOKEN",
    "scopes": "GCP_SCOPES",
    "api_endpoint": "TPU_API_ENDPOINT",
}

Slice = dict[str, Any]


def register_operation_metadata() -> None:
    """Register the message type of the API's operations with protobuf.

    The API returns google.cloud.common.OperationMetadata. Google's client knows the same message
    only as google.cloud.tpu.v2.OperationMetadata, and its REST transport refuses unknown types.
    """
    known = tpu_v2.OperationMetadata.pb(tpu_v2.OperationMetadata()).DESCRIPTOR
    file = descriptor_pb2.FileDescriptorProto(
        name="google/cloud/common/operation_metadata.proto",
        package="google.cloud.common",
        syntax="proto3",
        dependency=["google/protobuf/timestamp.proto"],
    )
    known.CopyToProto(file.message_type.add())
    descriptor_pool.Default().Add(file)


register_operation_metadata()


class CloudTpuError(Exception):
    """A request failed or was not possible; the message is one line with the next step."""


def from_environment() -> dict[str, Any]:
    """Return the options of ENVIRONMENT from their environment variables, None where unset."""
    found = {name: os.environ.get(variable) for name, variable in ENVIRONMENT.items()}
    return found | {"scopes": (found["scopes"] or "").split(",") if found["scopes"] else None}


def age_hours(slice_: Slice, now: datetime | None = None) -> float:
    """Return the age of a slice in hours; ``now`` is the present time by default."""
    if not slice_["created"]:
        return 0.0
    created = datetime.fromisoformat(slice_["created"])
    return max(0.0, ((now or datetime.now(UTC)) - created).total_seconds() / 3600)


def is_expired(slice_: Slice, now: datetime | None = None) -> bool:
    """Return whether a slice is older than the ``max_hours`` that it was created with."""
    minutes = slice_["labels"].get(MAX_MINUTES, "")
    return minutes.isdecimal() and age_hours(slice_, now) * 60 > int(minutes)


def usage(slices: list[Slice]) -> str:
    """Return the age of the oldest slice in hours and the chip-hours of all, as displayed text."""
    hours = max(map(age_hours, slices), default=0.0)
    chip_hours = sum(age_hours(slice_) * slice_["chips"] for slice_ in slices)
    return f"{hours:.1f} hours old, {chip_hours:.1f} chip-hours"


def symptoms(slice_: Slice) -> list[str]:
    """Return the symptoms that the API reports of a slice, each with its worker."""
    return [f"worker {symptom['worker']} {symptom_text(symptom)}" for symptom in slice_["symptoms"]]


def symptom_text(symptom: Mapping[str, str]) -> str:
    """Return a symptom's type and details."""
    return f"{symptom['type']} {symptom['details']}".strip()


def shape(accelerator_type: str, topology: str) -> dict[str, str]:
    """Return what the API needs to create a slice of an accelerator type and a topology.

    That is ``accelerator_type``, ``topology``, ``api_type`` and ``runtime_version``. Of the two
    arguments the topology may be empty, or the accelerator type a chip alone, such as v5p. Raises
    CloudTpuError for an unknown accelerator type, for a chip that the API does not serve, and for a
    topology that does not match the accelerator type.
    """
    sides = topology.split("x") if topology else []
    if not all(side.isdecimal() and int(side) for side in sides):
        raise CloudTpuError(
            f"topology is {topology!r}: numbers of chips joined by x are allowed, such as 4x4x8"
        )
    topology_chips = math.prod(map(int, sides))
    try:
        if sides and (alone := CHIP_NAMES.get(accelerator_type)):
            accelerator_type = alone.accelerator_type(topology_chips)
        chip, chips, _ = parse_accelerator_type(accelerator_type)
    except ValueError as error:
        raise CloudTpuError(f"{error}") from error
    names = CLOUD_CHIPS[chip.name]
    if not names.api_type:
        served = ", ".join(name for name, other in CLOUD_CHIPS.items() if other.api_type)
        raise CloudTpuError(
            f"the Cloud TPU API does not serve {chip.name}; choose one of the chips that it "
            f"serves: {served}"
        )
    if sides and (topology_chips != chips or len(sides) != chip.dimensions):
        raise CloudTpuError(
            f"topology {topology} does not match {accelerator_type}, which has {chips} chips in "
            f"{chip.dimensions} dimensions. Give the accelerator type alone, or the topology with "
            f"the chip alone ({chip.name})"
        )
    number = accelerator_type.rpartition("-")[2]
    return {
        "accelerator_type": f"{chip.cloud_name}-{number}",
        "topology": topology,
        "api_type": names.api_type,
        "runtime_version": names.runtime_version,
    }


class CloudTpu:
    """The slices of one project and zone in the Cloud TPU API.

    ``options`` has the keys of ENVIRONMENT. ``zone`` may be ``-``, all zones, for reading. Every
    method raises CloudTpuError if the API refuses a request, does not answer, or gets no
    credentials.
    """

    def __init__(self, project: str, zone: str, options: Mapping[str, Any]) -> None:
        self.project, self.zone = project, zone
        self._parent = f"projects/{project}/locations/{zone}"
        self._endpoint = options.get("api_endpoint") or ENDPOINT
        with self._explained("log in"):
            transport = TpuRestTransport(
                host=self._endpoint, credentials=credentials(options, self._endpoint)
            )
        self._client = tpu_v2.TpuClient(transport=transport)

    def slices(self) -> list[Slice]:
        """Return all slices, with one request for each page."""
        with self._explained("list the slices"):
            pages = self._client.list_nodes(
                parent=self._parent, retry=self._retry(), timeout=CALL_SECONDS
            )
            return [to_slice(node) for node in pages]

    def request(self, name: str) -> dict[str, Any] | None:
        """Return a queued resource with its state and error; None if it does not exist."""
        with self._explained("look for the queued resource"):
            try:
                found = self._client.get_queued_resource(
                    name=f"{self._parent}/queuedResources/{name}",
                    retry=self._retry(),
                    timeout=CALL_SECONDS,
                )
            except exceptions.NotFound:
                return None
        data = MessageToDict(tpu_v2.QueuedResource.pb(found))
        state = data.get("state", {})
        return {
            "name": name,
            "state": state.get("state", "STATE_UNSPECIFIED"),
            "error": state.get("failedData", {}).get("error", {}).get("message", ""),
        }

    def find(self, name: str) -> tuple[list[Slice], dict[str, Any] | None]:
        """Return the slices with this name, or of the queued resource with this name, and the
        queued resource, None if it does not exist.
        """
        slices = [slice_ for slice_ in self.slices() if name in (slice_["name"], slice_["request"])]
        return slices, self.request(name)

    def instances(self, slice_: Slice) -> list[str]:
        """Return the names of a slice's virtual machines, by which the Identity-Aware Proxy finds
        them, in worker order.
        """
        with self._explained(f"ask for the machines of {slice_['name']}"):
            answer = self._client.get_guest_attributes(
                {"name": self._path(slice_["name"])}, timeout=CALL_SECONDS
            )
        machines = [
            {item.key: item.value for item in attributes.query_value.items}
            for attributes in answer.guest_attributes
        ]
        return [machine.get("hostname", "") for machine in machines]

    def create(self, name: str, spec: Mapping[str, Any]) -> Operation:
        """Request a slice, or several as one queued resource; see ``to_node`` for ``spec``.

        Returns the API's operation, which ``failure`` takes.
        """
        node = to_node(spec, self.project, self.zone)
        with self._explained(f"create {name}"):
            if not spec["queued"]:
                return self._client.create_node(
                    parent=self._parent, node_id=name, node=node, timeout=CALL_SECONDS
                )
            part: dict[str, Any] = {"parent": self._parent, "node": node}
            if spec["count"] > 1:
                part["multislice_params"] = {"node_count": spec["count"], "node_id_prefix": name}
            else:
                part["node_id"] = name
            resource: dict[str, Any] = {"tpu": {"node_spec": [part]}}
            if spec["spot"]:
                # In a queued resource, spot belongs to the resource and not to its node.
                node.scheduling_config = None
                resource["spot"] = {}
            elif spec["reserved"]:
                resource["guaranteed"] = {}
            return self._client.create_queued_resource(
                parent=self._parent,
                queued_resource_id=name,
                queued_resource=resource,
                timeout=CALL_SECONDS,
            )

    def failure(self, operation: Operation) -> str | None:
        """Return why an operation has failed; None while it is running and after success."""
        with self._explained("read the state of the operation"):
            try:
                done = operation.done(retry=self._retry())
            except ParseError:
                # Only the response to a success may hold a type that the client does not know.
                return None
            error = operation.exception(timeout=CALL_SECONDS) if done else None
        return self._reason("create the slice", error) if error else None

    def update(self, name: str, changes: Mapping[str, Any]) -> None:
        """Replace the labels or the metadata of a slice by those in ``changes``."""
        with self._explained(f"change {name}"):
            self._client.update_node(
                node={"name": self._path(name), **changes},
                update_mask={"paths": list(changes)},
                timeout=CALL_SECONDS,
            )

    def delete(self, slice_: str | None, request: str | None) -> bool:
        """Request the deletion of a queued resource with its slices, or else of a slice.

        Returns False if the API refuses for now, as it does during creation.
        """
        with self._explained(f"delete {request or slice_}"):
            try:
                if request:
                    self._client.delete_queued_resource(
                        {"name": f"{self._parent}/queuedResources/{request}", "force": True},
                        retry=self._retry(),
                        timeout=CALL_SECONDS,
                    )
                else:
                    self._client.delete_node(
                        name=self._path(slice_), retry=self._retry(), timeout=CALL_SECONDS
                    )
            except exceptions.NotFound:
                pass
            except exceptions.GoogleAPICallError as error:
                answer = getattr(error.response, "text", "")
                if error.code != 409 and "FAILED_PRECONDITION" not in answer:
                    raise
                return False
        return True

    def _path(self, name: str) -> str:
        return f"{self._parent}/nodes/{name}"

    def _retry(self) -> Retry:
        return Retry(
            lambda error: isinstance(error, TRANSIENT),
            initial=0.3,
            maximum=5,
            timeout=RETRY_SECONDS,
        )

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        try:
            yield
        except (
            exceptions.GoogleAPIError,
            auth_exceptions.GoogleAuthError,
            requests.exceptions.RequestException,
        ) as error:
            raise CloudTpuError(self._reason(what, error)) from error

    def _reason(self, what: str, error: Exception) -> str:
        """Return the cause of ``error`` and the next step in one line; ``what`` is what failed."""
        if isinstance(error, exceptions.RetryError) and error.cause:
            error = error.cause
        if isinstance(error, requests.exceptions.RequestException):
            # requests wraps the operating system's message in several layers.
            cause = re.search(r"\[Errno -?\d+\] ([^'\")]+)", str(error))
            message = (
                f"no answer from {self._endpoint}: {cause[1] if cause else type(error).__name__}"
            )
        elif isinstance(error, auth_exceptions.RefreshError):
            # A token was refused; the client only reports that it cannot make another one.
            message = f"the credentials were refused: {error.args[0] if error.args else error}"
        else:
            message = getattr(error, "message", None) or str(error)
        # Google's client puts the request before the API's message.
        message = re.sub(r"^[A-Z]+ https?://\S+ ", "", " ".join(message.split())).rstrip(". ")
        code = f" ({int(error.code)})" if getattr(error, "code", None) else ""
        where = f"project {self.project}, zone {self.zone}"
        return f"Cannot {what} ({where}): {message[:500]}{code}. {self._next_step(error, message)}"

    def _next_step(self, error: Exception, message: str) -> str:
        project, zone = self.project, self.zone
        code = int(getattr(error, "code", 0) or 0)
        if isinstance(error, auth_exceptions.DefaultCredentialsError):
            return (
                "Log in: gcloud auth application-default login. Or name a service account's file: "
                "GCP_AUTH_KIND=serviceaccount GCP_SERVICE_ACCOUNT_FILE=…"
            )
        if isinstance(error, auth_exceptions.GoogleAuthError) or code == 401:
            return (
                "The credentials may have expired. Log in again: gcloud auth application-default "
                "login; or set a new GCP_ACCESS_TOKEN"
            )
        if isinstance(error, requests.exceptions.RequestException) or code >= 500:
            return (
                f"Check that this machine reaches {self._endpoint} (network, proxy, "
                "TPU_API_ENDPOINT), and try again in a minute"
            )
        if code == 403 and re.search(r"disabled|has not been used", message):
            return (
                "Enable the Cloud TPU API: "
                f"gcloud services enable tpu.googleapis.com --project {project}"
            )
        if re.search(r"\b[Ll]ocation \S+ is not", message):
            return (
                f"Check that {zone} is a zone with TPUs. List these zones: "
                f"gcloud compute tpus locations list --project {project}"
            )
        if code == 403:
            return (
                f"Check that {project} is the project's id, not its title. The account that logs "
                "in needs roles/tpu.viewer there to list slices, and roles/tpu.admin to create them"
            )
        if code == 409:
            return "The name is in use. Choose another one: export TPU_NAME=…"
        if code == 429 and "capacity" in message:
            return (
                "Try again later or in another zone, or request a queued resource: -e queued=true"
            )
        if code == 429:
            return (
                "Check the quota, and request an increase: "
                f"https://console.cloud.google.com/iam-admin/quotas?project={project}"
            )
        if "ccelerator" in message:
            return (
                "List the zone's accelerator types: gcloud compute tpus accelerator-types list "
                f"--zone {zone} --project {project}"
            )
        if "untime" in message:
            return (
                "List the zone's runtime versions: gcloud compute tpus versions list "
                f"--zone {zone} --project {project}"
            )
        return "Check the project, the zone and the arguments"


def credentials(options: Mapping[str, Any], endpoint: str) -> google.auth.credentials.Credentials:
    """Return the credentials that ``options`` describes, as documented in the inventory gcp_tpu.

    Raises CloudTpuError for options that do not fit together or cannot be read.
    """
    kind, scopes = options.get("auth_kind") or "application", options.get("scopes") or [SCOPE]
    address = urlsplit(endpoint)
    loopback = address.hostname in ("127.0.0.1", "::1", "localhost")
    if address.scheme != "https" and not (address.scheme == "http" and loopback):
        raise CloudTpuError(
            f"api_endpoint is {endpoint!r}: allowed is an https:// address, or http:// with this "
            f"machine's 127.0.0.1. The address of Google's API is {ENDPOINT}"
        )
    if kind == "anonymous":
        if address.scheme != "http":
            raise CloudTpuError(
                f"auth_kind is anonymous, and api_endpoint is {endpoint}: anonymous is allowed "
                "with an http:// endpoint on this machine only. Use application, serviceaccount, "
                "machineaccount or accesstoken"
            )
        return AnonymousCredentials()
    if kind == "application":
        return google.auth.default(scopes=scopes)[0]
    if kind == "accesstoken":
        token = options.get("access_token")
        if not token:
            raise CloudTpuError(
                "auth_kind is accesstoken, and no token is given: export GCP_ACCESS_TOKEN=…"
            )
        return oauth2.Credentials(token)
    if kind == "machineaccount":
        email = options.get("service_account_email") or "default"
        return compute_engine.Credentials(service_account_email=email)
    if kind != "serviceaccount":
        raise CloudTpuError(
            f"auth_kind is {kind!r}: allowed are application, serviceaccount, machineaccount, "
            "accesstoken and anonymous. Correct GCP_AUTH_KIND"
        )
    path, contents = options.get("service_account_file"), options.get("service_account_contents")
    if not path and not contents:
        raise CloudTpuError(
            "auth_kind is serviceaccount, and no key is given: export GCP_SERVICE_ACCOUNT_FILE=…"
        )
    try:
        if path:
            return service_account.Credentials.from_service_account_file(
                os.path.expanduser(path), scopes=scopes
            )
        info = json.loads(contents) if isinstance(contents, str) else dict(contents)
        return service_account.Credentials.from_service_account_info(info, scopes=scopes)
    except (OSError, ValueError) as error:
        # The message of a ValueError may quote the key, which is a secret.
        detail = (
            error.strerror
            if isinstance(error, OSError)
            else "this is not the key of a service account"
        )
        raise CloudTpuError(
            f"{path or 'service_account_contents'}: {detail}. "
            "Create a key: gcloud iam service-accounts keys create"
        ) from None


def to_slice(node: tpu_v2.Node) -> Slice:
    """Return the API's description of a slice as plain data."""
    data = MessageToDict(tpu_v2.Node.pb(node))
    _, project, _, zone, _, name = data["name"].split("/")
    topology = data.get("acceleratorConfig", {}).get("topology", "")
    network = data.get("networkConfig", {})
    scheduling = data.get("schedulingConfig", {})
    return {
        "name": name,
        "project": project,
        "zone": zone,
        "id": data.get("id", "0"),
        "state": data.get("state", "STATE_UNSPECIFIED"),
        "health": data.get("health", "HEALTH_UNSPECIFIED"),
        "health_description": data.get("healthDescription", ""),
        "accelerator_type": data.get("acceleratorType", ""),
        "topology": topology,
        "chips": math.prod(map(int, topology.split("x"))) if topology else 0,
        "runtime_version": data.get("runtimeVersion", ""),
        "created": data.get("createTime", ""),
        "spot": scheduling.get("spot", False) or scheduling.get("preemptible", False),
        "reserved": scheduling.get("reserved", False),
        "network": network.get("network", ""),
        "subnetwork": network.get("subnetwork", ""),
        "service_account": data.get("serviceAccount", {}).get("email", ""),
        "data_disks": [disk["sourceDisk"] for disk in data.get("dataDisks", [])],
        "labels": data.get("labels", {}),
        "metadata": data.get("metadata", {}),
        "request": data.get("queuedResource", "").rpartition("/")[2],
        "workers": [
            {
                "internal": endpoint.get("ipAddress", ""),
                "external": endpoint.get("accessConfig", {}).get("externalIp", ""),
            }
            for endpoint in data.get("networkEndpoints", [])
        ],
        "symptoms": [
            {
                "worker": symptom.get("workerId", ""),
                "type": symptom.get("symptomType", ""),
                "details": symptom.get("details", ""),
                "time": symptom.get("createTime", ""),
            }
            for symptom in data.get("symptoms", [])
        ],
    }


def to_node(spec: Mapping[str, Any], project: str, zone: str) -> tpu_v2.Node:
    """Return the API's description of a slice to create.

    ``spec`` has the keys of ``to_slice`` that can be chosen, and ``api_type``, which the API needs
    with a topology. The API chooses what is empty.
    """
    disks = f"projects/{project}/zones/{zone}/disks"
    node: dict[str, Any] = {
        "runtime_version": spec["runtime_version"],
        "labels": spec["labels"],
        "metadata": spec["metadata"],
        "scheduling_config": {"spot": spec["spot"], "reserved": spec["reserved"]},
        "network_config": {
            "network": spec["network"],
            "subnetwork": spec["subnetwork"],
            "enable_external_ips": spec["external_ips"],
        },
        "data_disks": [
            {"source_disk": disk if "/" in disk else f"{disks}/{disk}"}
            for disk in spec["data_disks"]
        ],
    }
    if spec["topology"]:
        node["accelerator_config"] = {"type_": spec["api_type"], "topology": spec["topology"]}
    else:
        node["accelerator_type"] = spec["accelerator_type"]
    if spec["service_account"]:
        node["service_account"] = {"email": spec["service_account"], "scope": [SCOPE]}
    return tpu_v2.Node(node)
