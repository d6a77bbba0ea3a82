"""Make a TPU slice, or delete it, and wait for it: on the controller, through the provider's seam.

What is there is looked at first, and only what is missing is done, so a second run changes nothing.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from ansible.parsing.yaml.dumper import AnsibleDumper
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display

# See plugins/plugin_utils/__init__.py.
sys.path.append(str(Path(__file__).resolve().parents[2]))

from plugins.plugin_utils.cloud_tpu import (
    MAX_MINUTES,
    CloudTpu,
    CloudTpuError,
    Slice,
    age_hours,
    from_environment,
    is_expired,
    shape,
)

DEAD = {"PREEMPTED", "TERMINATED", "FAILED", "SUSPENDING", "SUSPENDED"}
STOPPED = {"STOPPING", "STOPPED", "HIDING", "HIDDEN"}
QUIET_SECONDS = 60

display = Display()
Found = tuple[list[Slice], dict[str, Any] | None]


def phase(slices: list[Slice], request: Mapping[str, Any] | None) -> str:
    """Return how far a slice is: absent, coming, ready, stopped, dead or leaving."""
    states = {it["state"] for it in slices} | ({request["state"]} if request else set())
    if not states:
        return "absent"
    if "DELETING" in states:
        return "leaving"
    if states & DEAD:
        return "dead"
    if states & STOPPED:
        return "stopped"
    whole = slices and all(it["workers"] for it in slices)
    return "ready" if whole and states <= {"READY", "ACTIVE"} else "coming"


def told(slices: list[Slice], request: Mapping[str, Any] | None) -> str:
    """Return what the API says: state, health and each worker's symptoms."""
    words = [f"queued resource {request['state']} {request['error']}".strip()] if request else []
    for it in slices:
        words.append(f"{it['name']} {it['state']} {it['health_description']}".strip())
        words += [
            f"worker {symptom['worker']}: {symptom['type']} {symptom['details']}".strip()
            for symptom in it["symptoms"]
        ]
    return ", ".join(words) or "not there yet"


def differences(slices: list[Slice], wanted: Mapping[str, Any]) -> list[str]:
    """Return in what a slice is not what was given, and cannot become it."""
    found = []
    for it in slices:
        names = ["accelerator_type", "topology", "runtime_version", "network", "subnetwork"]
        names += ["service_account", "data_disks"]
        # How a queued resource is paid for is not the node's to say.
        names += [] if it["request"] else ["spot", "reserved"]
        for name in names:
            wants, has = wanted[name], it[name]
            if wants and plain(wants) != plain(has):
                found.append(f"{name} of {it['name']} is {has or 'not set'}, wanted is {wants}")
    count = wanted["count"]
    if count and count != len(slices):
        found.append(f"slices is {len(slices)}, wanted is {count}")
    return found


def plain(value: Any) -> Any:
    """Return a value for a comparison: resources by their names, whether given so or by a path."""
    if isinstance(value, list):
        return sorted(map(plain, value))
    return value.rpartition("/")[2] if isinstance(value, str) else value


def changes(slice_: Slice, wanted: Mapping[str, Any], key_line: str) -> dict[str, dict[str, str]]:
    """Return the labels and metadata of a slice as they should be, where they are not."""
    metadata = slice_["metadata"] | wanted["metadata"]
    keys = metadata.get("ssh-keys", "").splitlines()
    # With OS Login the machine does not look at keys in the metadata.
    if key_line and key_line not in keys and metadata.get("enable-oslogin", "").upper() != "TRUE":
        metadata["ssh-keys"] = "\n".join([*keys, key_line])
    should = {"labels": slice_["labels"] | wanted["labels"], "metadata": metadata}
    return {name: value for name, value in should.items() if value != slice_[name]}


def key_line(user: str, path: str, required: bool) -> str:
    """Return the line of metadata that lets a user log in with a public key."""
    file = Path(path).expanduser()
    try:
        key = file.read_text(encoding="utf-8").strip()
    except OSError as error:
        if required:
            raise CloudTpuError(f"ssh_public_key_file {path}: {error.strerror}") from error
        return ""
    if not user:
        raise CloudTpuError(f"Which user logs in with {path}? export TPU_USER=…")
    return f"{user}:{key}"


def forget_host_keys(path: Path, gone: list[Slice]) -> None:
    """Remove the SSH host keys of slices from the project's known-hosts file."""
    if not path.exists() or not gone:
        return
    names = "|".join(
        rf"{re.escape(it['name'])}-w\d+\.{re.escape(it['zone'])}\.{re.escape(it['project'])}\."
        for it in gone
    )
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(it for it in lines if not re.match(names, it)), encoding="utf-8")


def bill(slices: list[Slice]) -> str:
    """Return how long slices have been there, and what that is in chip-hours."""
    hours = max(map(age_hours, slices), default=0.0)
    cost = sum(age_hours(it) * it["chips"] for it in slices)
    workers = sum(len(it["workers"]) for it in slices)
    return f"{workers} workers, {hours:.1f} hours old, {cost:.1f} chip-hours"


def shown(slices: list[Mapping[str, Any]]) -> str:
    """Return slices as a diff shows them; a key in the metadata is long, and a person's own."""
    keys = ("name", "accelerator_type", "topology", "runtime_version", "spot", "count", "labels")
    rows = [{key: it[key] for key in keys if it.get(key)} for it in slices]
    return yaml.dump(rows, Dumper=AnsibleDumper, sort_keys=False) if rows else ""


class SliceLifecycle:
    """The life of what one name means: a slice, or a queued resource of one or more slices."""

    def __init__(self, cloud: CloudTpu, name: str, args: Mapping[str, Any], check: bool) -> None:
        self.cloud, self.name, self.args, self.check = cloud, name, args, check
        self.known_hosts = Path(args["known_hosts"])
        self._started, self._said = time.monotonic(), ("", 0.0)

    def present(self, wanted: dict[str, Any]) -> dict[str, Any]:
        """Bring the slice to READY, making it where it is not."""
        found = slices, _ = self.cloud.find(self.name)
        now, line = phase(*found), wanted.pop("key_line")
        if now == "stopped":
            raise CloudTpuError(
                f"{self.name} is stopped ({told(*found)}). Start it (gcloud compute tpus tpu-vm "
                f"start {self.name}), or delete it: ansible-playbook slice.yml -e state=absent"
            )
        if now in ("ready", "coming"):
            other = differences(slices, wanted) if slices else []
            if other:
                raise CloudTpuError(
                    f"{self.name} is there, and cannot be changed in place: {'; '.join(other)}. "
                    "Nothing was changed. Delete it first: "
                    "ansible-playbook slice.yml -e state=absent"
                )
            if self.check:
                updates = [changes(it, wanted, line) for it in slices]
                return self._result(any(updates), slices, slices, f"{self.name}: {told(*found)}")
            slices = slices if now == "ready" else self._wait_ready(None)
            return self._update(slices, wanted, line)
        if not wanted["accelerator_type"]:
            raise CloudTpuError(
                f"{self.name} is not there, and which slice it should be is not said: "
                "-e accelerator_type=v5p-16 (and with it -e spot=true, -e max_hours=8)"
            )
        spec = wanted | {"count": wanted["count"] or 1, "queued": wanted["queued"]}
        spec["queued"] = spec["queued"] or spec["count"] > 1
        spec["runtime_version"] = wanted["runtime_version"] or wanted["default_runtime"]
        fresh = {"metadata": {}, "labels": {}}
        spec |= fresh | changes(fresh, wanted, line)
        if self.check:
            return self._result(True, slices, [spec | {"name": self.name}], "would make it")
        if now != "absent":
            self._say(f"{told(*found)}: it has to be gone before it can be made anew")
            self._delete(found)
        operation = self.cloud.create(self.name, spec)
        made = self._wait_ready(operation)
        return self._result(True, slices, made, f"{self.name} is READY: {bill(made)}")

    def absent(self) -> dict[str, Any]:
        """Delete the slice, and wait until it is gone."""
        found = slices, request = self.cloud.find(self.name)
        if phase(*found) == "absent":
            return self._result(False, [], [], f"{self.name} is not there")
        owner = next((it["request"] for it in slices if it["request"]), "")
        if not request and owner:
            # The node's name was given; only its queued resource can be deleted, and only whole.
            found = slices, request = self.cloud.find(owner)
            if len(slices) > 1:
                raise CloudTpuError(
                    f"{self.name} is one of {len(slices)} slices of queued resource {owner}, which "
                    f"can only be deleted whole: TPU_NAME={owner}"
                )
            self.name = owner
        text = f"{self.name} is deleted: {bill(slices)}"
        if not self.check:
            self._delete(found)
        return self._result(True, slices, [], text)

    def _update(self, slices: list[Slice], wanted: dict[str, Any], line: str) -> dict[str, Any]:
        after = []
        for it in slices:
            change = changes(it, wanted, line)
            if change:
                self.cloud.update(it["name"], change)
            after.append(it | change)
        text = f"{self.name} is READY: {bill(slices)}"
        return self._result(after != slices, slices, after, text)

    def _delete(self, found: Found) -> None:
        slices, request = found
        accepted = phase(*found) == "leaving"

        def gone() -> bool:
            nonlocal accepted
            if not accepted:
                first = slices[0]["name"] if slices else None
                accepted = self.cloud.delete(first, request and request["name"])
            rest = self.cloud.find(self.name)
            self._say(told(*rest) if any(rest) else "gone")
            return not any(rest)

        self._until(gone, "deleted", lambda: "the same command waits on")
        forget_host_keys(self.known_hosts, slices)

    def _wait_ready(self, operation: Any) -> list[Slice]:
        found: Found = ([], None)

        def ready() -> bool:
            nonlocal found
            reason = operation and self.cloud.failure(operation)
            if reason:
                raise CloudTpuError(reason)
            found = self.cloud.find(self.name)
            self._say(told(*found))
            now = phase(*found)
            if now in ("dead", "leaving", "stopped"):
                raise CloudTpuError(
                    f"{self.name} did not become READY: {told(*found)}. Try again: the same "
                    "command deletes what is left, and makes it anew"
                )
            return now == "ready"

        self._until(
            ready,
            "READY",
            lambda: (
                f"{told(*found)}. The same command waits on; -e state=absent gives it up, and "
                "-e slice_timeout_minutes=600 waits longer"
            ),
        )
        return found[0]

    def _until(self, condition: Callable[[], bool], what: str, hint: Callable[[], str]) -> None:
        end = time.monotonic() + self.args["timeout_minutes"] * 60
        while not condition():
            if time.monotonic() > end:
                raise CloudTpuError(
                    f"{self.name} is not {what} after {self.args['timeout_minutes']:g} minutes: "
                    f"{hint()}"
                )
            time.sleep(self.args["poll_seconds"])

    def _say(self, text: str) -> None:
        """Show how it goes: what is new at once, what is not every minute."""
        seconds = time.monotonic() - self._started
        if text != self._said[0] or seconds > self._said[1] + QUIET_SECONDS:
            self._said = (text, seconds)
            display.display(f"{self.name}  {int(seconds) // 60}:{int(seconds) % 60:02}  {text}")

    def _result(
        self, changed: bool, before: list[Slice], after: list[Slice], text: str
    ) -> dict[str, Any]:
        diff = {"before": shown(before), "after": shown(after)}
        return {"changed": changed, "msg": text, "diff": diff}


class ActionModule(ActionBase):
    """``slice``: see roles/slice/tasks/main.yml for its arguments."""

    _requires_connection = False
    _supports_check_mode = True
    _VALID_ARGS = frozenset(
        (
            "accelerator_type", "count", "data_disks", "expired", "external_ips", "known_hosts",
            "labels", "max_hours", "metadata", "name", "network", "poll_seconds", "project",
            "queued", "reserved", "runtime_version", "service_account", "spot",
            "ssh_public_key_file", "ssh_user", "state", "subnetwork", "timeout_minutes",
            "topology", "zone",
        )
    )  # fmt: skip

    def run(
        self, tmp: str | None = None, task_vars: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Make or delete the slice; fail with one line that says why not, and what to do."""
        super().run(tmp, task_vars)
        args, check = self._task.args, self._task.check_mode
        try:
            for name, variable in (("project", "PROJECT"), ("zone", "ZONE"), ("name", "TPU_NAME")):
                if not args[name] and not (name == "name" and args["expired"]):
                    raise CloudTpuError(f"Which {name}? export {variable}=…")
            wanted = self._wanted(args) if args["state"] == "present" else {}
            cloud = CloudTpu(args["project"], args["zone"], from_environment())
            if args["expired"]:
                return self._expired(cloud, args, check)
            if args["state"] not in ("present", "absent"):
                raise CloudTpuError(
                    "What is to be done? -e state=present makes the slice, -e state=absent deletes "
                    "it, -e expired=true deletes all that have outlived their max_hours"
                )
            life = SliceLifecycle(cloud, args["name"], args, check)
            return life.present(wanted) if wanted else life.absent()
        except CloudTpuError as problem:
            return {"failed": True, "msg": str(problem)}

    def _wanted(self, args: Mapping[str, Any]) -> dict[str, Any]:
        """Return what is wanted, in the provider's words; what is not given is empty."""
        if args["spot"] and args["reserved"]:
            raise CloudTpuError("spot and reserved are both on: a slice is one of them, or neither")
        wanted = {name: args[name] for name in self._VALID_ARGS if name in args}
        wanted["labels"] = {key: str(value) for key, value in args["labels"].items()}
        wanted["metadata"] = {key: str(value) for key, value in args["metadata"].items()}
        if args["max_hours"]:
            wanted["labels"][MAX_MINUTES] = str(round(args["max_hours"] * 60))
        path = args["ssh_public_key_file"]
        default = "~/.ssh/google_compute_engine.pub"
        wanted["key_line"] = key_line(args["ssh_user"], path or default, required=bool(path))
        wanted |= {"api_type": "", "default_runtime": ""}
        if args["accelerator_type"]:
            of_shape = shape(args["accelerator_type"], args["topology"])
            wanted["default_runtime"] = of_shape.pop("runtime_version")
            wanted |= of_shape
        elif args["topology"]:
            raise CloudTpuError("topology is given without its chip: -e accelerator_type=v5p")
        return wanted

    def _expired(self, cloud: CloudTpu, args: Mapping[str, Any], check: bool) -> dict[str, Any]:
        names = dict.fromkeys(
            it["request"] or it["name"] for it in cloud.slices() if is_expired(it)
        )
        results, problems = [], []
        # One that cannot be deleted must not let the others live.
        for name in names:
            try:
                results.append(SliceLifecycle(cloud, name, args, check).absent())
            except CloudTpuError as problem:
                problems.append(str(problem))
        diff = {
            side: "".join(result["diff"][side] for result in results)
            for side in ("before", "after")
        }
        said = [result["msg"] for result in results] + problems
        text = "; ".join(said) or "no slice has outlived its max_hours"
        return {"changed": bool(results), "failed": bool(problems), "msg": text, "diff": diff}
