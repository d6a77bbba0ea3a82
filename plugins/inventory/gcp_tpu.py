"""Ansible inventory of Cloud TPU slices: one host for each worker, in worker order."""

from __future__ import annotations

import contextlib
import fnmatch
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ansible import context
from ansible.errors import AnsibleError, AnsibleParserError
from ansible.inventory.group import to_safe_group_name
from ansible.plugins.inventory import BaseInventoryPlugin, Cacheable, Constructable
from ansible.utils.context_objects import GlobalCLIArgs
from ansible.utils.vars import load_extra_vars

from ..plugin_utils.requirements import unmet_requirements

DOCUMENTATION = r"""
name: gcp_tpu
short_description: Workers of Cloud TPU slices
description:
  - >-
    Reads slices from the Cloud TPU API (version 2). Each network endpoint of a slice is a host,
    C(<slice>-w<number>), in the group C(tpu_workers), in worker order. Each slice and each queued
    resource is a group, with every character that no group name may have replaced by an
    underscore. The group C(tpu_worker0) has the first worker of each slice.
  - >-
    Host variables are C(tpu_worker_id), C(tpu_slice_id), C(tpu_accelerator_type), C(tpu_topology),
    C(tpu_chips) (of the whole slice), C(tpu_state), C(tpu_health), C(tpu_health_description),
    C(tpu_symptoms) (of this worker), C(tpu_queued_resource), C(tpu_project), C(tpu_zone),
    C(tpu_labels), C(tpu_runtime_version), C(tpu_created), C(tpu_internal_ip), C(tpu_external_ip),
    C(tpu_host_key_alias), C(tpu_instance) (with O(iap)) and C(ansible_host).
  - >-
    C(ansible_host) is the external address, or the internal one of a worker without an external
    one. An address may later belong to another machine, so a worker's SSH host key is stored in
    C(tpu_known_hosts) under C(tpu_host_key_alias), which is unique to the worker.
  - A template in a name, label or description from the API is never evaluated.
  - >-
    Slices in another state than O(states) are left out, and a warning names them. An inventory
    without any slice is an error, except for a playbook with C(-e state=) or C(-e expired=), which
    creates or deletes slices. C(mixtral_state) and C(mixtral_expired) are the same.
  - >-
    An error ends Ansible's own programs at once, with exit code 1: no other plugin tries the file,
    and nothing goes on without hosts. A program that imports Ansible gets the exception.
author: mixtral-tpu contributors
requirements:
  - google-cloud-tpu
extends_documentation_fragment:
  - constructed
  - inventory_cache
options:
  plugin:
    description: Marks the file as one for this plugin.
    required: true
    choices: [mixtral.tpu.gcp_tpu]
  projects:
    description: IDs of the projects.
    type: list
    elements: str
    env:
      - name: PROJECT
      - name: GCP_PROJECT
  zones:
    description: Zones of the slices, V(-) for all.
    type: list
    elements: str
    env:
      - name: ZONE
      - name: GCP_ZONE
  names:
    description: >-
      Names of slices or queued resources, or patterns such as C(moe-*). By default all.
    type: list
    elements: str
    default: []
    env:
      - name: TPU_NAME
  filters:
    description: >-
      Jinja2 conditions on a host's variables. A host for which one of them is false is left out.
    type: list
    elements: str
    default: []
  states:
    description: >-
      States of the slices to include. C(TPU_STATES=READY,PREEMPTED) in the environment lets
      C(reset.yml) reach the remaining workers of a preempted slice.
    type: list
    elements: str
    default: [READY]
    env:
      - name: TPU_STATES
  known_hosts:
    description: >-
      The file for the workers' SSH host keys. Its directory is created.
    type: path
    default: ~/.ssh/mixtral_tpu_known_hosts
  iap:
    description: >-
      Ask the API for the names of virtual machines without an external address, for
      C(tpu_instance). The Identity-Aware Proxy needs these names.
    type: bool
    default: false
    env:
      - name: TPU_IAP
  auth_kind:
    description: >-
      How to log in. V(application) means application default credentials; V(anonymous) is for an
      O(api_endpoint) on this machine.
    type: str
    default: application
    choices: [accesstoken, anonymous, application, machineaccount, serviceaccount]
    env:
      - name: GCP_AUTH_KIND
  service_account_file:
    description: The JSON file of a service account's key, for V(serviceaccount).
    type: path
    env:
      - name: GCP_SERVICE_ACCOUNT_FILE
  service_account_contents:
    description: The contents of a service account's key, as text or dictionary.
    type: raw
    env:
      - name: GCP_SERVICE_ACCOUNT_CONTENTS
  service_account_email:
    description: The machine's service account, for V(machineaccount). By default the machine's own.
    type: str
    env:
      - name: GCP_SERVICE_ACCOUNT_EMAIL
  access_token:
    description: The token, for V(accesstoken).
    type: str
    env:
      - name: GCP_ACCESS_TOKEN
  scopes:
    description: Scopes of the credentials. By default the whole platform.
    type: list
    elements: str
    env:
      - name: GCP_SCOPES
  api_endpoint:
    description: >-
      The API's address, with C(https://). An address with C(http://) has to be on this machine.
    type: str
    default: https://tpu.googleapis.com
    env:
      - name: TPU_API_ENDPOINT
"""

EXAMPLES = r"""
# team.gcp_tpu.yml: all slices of a team, in two zones. The default of projects, zones and names is
# the environment's PROJECT, ZONE and TPU_NAME.
plugin: mixtral.tpu.gcp_tpu
projects: [my-project]
zones: [us-east5-a, europe-west4-b]
filters:
  - tpu_labels.team == 'moe'
keyed_groups:
  - key: tpu_accelerator_type
    prefix: type
strict: true
"""

# Extra variables of a playbook that creates or deletes slices
LIFECYCLE = {"state", "mixtral_state", "expired", "mixtral_expired"}
# Names that the group of a slice must not have
RESERVED = ("all", "ungrouped", "tpu_workers", "tpu_worker0")
AUTH = (
    "auth_kind",
    "service_account_file",
    "service_account_contents",
    "service_account_email",
    "access_token",
    "scopes",
    "api_endpoint",
)


def group_name(name: str) -> str:
    """Return the name of a slice's or queued resource's group, such as my_tpu for my-tpu."""
    safe = to_safe_group_name(name, force=True, silent=True)
    return f"slice_{safe}" if safe in RESERVED else safe


def host_variables(slice_: dict[str, Any], worker: int) -> dict[str, Any]:
    """Return the host variables of a worker, under the names of the documentation."""
    address = slice_["workers"][worker]
    variables = {
        "ansible_host": address["external"] or address["internal"],
        "tpu_worker_id": worker,
        "tpu_slice_id": slice_["name"],
        "tpu_external_ip": address["external"],
        "tpu_internal_ip": address["internal"],
        "tpu_queued_resource": slice_["request"],
        # A slice that is created anew has the same name and another id.
        "tpu_host_key_alias": (
            f"{slice_['name']}-w{worker}.{slice_['zone']}.{slice_['project']}.{slice_['id']}"
        ),
        "tpu_symptoms": [
            symptom for symptom in slice_["symptoms"] if symptom["worker"] in ("", str(worker))
        ],
    }
    same = (
        "accelerator_type", "topology", "chips", "state", "health", "health_description",
        "project", "zone", "labels", "runtime_version", "created",
    )  # fmt: skip
    variables |= {f"tpu_{key}": slice_[key] for key in same}
    if address.get("instance"):
        variables["tpu_instance"] = address["instance"]
    return variables


class InventoryModule(BaseInventoryPlugin, Constructable, Cacheable):
    """``plugin: mixtral.tpu.gcp_tpu`` in a file whose name ends in gcp_tpu.yml."""

    NAME = "mixtral.tpu.gcp_tpu"

    def verify_file(self, path: str) -> bool:
        """Return whether a file is one for this plugin."""
        return super().verify_file(path) and path.endswith(("gcp_tpu.yml", "gcp_tpu.yaml"))

    def parse(self, inventory: Any, loader: Any, path: str, cache: bool = True) -> None:
        """Read the slices from the cache or the API, and add their workers to the inventory.

        Raises AnsibleError; in Ansible's own programs displays it, and raises SystemExit.
        """
        super().parse(inventory, loader, path)
        try:
            self._read_config_data(path)
            for option, variable in (("projects", "PROJECT"), ("zones", "ZONE")):
                if not any(self.get_option(option) or []):
                    raise AnsibleParserError(
                        f"{path} gives no {option}: export {variable}=…, or set {option} in the "
                        "file"
                    )
            self._add(self._wanted(self._slices(path, cache), loader))
        except AnsibleError as error:
            # Only Ansible's own programs set this. After an exception they would try the file with
            # every other plugin, display what each of them says, and might go on without hosts.
            if not isinstance(context.CLIARGS, GlobalCLIArgs):
                raise
            self.display.error(error)
            sys.exit(1)

    def _slices(self, path: str, cache: bool) -> list[dict[str, Any]]:
        """Return all slices of all projects and zones, from the cache or the API."""
        places = [
            (project, zone)
            for project in self.get_option("projects")
            for zone in self.get_option("zones")
        ]
        # Projects, zones and iap may come from the environment, so the file alone is no key.
        iap = self.get_option("iap")
        names = "_".join("_".join(place) for place in places)
        key = f"{self.get_cache_key(path)}_{names}_{int(iap)}"
        use = self.get_option("cache") and cache
        if use:
            with contextlib.suppress(KeyError):
                return self._cache[key]
        # Google's client takes half a second to load, which a filled cache saves.
        try:
            from ..plugin_utils.cloud_tpu import CloudTpu, CloudTpuError
        except ImportError as error:
            raise AnsibleParserError(unmet_requirements() or str(error)) from None

        options = {name: self.get_option(name) for name in AUTH}
        slices = []
        try:
            for project, zone in places:
                cloud = CloudTpu(project, zone, options)
                for slice_ in cloud.slices():
                    if (
                        iap
                        and self._is_named(slice_)
                        and not all(worker["external"] for worker in slice_["workers"])
                    ):
                        instances = cloud.instances(slice_)
                        for worker, name in zip(slice_["workers"], instances, strict=False):
                            worker["instance"] = name
                    # The metadata may hold a user's keys and scripts: keep them out of the cache.
                    del slice_["metadata"]
                    slices.append(slice_)
        except CloudTpuError as error:
            # With ``from error`` Ansible would say the message twice.
            raise AnsibleParserError(str(error)) from None
        if self.get_option("cache"):
            self._cache[key] = slices
        return slices

    def _is_named(self, slice_: dict[str, Any]) -> bool:
        patterns = [pattern for pattern in self.get_option("names") if pattern]
        names = [name for name in (slice_["name"], slice_["request"]) if name]
        return not patterns or any(
            fnmatch.fnmatchcase(name, pattern) for name in names for pattern in patterns
        )

    def _wanted(self, slices: list[dict[str, Any]], loader: Any) -> list[dict[str, Any]]:
        """Return the slices with a wanted name and state, and warn of those in another state.

        Raises AnsibleParserError if there is none and the playbook does not create or delete any.
        """
        named = [slice_ for slice_ in slices if self._is_named(slice_)]
        states = {state.strip().upper() for state in self.get_option("states")}
        wanted = [slice_ for slice_ in named if slice_["state"] in states and slice_["workers"]]
        others = [
            f"{slice_['name']} is {slice_['state']}"
            + (f" ({text})" if (text := slice_["health_description"]) else "")
            for slice_ in named
            if slice_ not in wanted
        ]
        if others:
            message = (
                f"{'; '.join(others)}: left out of the inventory, which includes the state "
                f"{', '.join(sorted(states))}. Wait for the slice or create it anew: "
                "ansible-playbook slice.yml -e state=present; or include other states: "
                "export TPU_STATES=…"
            )
        else:
            names = ", ".join(name for name in self.get_option("names") if name)
            zones = ", ".join(self.get_option("zones"))
            projects = ", ".join(self.get_option("projects"))
            existing = ", ".join(sorted(slice_["name"] for slice_ in slices)) or "none"
            message = (
                f"there is no TPU slice {names + ' ' if names else ''}in {zones} of {projects} "
                f"(existing slices: {existing}). "
                "Create it: ansible-playbook slice.yml -e state=present"
            )
        if not wanted and not LIFECYCLE & load_extra_vars(loader).keys():
            raise AnsibleParserError(message)
        if others or not wanted:
            self.display.warning(message)
        for slice_ in wanted:
            if slice_["health"] not in ("HEALTHY", "HEALTH_UNSPECIFIED"):
                self.display.warning(
                    f"{slice_['name']} is {slice_['health']} {slice_['health_description']}".strip()
                )
        return wanted

    def _hosts(self, slices: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
        for slice_ in sorted(slices, key=lambda slice_: (slice_["request"], slice_["name"])):
            for worker in range(len(slice_["workers"])):
                yield f"{slice_['name']}-w{worker}", host_variables(slice_, worker)

    def _add(self, slices: list[dict[str, Any]]) -> None:
        strict = self.get_option("strict")
        known_hosts = Path(self.get_option("known_hosts"))
        known_hosts.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name, variables in self._hosts(slices):
            variables["tpu_known_hosts"] = str(known_hosts)
            if not all(
                self._holds(condition, name, variables) for condition in self.get_option("filters")
            ):
                continue
            if name in self.inventory.hosts:
                other = self.inventory.hosts[name].vars.get(
                    "tpu_host_key_alias", "one of another file"
                )
                raise AnsibleParserError(
                    f"{name} is the name of two workers, {other} and "
                    f"{variables['tpu_host_key_alias']}. Exclude one of them with the options "
                    "projects, zones or names"
                )
            groups = [group_name(variables["tpu_slice_id"]), "tpu_workers"]
            if not variables["tpu_worker_id"]:
                groups.append("tpu_worker0")
            self.inventory.add_host(name)
            for group in groups:
                self.inventory.add_child(self.inventory.add_group(group), name)
            request = group_name(variables["tpu_queued_resource"] or variables["tpu_slice_id"])
            if request != groups[0]:
                self.inventory.add_child(self.inventory.add_group(request), groups[0])
            for key, value in variables.items():
                self.inventory.set_variable(name, key, value)
            self._set_composite_vars(self.get_option("compose"), variables, name, strict)
            self._add_host_to_composed_groups(self.get_option("groups"), variables, name, strict)
            self._add_host_to_keyed_groups(self.get_option("keyed_groups"), variables, name, strict)

    def _holds(self, condition: str, name: str, variables: dict[str, Any]) -> bool:
        try:
            return bool(self._compose(condition, variables | {"inventory_hostname": name}))
        except AnsibleError as error:
            if self.get_option("strict"):
                raise AnsibleParserError(
                    f"the filter {condition!r} cannot be evaluated for {name}: {error}"
                ) from None
            return False
