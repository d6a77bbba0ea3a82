"""Ansible inventory of Cloud TPU slices: one host a worker, in worker order."""

from __future__ import annotations

import contextlib
import fnmatch
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleError, AnsibleParserError
from ansible.inventory.group import to_safe_group_name
from ansible.plugins.inventory import BaseInventoryPlugin, Cacheable, Constructable
from ansible.utils.vars import load_extra_vars

ROOT = Path(__file__).resolve().parents[2]
# See plugins/plugin_utils/__init__.py.
sys.path.append(str(ROOT))

DOCUMENTATION = r"""
name: gcp_tpu
short_description: Workers of Cloud TPU slices
description:
  - >-
    Reads slices from the Cloud TPU API (version 2). Each network endpoint of a slice is a host,
    C(<slice>-w<number>), in the group C(tpu_workers), in worker order. There is also a group for
    every slice and every queued resource, with the letters that a group may have, and the group
    C(tpu_worker0) of the first workers.
  - >-
    Host variables are C(tpu_worker_id), C(tpu_slice_id), C(tpu_accelerator_type), C(tpu_topology),
    C(tpu_chips) (of the whole slice), C(tpu_state), C(tpu_health), C(tpu_health_description),
    C(tpu_symptoms) (of this worker), C(tpu_queued_resource), C(tpu_project), C(tpu_zone),
    C(tpu_labels), C(tpu_runtime_version), C(tpu_created), C(tpu_internal_ip), C(tpu_external_ip),
    C(tpu_host_key_alias), C(tpu_instance) (with O(iap)) and C(ansible_host).
  - >-
    C(ansible_host) is the external address, or the internal one where there is no other. Addresses
    change, and belong to another machine then, so a worker's SSH host key is kept under
    C(tpu_host_key_alias), which no two workers ever share, in C(tpu_known_hosts).
  - What the API says is data. No template in a name, label or description is ever evaluated.
  - >-
    Slices in another state than O(states) are left out, and named with their state. It is an error
    when nothing is left, unless C(-e state=) or C(-e expired=) say that one is being made or
    deleted.
author: mixtral-tpu contributors
requirements:
  - google-cloud-tpu
extends_documentation_fragment:
  - constructed
  - inventory_cache
options:
  plugin:
    description: That this file is meant for the plugin.
    required: true
    choices: [gcp_tpu]
  projects:
    description: Ids of the projects.
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
      Jinja2 conditions on a host's variables. A host that one does not hold for is left out.
    type: list
    elements: str
    default: []
  states:
    description: >-
      States of the slices that are wanted. C(TPU_STATES=READY,PREEMPTED) in the environment lets
      C(reset.yml) reach what is left of a preempted slice.
    type: list
    elements: str
    default: [READY]
    env:
      - name: TPU_STATES
  known_hosts:
    description: >-
      The file for the workers' SSH host keys. Its directory is made. By default
      C(.cache/gcp/known_hosts) in the project.
    type: path
  iap:
    description: >-
      Ask the API for the machines' names, in C(tpu_instance), where they have no external
      address. The Identity-Aware Proxy needs them.
    type: bool
    default: false
    env:
      - name: TPU_IAP
  auth_kind:
    description: >-
      How to log in. V(application) means application default credentials; V(anonymous) is for an
      API on this machine, at O(api_endpoint).
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
    description: The contents of such a file instead, as text or dictionary.
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
      The API's address, with C(https://). With C(http://) it has to be on this machine.
    type: str
    default: https://tpu.googleapis.com
    env:
      - name: TPU_API_ENDPOINT
"""

EXAMPLES = r"""
# team.gcp_tpu.yml: all slices of a team, in two zones. Where projects, zones or names are left out
# they come from PROJECT, ZONE and TPU_NAME.
plugin: gcp_tpu
projects: [my-project]
zones: [us-east5-a, europe-west4-b]
filters:
  - tpu_labels.team == 'moe'
keyed_groups:
  - key: tpu_accelerator_type
    prefix: type
strict: true
"""

# What a group of a slice must not be called
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
    """Return the group of a slice or queued resource: my-tpu is my_tpu."""
    safe = to_safe_group_name(name, force=True, silent=True)
    return f"slice_{safe}" if safe in RESERVED else safe


def host_variables(slice_: dict[str, Any], worker: int) -> dict[str, Any]:
    """Return what is known of a worker of a slice, under the names of the documentation."""
    address = slice_["workers"][worker]
    variables = {
        "ansible_host": address["external"] or address["internal"],
        "tpu_worker_id": worker,
        "tpu_slice_id": slice_["name"],
        "tpu_external_ip": address["external"],
        "tpu_internal_ip": address["internal"],
        "tpu_queued_resource": slice_["request"],
        # A slice that is made anew has the same name, and another id.
        "tpu_host_key_alias": (
            f"{slice_['name']}-w{worker}.{slice_['zone']}.{slice_['project']}.{slice_['id']}"
        ),
        "tpu_symptoms": [it for it in slice_["symptoms"] if it["worker"] in ("", str(worker))],
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
    """``plugin: gcp_tpu`` in a file whose name ends in gcp_tpu.yml."""

    NAME = "gcp_tpu"

    def verify_file(self, path: str) -> bool:
        """Tell whether a file is one for this plugin."""
        return super().verify_file(path) and path.endswith(("gcp_tpu.yml", "gcp_tpu.yaml"))

    def parse(self, inventory: Any, loader: Any, path: str, cache: bool = True) -> None:
        """Read the slices, from the cache where there is one, and add their workers."""
        super().parse(inventory, loader, path)
        self._read_config_data(path)
        for option, variable in (("projects", "PROJECT"), ("zones", "ZONE")):
            if not any(self.get_option(option) or []):
                raise AnsibleParserError(
                    f"{path}: which {option}? export {variable}=…, or set {option} in the file"
                )
        self._add(self._wanted(self._slices(path, cache), loader))

    def _slices(self, path: str, cache: bool) -> list[dict[str, Any]]:
        """Return all slices of all projects and zones, as the API or the cache has them."""
        places = [
            (project, zone)
            for project in self.get_option("projects")
            for zone in self.get_option("zones")
        ]
        # Another zone in the environment is another question.
        iap = self.get_option("iap")
        key = f"{self.get_cache_key(path)}_{'_'.join('_'.join(it) for it in places)}_{int(iap)}"
        use = self.get_option("cache") and cache
        if use:
            with contextlib.suppress(KeyError):
                return self._cache[key]
        # Google's client takes half a second to load, and with a cache nobody needs it.
        from plugins.plugin_utils.cloud_tpu import CloudTpu, CloudTpuError

        options = {name: self.get_option(name) for name in AUTH}
        slices = []
        try:
            for project, zone in places:
                cloud = CloudTpu(project, zone, options)
                for found in cloud.slices():
                    if (
                        iap
                        and self._is_named(found)
                        and not all(it["external"] for it in found["workers"])
                    ):
                        names = cloud.instances(found)
                        for worker, name in zip(found["workers"], names, strict=False):
                            worker["instance"] = name
                    # A user's key or script is nobody's inventory.
                    del found["metadata"]
                    slices.append(found)
        except CloudTpuError as problem:
            raise AnsibleParserError(str(problem)) from problem
        if self.get_option("cache"):
            self._cache[key] = slices
        return slices

    def _is_named(self, slice_: dict[str, Any]) -> bool:
        patterns = [it for it in self.get_option("names") if it]
        names = [name for name in (slice_["name"], slice_["request"]) if name]
        return not patterns or any(
            fnmatch.fnmatchcase(name, pattern) for name in names for pattern in patterns
        )

    def _wanted(self, slices: list[dict[str, Any]], loader: Any) -> list[dict[str, Any]]:
        """Return the slices that were asked for, and name those in another state."""
        named = [it for it in slices if self._is_named(it)]
        states = {it.strip().upper() for it in self.get_option("states")}
        wanted = [it for it in named if it["state"] in states and it["workers"]]
        others = [
            f"{it['name']} is {it['state']}"
            + (f" ({text})" if (text := it["health_description"]) else "")
            for it in named
            if it not in wanted
        ]
        where = f"{', '.join(self.get_option('zones'))} of {', '.join(self.get_option('projects'))}"
        if others:
            said = (
                f"{'; '.join(others)}: left out, because only {', '.join(sorted(states))} is wanted"
            )
        else:
            names = ", ".join(it for it in self.get_option("names") if it)
            there = ", ".join(sorted(it["name"] for it in slices)) or "none"
            said = (
                f"there is no TPU slice {names + ' ' if names else ''}in {where} (there: {there}). "
                "Make it: ansible-playbook slice.yml -e state=present"
            )
        if not wanted and not {"state", "expired"} & load_extra_vars(loader).keys():
            raise AnsibleParserError(said)
        if others or not wanted:
            self.display.warning(said)
        for slice_ in wanted:
            if slice_["health"] not in ("HEALTHY", "HEALTH_UNSPECIFIED"):
                self.display.warning(
                    f"{slice_['name']} is {slice_['health']} {slice_['health_description']}".strip()
                )
        return wanted

    def _hosts(self, slices: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
        for slice_ in sorted(slices, key=lambda it: (it["request"], it["name"])):
            for worker in range(len(slice_["workers"])):
                yield f"{slice_['name']}-w{worker}", host_variables(slice_, worker)

    def _add(self, slices: list[dict[str, Any]]) -> None:
        strict = self.get_option("strict")
        known_hosts = Path(self.get_option("known_hosts") or ROOT / ".cache/gcp/known_hosts")
        known_hosts.parent.mkdir(parents=True, exist_ok=True)
        for name, variables in self._hosts(slices):
            variables["tpu_known_hosts"] = str(known_hosts)
            if not all(
                self._holds(condition, name, variables) for condition in self.get_option("filters")
            ):
                continue
            if name in self.inventory.hosts:
                other = self.inventory.hosts[name].vars.get("tpu_host_key_alias", "another file")
                raise AnsibleParserError(
                    f"{name} is in {other} and in {variables['tpu_host_key_alias']}: two workers "
                    "would have the same name. Choose with projects, zones or names"
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
                raise AnsibleParserError(f"filter {condition!r} for {name}: {error}") from error
            return False
