"""The life of a slice: Google's own client talks to an API on this machine."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ansible.parsing.dataloader import DataLoader
from ansible.template import Templar
from ansible_collections.mixtral.tpu.plugins.action.slice import ActionModule
from ansible_collections.mixtral.tpu.plugins.action.slice_info import ActionModule as InfoModule

from tests.servers.cloud_tpu import PROJECT, ZONE, TpuApi
from tests.servers.faults import Fault

ROOT = Path(__file__).resolve().parents[3]
SETTINGS, DEFAULTS = (
    DataLoader().load_from_file(str(ROOT / "roles" / path), trusted_as_template=True)
    for path in ("mixtral/defaults/main/main.yml", "slice/defaults/main.yml")
)
Act = Callable[..., dict[str, Any]]


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[TpuApi]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("GCP_AUTH_KIND", "anonymous")
    with TpuApi() as api:
        monkeypatch.setenv("TPU_API_ENDPOINT", api.endpoint)
        yield api


@pytest.fixture
def known_hosts(tmp_path: Path) -> Path:
    return tmp_path / "known_hosts"


@pytest.fixture
def act(api: TpuApi, known_hosts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Act:
    """Do what the role does, with these of its variables; return the task's result."""
    monkeypatch.setenv("HOME", str(tmp_path))
    without_a_word = Templar(DataLoader(), variables=SETTINGS | DEFAULTS).template(DEFAULTS)
    given = {key.removeprefix("slice_"): value for key, value in without_a_word.items()}
    given |= {"name": "my-tpu", "zone": ZONE, "project": PROJECT, "ssh_user": "ada"}
    given |= {"count": 0, "max_hours": 0, "poll_seconds": 0.02, "known_hosts": str(known_hosts)}

    def run(state: str, check: bool = False, **variables: Any) -> dict[str, Any]:
        return acted(ActionModule, given | {"state": state} | variables, check)

    return run


def acted(module: type, args: dict[str, Any], check: bool = False) -> dict[str, Any]:
    task = SimpleNamespace(args=args, check_mode=check, async_val=0, no_log=False, diff=False)
    connection = SimpleNamespace(_shell=SimpleNamespace(tmpdir="/tmp"), has_pipelining=True)
    return module(task, connection, None, None, None, None).run(task_vars={})


def states(api: TpuApi) -> dict[str, str]:
    return {name.rpartition("/")[2]: node["state"] for name, node in api.nodes.items()}


def test_a_slice_is_made_once_and_deleted_once(api: TpuApi, act: Act, known_hosts: Path) -> None:
    api.seconds = 0.1
    options = {"accelerator_type": "v5p-16", "spot": True, "labels": {"team": "moe"}}
    options |= {"network": "train", "data_disks": ["text"], "service_account": "trainer@x"}
    would = act("present", check=True, **options)
    assert (would["changed"], would["diff"]["before"]) == (True, "")
    assert "accelerator_type: v5p-16" in would["diff"]["after"]
    assert not api.asked("POST|PATCH|DELETE")

    made = act("present", max_hours=1.5, **options)
    assert made["changed"], made
    assert made["msg"].startswith("my-tpu is READY: 2 workers")
    node = api.node("my-tpu")
    assert node["labels"] == {"team": "moe", "max-minutes": "90"}
    assert node["schedulingConfig"] == {"spot": True}
    assert node["runtimeVersion"] == "v2-alpha-tpuv5"
    assert node["networkConfig"]["network"] == "train"
    assert node["dataDisks"] == [{"sourceDisk": f"projects/{PROJECT}/zones/{ZONE}/disks/text"}]
    assert node["serviceAccount"]["email"] == "trainer@x"

    before = len(api.requests)
    again = act("present", **options)
    assert not again["changed"]
    assert not api.asked("PATCH")
    assert len(api.requests) == before + 2

    alias = f"my-tpu-w0.{ZONE}.{PROJECT}.{node['id']} ssh-ed25519 AAAA\n"
    other = f"my-tpu-2-w0.{ZONE}.{PROJECT}.7 ssh-ed25519 BBBB\n"
    known_hosts.write_text(alias + other)
    assert act("absent", check=True)["changed"]
    assert states(api) == {"my-tpu": "READY"}
    gone = act("absent")
    assert gone["changed"]
    assert gone["msg"].startswith("my-tpu is deleted: 2 workers, 0.0 hours old")
    assert not api.nodes
    assert known_hosts.read_text() == other
    assert not act("absent")["changed"]


def test_labels_and_key_change_in_place_and_nothing_else(api: TpuApi, act: Act, tmp_path) -> None:
    api.add("my-tpu", labels={"team": "moe"}, metadata={"ssh-keys": "bob:ssh-rsa B"})
    key = tmp_path / "key.pub"
    key.write_text("ssh-ed25519 A\n")
    options = {"labels": {"run": "7"}, "ssh_public_key_file": str(key)}
    assert act("present", check=True, **options)["changed"]
    assert act("present", **options)["changed"]
    node = api.node("my-tpu")
    assert node["labels"] == {"team": "moe", "run": "7"}
    assert node["metadata"] == {"ssh-keys": "bob:ssh-rsa B\nada:ssh-ed25519 A"}
    assert not act("present", **options)["changed"]

    api.requests.clear()
    other = act("present", accelerator_type="v5e-16", spot=True, labels={"run": "8"})
    assert other["failed"]
    for words in ("accelerator_type of my-tpu is v5p-16, wanted is v5litepod-16", "spot of my-tpu"):
        assert words in other["msg"]
    assert "Nothing was changed. Delete the slice first" in other["msg"]
    assert not api.asked("POST|PATCH|DELETE")


def test_a_key_without_a_user_is_refused(api: TpuApi, act: Act, tmp_path: Path) -> None:
    # A container has no USER.
    assert act("present", accelerator_type="v6e-4", ssh_user="")["changed"]
    key = tmp_path / "key.pub"
    key.write_text("ssh-ed25519 A\n")
    nobody = act("present", ssh_user="", ssh_public_key_file=str(key))
    assert nobody["failed"]
    assert "export TPU_USER=…" in nobody["msg"]
    assert not api.asked("PATCH")


def test_with_os_login_no_key_goes_into_the_metadata(api: TpuApi, act: Act, tmp_path: Path) -> None:
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh/google_compute_engine.pub").write_text("ssh-rsa A\n")
    act("present", accelerator_type="v6e-4", metadata={"enable-oslogin": "TRUE"})
    act("present", accelerator_type="v6e-4", name="other")
    assert api.node("my-tpu")["metadata"] == {"enable-oslogin": "TRUE"}
    assert api.node("other")["metadata"] == {"ssh-keys": "ada:ssh-rsa A"}


def test_a_preempted_slice_is_made_anew_once_it_is_gone(api: TpuApi, act: Act) -> None:
    api.seconds = 0.1
    old = api.add("my-tpu", state="PREEMPTED")["id"]
    assert act("present", accelerator_type="v5p-16")["changed"]
    assert api.node("my-tpu")["id"] != old
    writes = [it.split()[0] for it in api.requests if not it.startswith("GET")]
    assert writes == ["DELETE", "POST"]
    assert states(api) == {"my-tpu": "READY"}


def test_several_slices_are_one_queued_resource(api: TpuApi, act: Act) -> None:
    api.seconds = 0.1
    assert act("present", accelerator_type="v5p-16", count=2, spot=True)["changed"]
    assert states(api) == {"my-tpu-0": "READY", "my-tpu-1": "READY"}
    (resource,) = api.resources.values()
    assert resource["spot"] == {}
    assert "schedulingConfig" not in resource["tpu"]["nodeSpec"][0]["node"]
    assert not act("present", accelerator_type="v5p-16", count=2, spot=True)["changed"]
    assert "slices is 2, wanted is 3" in act("present", count=3)["msg"]
    one = act("absent", name="my-tpu-1")
    assert "2 slices of the queued resource my-tpu, and cannot be deleted without" in one["msg"]
    assert "export TPU_NAME=my-tpu" in one["msg"]
    assert act("absent")["changed"]
    assert (api.nodes, api.resources) == ({}, {})


def test_a_request_that_failed_is_told_and_made_anew(api: TpuApi, act: Act) -> None:
    api.refusal = (8, "no v5p-16 in your reservation")
    failed = act("present", accelerator_type="v5p-16", queued=True, reserved=True)
    assert failed["failed"]
    assert "queued resource FAILED no v5p-16 in your reservation" in failed["msg"]
    api.refusal = None
    assert act("present", accelerator_type="v5p-16", queued=True)["changed"]
    assert states(api) == {"my-tpu": "READY"}
    assert act("absent")["changed"]
    assert not api.resources


def test_a_request_that_waits_ends_the_waiting_and_not_the_request(api: TpuApi, act: Act) -> None:
    api.seconds = 60
    options = {"accelerator_type": "v5p-16", "queued": True}
    late = act("present", timeout_minutes=0.002, **options)
    assert "WAITING_FOR_RESOURCES. The request stays. Run the same command again" in late["msg"]
    (resource,) = api.resources.values()
    resource["due"] = time.monotonic()
    on = act("present", **options)
    assert (on["changed"], on["msg"][:18]) == (False, "my-tpu is READY: 2")


def test_a_slice_in_the_making_is_deleted_as_soon_as_the_api_lets_it_go(
    api: TpuApi, act: Act
) -> None:
    api.seconds = 0.2
    node = api.add("my-tpu", state="CREATING", networkEndpoints=[])
    node["due"] = time.monotonic() + 0.3
    assert act("absent")["changed"]
    assert not api.nodes
    assert api.asked("DELETE") > 1


def test_what_outlived_its_hours_is_deleted_and_nothing_else(api: TpuApi, act: Act) -> None:
    api.add("old", hours=3, labels={"max-minutes": "120"})
    api.add("young", hours=1, labels={"max-minutes": "120"})
    api.add("for-ever", hours=99)
    api.add("moe-0", hours=3, request="moe", labels={"max-minutes": "60"})
    gone = act("", expired=True, name="")
    assert gone["changed"]
    assert "old is deleted: 2 workers, 3.0 hours old, 24.0 chip-hours" in gone["msg"]
    assert sorted(states(api)) == ["for-ever", "young"]
    assert not act("", expired=True, name="")["changed"]


def test_the_others_are_deleted_where_one_cannot_be(api: TpuApi, act: Act) -> None:
    for name in ("a", "b", "c"):
        api.add(name, hours=3, labels={"max-minutes": "120"})
    api.faults.append(Fault("DELETE .*/nodes/a", 403, message="the caller may not delete a"))
    told = act("", expired=True, name="")
    assert told["failed"]
    assert told["changed"]
    assert sorted(states(api)) == ["a"]
    for words in ("b is deleted", "c is deleted", "the caller may not delete a"):
        assert words in told["msg"]


@pytest.mark.parametrize(
    ("refusal", "words"),
    [
        (
            (8, 'There is no more capacity in the zone "us-east5-a"'),
            "request a queued resource: -e queued=",
        ),
        ((8, "Quota limit 'TPUV5PPerProject' has been exceeded."), "iam-admin/quotas?project=my-p"),
    ],
)
def test_why_a_slice_is_not_made_is_told(api: TpuApi, act: Act, refusal: tuple, words: str) -> None:
    api.refusal = refusal
    failed = act("present", accelerator_type="v5p-16")
    assert failed["failed"]
    assert failed["msg"].startswith(f"Cannot create the slice (project {PROJECT}, zone {ZONE}): ")
    assert refusal[1].rstrip(".") in failed["msg"]
    assert words in failed["msg"]
    assert "\n" not in failed["msg"]


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"name": ""}, "no name is given: export TPU_NAME=…"),
        ({}, "Give one: -e accelerator_type=v5p-16 ("),
        ({"accelerator_type": "v9-8"}, "unknown accelerator type 'v9-8'"),
        ({"accelerator_type": "v5p-32"}, "List the zone's accelerator types: gcloud compute"),
        ({"accelerator_type": "v5p-17"}, "has no slice of that size"),
        ({"accelerator_type": "v5p-16", "topology": "4x4x4"}, "does not match v5p-16, which has 8"),
        ({"accelerator_type": "v5e-16", "topology": "2x2x4"}, "16 chips in 2 dimensions"),
        ({"accelerator_type": "v5p", "topology": "4xbig"}, "chips joined by x are allowed"),
        ({"topology": "4x4x4"}, "topology is given without a chip"),
        ({"accelerator_type": "v5p-16", "runtime_version": "v1"}, "the zone's runtime versions"),
        ({"accelerator_type": "v5p-16", "spot": True, "reserved": True}, "spot and reserved are"),
        ({"accelerator_type": "v5p-16", "ssh_public_key_file": "/none"}, "/none: No such file"),
        ({"accelerator_type": "v5p-16", "project": "nope"}, "Check that nope is the project's id"),
    ],
)  # fmt: skip
def test_a_slice_that_cannot_exist_is_refused(
    api: TpuApi, act: Act, variables: dict, words: str
) -> None:
    failed = act("present", **variables)
    assert failed["failed"]
    assert words in failed["msg"]
    assert not api.nodes


def test_a_name_that_is_taken_is_refused(api: TpuApi, act: Act) -> None:
    api.faults.append(Fault("POST .*/nodes", 409, message="Resource 'my-tpu' already exists"))
    assert "The name is in use" in act("present", accelerator_type="v5p-16")["msg"]
    api.add("my-tpu", state="STOPPED")
    assert "gcloud compute tpus tpu-vm start my-tpu" in act("present")["msg"]


def test_a_topology_is_what_the_api_is_asked_for(api: TpuApi, act: Act) -> None:
    act("present", accelerator_type="v5e", topology="4x4")
    assert api.node("my-tpu")["acceleratorType"] == "v5litepod-16"
    assert not act("present", accelerator_type="v5litepod-16")["changed"]


def test_every_slice_of_the_zone_is_told_with_its_cost_and_its_ailments(api: TpuApi) -> None:
    symptoms = [{"workerId": "1", "symptomType": "HBM_OUT_OF_MEMORY", "details": "step 7"}]
    api.add("sick", hours=2.5, health="UNHEALTHY_MAINTENANCE", symptoms=symptoms)
    api.add("old", hours=3, state="PREEMPTED", labels={"max-minutes": "60"})
    told = acted(InfoModule, {"project": PROJECT, "zone": ZONE})
    assert told["lines"] == [
        "old: v5p-16, PREEMPTED, healthy, 3.0 hours old, 24.0 chip-hours, "
        "is older than its max_hours: slice.yml -e expired=true",
        "sick: v5p-16, READY, unhealthy maintenance, 2.5 hours old, 20.0 chip-hours, "
        "worker 1 HBM_OUT_OF_MEMORY step 7",
    ]
    assert told["symptoms"]["sick-w1"][0].startswith("HBM_OUT_OF_MEMORY step 7")
    assert told["symptoms"]["old-w0"][0].startswith("the slice is PREEMPTED. Create it anew: ")
    assert "failed" in acted(InfoModule, {"project": "nope", "zone": ZONE})
