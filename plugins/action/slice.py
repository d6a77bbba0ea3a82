"""Create or delete a TPU slice on the controller, and wait until it is ready or gone.

The slice's present state is read first, and only what is missing is done: a second run changes
nothing.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from ansible.parsing.yaml.dumper import AnsibleDumper
from ansible.plugins.action import ActionBase

from ..filter.progress import clock
from ..plugin_utils.cloud_tpu import (
    MAX_MINUTES,
    CloudTpu,
    CloudTpuError,
    Slice,
    from_environment,
    is_expired,
    shape,
    symptoms,
    usage,
)
from ..plugin_utils.screen import show

FAILED = {"PREEMPTED", "TERMINATED", "FAILED", "SUSPENDING", "SUSPENDED"}
STOPPED = {"STOPPING", "STOPPED", "HIDING", "HIDDEN"}
QUIET_SECONDS = 60
# The slices of one name, and their queued resource if they have one
Found = tuple[list[Slice], dict[str, Any] | None]


def phase(slices: list[Slice], request: Mapping[str, Any] | None) -> str:
    """Return the state of all slices together.

    One of absent, creating, ready, stopped, failed and deleting.
    """
    states = {slice_["state"] for slice_ in slices} | ({request["state"]} if request else set())
    if not states:
        return "absent"
    if "DELETING" in states:
        return "deleting"
    if states & FAILED:
        return "failed"
    if states & STOPPED:
        return "stopped"
    whole = slices and all(slice_["workers"] for slice_ in slices)
    return "ready" if whole and states <= {"READY", "ACTIVE"} else "creating"


def status_text(slices: list[Slice], request: Mapping[str, Any] | None) -> str:
    """Return the state, the health and each worker's symptoms, in the API's words."""
    parts = [f"queued resource {request['state']} {request['error']}".strip()] if request else []
    for slice_ in slices:
        state = f"{slice_['name']} {slice_['state']} {slice_['health_description']}"
        parts += [state.strip(), *symptoms(slice_)]
    return ", ".join(parts) or "not listed by the API yet"


def differences(slices: list[Slice], wanted: Mapping[str, Any]) -> list[str]:
    """Return each way in which existing slices differ from ``wanted`` that no update can change.

    Empty values of ``wanted`` match everything.
    """
    found = []
    for slice_ in slices:
        names = ["accelerator_type", "topology", "runtime_version", "network", "subnetwork"]
        names += ["service_account", "data_disks"]
        # For a queued resource, spot and reserved are set on the request, not on its slices.
        names += [] if slice_["request"] else ["spot", "reserved"]
        for name in names:
            value, existing = wanted[name], slice_[name]
            if value and short_names(value) != short_names(existing):
                found.append(
                    f"{name} of {slice_['name']} is {existing or 'not set'}, wanted is {value}"
                )
    count = wanted["count"]
    if count and count != len(slices):
        found.append(f"slices is {len(slices)}, wanted is {count}")
    return found


def short_names(value: Any) -> Any:
    """Return ``value`` with resource paths cut to their names, and lists sorted.

    A resource may be given by its name or by its path; both then compare as equal.
    """
    if isinstance(value, list):
        return sorted(map(short_names, value))
    return value.rpartition("/")[2] if isinstance(value, str) else value


def changes(
    slice_: Mapping[str, Any], wanted: Mapping[str, Any], ssh_key: str
) -> dict[str, dict[str, str]]:
    """Return the labels and the metadata that a slice should have, each only if it differs.

    ``ssh_key`` is a line of ``ssh_key_line``, empty for none.
    """
    metadata = slice_["metadata"] | wanted["metadata"]
    keys = metadata.get("ssh-keys", "").splitlines()
    # With OS Login, a virtual machine ignores the keys in its metadata.
    if ssh_key and ssh_key not in keys and metadata.get("enable-oslogin", "").upper() != "TRUE":
        metadata["ssh-keys"] = "\n".join([*keys, ssh_key])
    desired = {"labels": slice_["labels"] | wanted["labels"], "metadata": metadata}
    return {name: value for name, value in desired.items() if value != slice_[name]}


def ssh_key_line(user: str, path: str, required: bool) -> str:
    """Return the line of metadata that allows ``user`` to log in with the public key in ``path``.

    It is empty where the file is missing and not ``required``. Raises CloudTpuError for a required
    file that cannot be read, and for a key without a user.
    """
    file = Path(path).expanduser()
    try:
        key = file.read_text(encoding="utf-8").strip()
    except OSError as error:
        if required:
            raise CloudTpuError(
                f"ssh_public_key_file is {path}: {error.strerror}. Give the path of an SSH public "
                "key, or leave the variable out"
            ) from error
        return ""
    if not user:
        raise CloudTpuError(
            f"no user is given for the SSH public key {path}. Name the user that logs in to the "
            "workers: export TPU_USER=…"
        )
    return f"{user}:{key}"


def forget_host_keys(path: Path, deleted: list[Slice]) -> None:
    """Remove the SSH host keys of deleted slices' workers from the known-hosts file ``path``."""
    if not path.exists() or not deleted:
        return
    aliases = "|".join(
        rf"{re.escape(slice_['name'])}-w\d+\.{re.escape(slice_['zone'])}"
        rf"\.{re.escape(slice_['project'])}\."
        for slice_ in deleted
    )
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if not re.match(aliases, line)]
    path.write_text("".join(kept), encoding="utf-8")


def workers_and_usage(slices: list[Slice]) -> str:
    """Return the number of workers, and the slices' age and chip-hours, as a user reads them."""
    return f"{sum(len(slice_['workers']) for slice_ in slices)} workers, {usage(slices)}"


def diff_text(slices: list[Mapping[str, Any]]) -> str:
    """Return slices as YAML for a diff, without their metadata, which may hold personal keys."""
    keys = ("name", "accelerator_type", "topology", "runtime_version", "spot", "count", "labels")
    rows = [{key: slice_[key] for key in keys if slice_.get(key)} for slice_ in slices]
    return yaml.dump(rows, Dumper=AnsibleDumper, sort_keys=False) if rows else ""


class SliceLifecycle:
    """Creates and deletes what has one name: a slice, or a queued resource of one or more slices.

    ``args`` are the task's arguments. With ``check`` nothing is changed. Both public methods return
    the task's result, and raise CloudTpuError.
    """

    def __init__(self, cloud: CloudTpu, name: str, args: Mapping[str, Any], check: bool) -> None:
        self.cloud, self.name, self.args, self.check = cloud, name, args, check
        self.known_hosts = Path(args["known_hosts"])
        self._started = time.monotonic()
        self._last_progress, self._last_progress_seconds = "", 0.0

    def present(self, wanted: dict[str, Any]) -> dict[str, Any]:
        """Create the slice unless it exists, and wait until its state is READY."""
        found = slices, _ = self.cloud.find(self.name)
        state, ssh_key = phase(*found), wanted.pop("ssh_key")
        if state == "stopped":
            raise CloudTpuError(
                f"{self.name} is stopped ({status_text(*found)}). Start it: "
                f"gcloud compute tpus tpu-vm start {self.name}; or delete it: "
                "ansible-playbook slice.yml -e state=absent"
            )
        if state in ("ready", "creating"):
            different = differences(slices, wanted) if slices else []
            if different:
                raise CloudTpuError(
                    f"{self.name} exists and cannot be changed in place: {'; '.join(different)}. "
                    "Nothing was changed. Delete the slice first: "
                    "ansible-playbook slice.yml -e state=absent"
                )
            if self.check:
                updates = [changes(slice_, wanted, ssh_key) for slice_ in slices]
                text = f"{self.name}: {status_text(*found)}"
                return self._result(any(updates), slices, slices, text)
            slices = slices if state == "ready" else self._wait_ready(None)
            return self._update(slices, wanted, ssh_key)
        if not wanted["accelerator_type"]:
            raise CloudTpuError(
                f"{self.name} does not exist, and no accelerator type is given to create it. Give "
                "one: -e accelerator_type=v5p-16 (optional: -e spot=true, -e max_hours=8)"
            )
        spec = wanted | {"count": wanted["count"] or 1, "queued": wanted["queued"]}
        spec["queued"] = spec["queued"] or spec["count"] > 1
        spec["runtime_version"] = wanted["runtime_version"] or wanted["default_runtime"]
        fresh = {"metadata": {}, "labels": {}}
        spec |= fresh | changes(fresh, wanted, ssh_key)
        if self.check:
            text = f"{self.name} would be created"
            return self._result(True, slices, [spec | {"name": self.name}], text)
        if state != "absent":
            self._show_progress(f"{status_text(*found)}: deleting it before it is created again")
            self._delete(found)
        operation = self.cloud.create(self.name, spec)
        created = self._wait_ready(operation)
        text = f"{self.name} is READY: {workers_and_usage(created)}"
        return self._result(True, slices, created, text)

    def absent(self) -> dict[str, Any]:
        """Delete the slice, and wait until the API does not list it any more."""
        found = slices, request = self.cloud.find(self.name)
        if phase(*found) == "absent":
            return self._result(False, [], [], f"{self.name} does not exist")
        owner = next((slice_["request"] for slice_ in slices if slice_["request"]), "")
        if not request and owner:
            # A slice of a queued resource can only be deleted together with the queued resource.
            found = slices, request = self.cloud.find(owner)
            if len(slices) > 1:
                raise CloudTpuError(
                    f"{self.name} is one of the {len(slices)} slices of the queued resource "
                    f"{owner}, and cannot be deleted without the others. Delete all of them: "
                    f"export TPU_NAME={owner}"
                )
            self.name = owner
        text = f"{self.name} is deleted: {workers_and_usage(slices)}"
        if self.check:
            text = f"{self.name} would be deleted: {workers_and_usage(slices)}"
        else:
            self._delete(found)
        return self._result(True, slices, [], text)

    def _update(self, slices: list[Slice], wanted: dict[str, Any], ssh_key: str) -> dict[str, Any]:
        after = []
        for slice_ in slices:
            change = changes(slice_, wanted, ssh_key)
            if change:
                self.cloud.update(slice_["name"], change)
            after.append(slice_ | change)
        text = f"{self.name} is READY: {workers_and_usage(slices)}"
        return self._result(after != slices, slices, after, text)

    def _delete(self, found: Found) -> None:
        slices, request = found
        accepted = phase(*found) == "deleting"

        def deleted() -> bool:
            nonlocal accepted
            if not accepted:
                first = slices[0]["name"] if slices else None
                accepted = self.cloud.delete(first, request and request["name"])
            remaining = self.cloud.find(self.name)
            self._show_progress(status_text(*remaining) if any(remaining) else "deleted")
            return not any(remaining)

        self._wait(deleted, "deleted", lambda: "Run the same command again to go on waiting")
        forget_host_keys(self.known_hosts, slices)

    def _wait_ready(self, operation: Any) -> list[Slice]:
        found: Found = ([], None)

        def ready() -> bool:
            nonlocal found
            reason = operation and self.cloud.failure(operation)
            if reason:
                raise CloudTpuError(reason)
            found = self.cloud.find(self.name)
            self._show_progress(status_text(*found))
            state = phase(*found)
            if state in ("failed", "deleting", "stopped"):
                raise CloudTpuError(
                    f"{self.name} did not become READY: {status_text(*found)}. Run the same "
                    "command again: it deletes the slice and creates it anew"
                )
            return state == "ready"

        self._wait(
            ready,
            "READY",
            lambda: (
                f"{status_text(*found)}. The request stays. Run the same command again to go on "
                "waiting, with -e slice_timeout_minutes=600 to wait longer, or withdraw the "
                "request: -e state=absent"
            ),
        )
        return found[0]

    def _wait(self, condition: Callable[[], bool], goal: str, hint: Callable[[], str]) -> None:
        """Poll until ``condition`` holds; raise CloudTpuError with ``hint`` when time is up."""
        end = time.monotonic() + self.args["timeout_minutes"] * 60
        while not condition():
            if time.monotonic() > end:
                raise CloudTpuError(
                    f"{self.name} is not {goal} after {self.args['timeout_minutes']:g} minutes: "
                    f"{hint()}"
                )
            time.sleep(self.args["poll_seconds"])

    def _show_progress(self, text: str) -> None:
        """Display a text that has changed at once, and one that has not every QUIET_SECONDS."""
        seconds = time.monotonic() - self._started
        quiet = seconds - self._last_progress_seconds
        if text != self._last_progress or quiet > QUIET_SECONDS:
            self._last_progress, self._last_progress_seconds = text, seconds
            show(f"{self.name}  {clock(seconds)}  {text}")

    def _result(
        self, changed: bool, before: list[Slice], after: list[Slice], text: str
    ) -> dict[str, Any]:
        diff = {"before": diff_text(before), "after": diff_text(after)}
        return {"changed": changed, "msg": text, "diff": diff}


class ActionModule(ActionBase):
    """The action ``slice``; its documentation is in plugins/modules."""

    _requires_connection = False
    _supports_check_mode = True

    def run(
        self, tmp: str | None = None, task_vars: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Create or delete the slice; fail with the cause and the next step in one line."""
        super().run(tmp, task_vars)
        _, args = self.validate_argument_spec(
            {
                "state": {"type": "str", "default": ""},
                "expired": {"type": "bool", "default": False},
                "name": {"type": "str", "default": ""},
                "project": {"type": "str", "required": True},
                "zone": {"type": "str", "required": True},
                "accelerator_type": {"type": "str", "default": ""},
                "topology": {"type": "str", "default": ""},
                "runtime_version": {"type": "str", "default": ""},
                "spot": {"type": "bool", "default": False},
                "reserved": {"type": "bool", "default": False},
                "queued": {"type": "bool", "default": False},
                "count": {"type": "int", "default": 0},
                "max_hours": {"type": "float", "default": 0},
                "network": {"type": "str", "default": ""},
                "subnetwork": {"type": "str", "default": ""},
                "external_ips": {"type": "bool", "default": True},
                "labels": {"type": "dict", "default": {}},
                "metadata": {"type": "dict", "default": {}},
                "service_account": {"type": "str", "default": ""},
                "data_disks": {"type": "list", "elements": "str", "default": []},
                "ssh_user": {"type": "str", "default": ""},
                "ssh_public_key_file": {"type": "path", "default": ""},
                "timeout_minutes": {"type": "float", "default": 60},
                "poll_seconds": {"type": "float", "default": 10},
                "known_hosts": {"type": "path", "default": "~/.ssh/mixtral_tpu_known_hosts"},
            }
        )
        check = self._task.check_mode
        try:
            for name, variable in (("project", "PROJECT"), ("zone", "ZONE"), ("name", "TPU_NAME")):
                if not args[name] and not (name == "name" and args["expired"]):
                    raise CloudTpuError(f"no {name} is given: export {variable}=…")
            wanted = self._wanted(args) if args["state"] == "present" else {}
            cloud = CloudTpu(args["project"], args["zone"], from_environment())
            if args["expired"]:
                return self._expired(cloud, args, check)
            if args["state"] not in ("present", "absent"):
                raise CloudTpuError(
                    f"state is {args['state']!r}: -e state=present creates the slice, -e "
                    "state=absent deletes it, and -e expired=true deletes every slice that is "
                    "older than its max_hours"
                )
            lifecycle = SliceLifecycle(cloud, args["name"], args, check)
            return lifecycle.present(wanted) if wanted else lifecycle.absent()
        except CloudTpuError as error:
            return {"failed": True, "msg": str(error)}

    def _wanted(self, args: Mapping[str, Any]) -> dict[str, Any]:
        """Return the slice that the task describes, in the API's terms; empty where it is silent.

        Raises CloudTpuError for arguments that contradict each other.
        """
        if args["spot"] and args["reserved"]:
            raise CloudTpuError("spot and reserved are both true: set at most one of them")
        wanted = dict(args)
        wanted["labels"] = {key: str(value) for key, value in args["labels"].items()}
        wanted["metadata"] = {key: str(value) for key, value in args["metadata"].items()}
        if args["max_hours"]:
            wanted["labels"][MAX_MINUTES] = str(round(args["max_hours"] * 60))
        path = args["ssh_public_key_file"]
        default = "~/.ssh/google_compute_engine.pub"
        wanted["ssh_key"] = ssh_key_line(args["ssh_user"], path or default, required=bool(path))
        wanted |= {"api_type": "", "default_runtime": ""}
        if args["accelerator_type"]:
            of_shape = shape(args["accelerator_type"], args["topology"])
            wanted["default_runtime"] = of_shape.pop("runtime_version")
            wanted |= of_shape
        elif args["topology"]:
            raise CloudTpuError(
                "topology is given without a chip. Give the chip, too: -e accelerator_type=v5p"
            )
        return wanted

    def _expired(self, cloud: CloudTpu, args: Mapping[str, Any], check: bool) -> dict[str, Any]:
        """Delete every slice of the zone that is older than its max_hours."""
        expired = filter(is_expired, cloud.slices())
        names = dict.fromkeys(slice_["request"] or slice_["name"] for slice_ in expired)
        results, errors = [], []
        # A slice that cannot be deleted must not keep the others from being deleted.
        for name in names:
            try:
                results.append(SliceLifecycle(cloud, name, args, check).absent())
            except CloudTpuError as error:
                errors.append(str(error))
        diff = {
            side: "".join(result["diff"][side] for result in results)
            for side in ("before", "after")
        }
        texts = [result["msg"] for result in results] + errors
        text = "; ".join(texts) or "no slice is older than its max_hours"
        return {"changed": bool(results), "failed": bool(errors), "msg": text, "diff": diff}
