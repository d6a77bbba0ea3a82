"""The inventory of Cloud TPU slices: Google's own client asks an API on this machine."""

import contextlib
import json
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from ansible import context
from ansible.errors import AnsibleError, AnsibleParserError
from ansible.inventory.data import InventoryData
from ansible.parsing.dataloader import DataLoader
from ansible.plugins.loader import inventory_loader
from ansible.template import Templar
from ansible.utils.context_objects import CLIArgs

from tests.servers.cloud_tpu import PROJECT, ZONE, TpuApi
from tests.servers.faults import Fault

ROOT = Path(__file__).resolve().parents[3]
Read = Callable[..., InventoryData]


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[TpuApi]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in ("TPU_NAME", "GOOGLE_APPLICATION_CREDENTIALS", "GCP_ACCESS_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GCE_METADATA_HOST", "127.0.0.1:1")
    with TpuApi() as api:
        monkeypatch.setenv("TPU_API_ENDPOINT", api.endpoint)
        monkeypatch.setenv("GCP_AUTH_KIND", "anonymous")
        monkeypatch.setenv("PROJECT", PROJECT)
        monkeypatch.setenv("ZONE", ZONE)
        yield api


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Read:
    """Read a file of these options into an inventory."""

    def parse(fresh: bool = False, extra: str = "", **options: object) -> InventoryData:
        path = tmp_path / "some.gcp_tpu.yml"
        path.write_text(yaml.safe_dump({"plugin": "mixtral.tpu.gcp_tpu"} | options))
        extra_vars = (extra,) if extra else ()
        monkeypatch.setattr(context, "CLIARGS", CLIArgs({"extra_vars": extra_vars}))
        monkeypatch.delattr("ansible.utils.vars.load_extra_vars.extra_vars", raising=False)
        plugin, inventory = inventory_loader.get("mixtral.tpu.gcp_tpu"), InventoryData()
        assert plugin.verify_file(str(path))
        plugin.parse(inventory, DataLoader(), str(path), cache=not fresh)
        # As Ansible does: without a cache there is none to be updated.
        with contextlib.suppress(AttributeError):
            plugin.update_cache_if_changed()
        inventory.reconcile_inventory()
        return inventory

    return parse


def members(inventory: InventoryData, group: str) -> list[str]:
    return [host.name for host in inventory.groups[group].get_hosts()]


def test_a_worker_is_a_host_with_what_is_known_of_it(api: TpuApi, read: Read) -> None:
    symptoms = [
        {"workerId": "1", "symptomType": "HBM_OUT_OF_MEMORY", "details": "step 7"},
        {"workerId": "0", "symptomType": "LOW_MEMORY"},
    ]
    node = api.add("my-tpu", "v5p-16", labels={"team": "moe"}, symptoms=symptoms)
    api.add("other")
    inventory = read(names=["my-tpu"])
    assert members(inventory, "tpu_workers") == ["my-tpu-w0", "my-tpu-w1"]
    assert members(inventory, "my_tpu") == ["my-tpu-w0", "my-tpu-w1"]
    assert members(inventory, "tpu_worker0") == ["my-tpu-w0"]
    endpoint = node["networkEndpoints"][1]
    variables = inventory.hosts["my-tpu-w1"].vars
    assert variables["tpu_symptoms"][0].pop("time") == ""
    wanted = {
        "ansible_host": endpoint["accessConfig"]["externalIp"],
        "tpu_internal_ip": endpoint["ipAddress"],
        "tpu_external_ip": endpoint["accessConfig"]["externalIp"],
        "tpu_worker_id": 1,
        "tpu_slice_id": "my-tpu",
        "tpu_accelerator_type": "v5p-16",
        "tpu_topology": "2x2x2",
        "tpu_chips": 8,
        "tpu_state": "READY",
        "tpu_health": "HEALTHY",
        "tpu_health_description": "",
        "tpu_symptoms": [{"worker": "1", "type": "HBM_OUT_OF_MEMORY", "details": "step 7"}],
        "tpu_queued_resource": "",
        "tpu_project": PROJECT,
        "tpu_zone": ZONE,
        "tpu_labels": {"team": "moe"},
        "tpu_runtime_version": "v2-alpha-tpuv5",
        "tpu_host_key_alias": f"my-tpu-w1.{ZONE}.{PROJECT}.{node['id']}",
    }
    assert wanted.items() <= variables.items()


def test_sixty_four_workers_come_in_order_with_one_request(api: TpuApi, read: Read) -> None:
    api.add("big", "v5p-512")
    inventory = read()
    assert members(inventory, "tpu_workers") == [f"big-w{number}" for number in range(64)]
    assert len(api.requests) == 1


def test_pages_of_several_zones_are_one_request_each(api: TpuApi, read: Read) -> None:
    api.page = 2
    for number in range(5):
        api.add(f"a{number}", "v6e-4")
    api.add("b", "v6e-4", zone="us-central1-a")
    inventory = read(zones=[ZONE, "us-central1-a"])
    assert members(inventory, "tpu_workers") == [
        "a0-w0",
        "a1-w0",
        "a2-w0",
        "a3-w0",
        "a4-w0",
        "b-w0",
    ]
    assert (api.asked(f"{ZONE}/nodes"), api.asked("us-central1-a/nodes")) == (3, 1)
    api.requests.clear()
    assert "b-w0" in read(zones=["-"]).hosts
    assert api.asked("locations/-/nodes") == len(api.requests)


def test_a_queued_resource_is_a_group_of_its_slices(api: TpuApi, read: Read) -> None:
    for name in ("moe-0", "moe-1"):
        api.add(name, request="moe")
    api.add("single", "v6e-4", request="single")
    inventory = read(names=["moe", "single"])
    assert members(inventory, "moe") == ["moe-0-w0", "moe-0-w1", "moe-1-w0", "moe-1-w1"]
    assert members(inventory, "moe_1") == ["moe-1-w0", "moe-1-w1"]
    assert members(inventory, "tpu_worker0") == ["moe-0-w0", "moe-1-w0", "single-w0"]
    assert members(inventory, "single") == ["single-w0"]
    assert inventory.hosts["moe-1-w0"].vars["tpu_queued_resource"] == "moe"


def test_who_has_no_external_address_is_reached_inside_or_by_its_machine(
    api: TpuApi, read: Read
) -> None:
    api.addresses = lambda name, worker: (f"10.0.0.{worker}", "")
    api.add("my-tpu")
    inside = read().hosts["my-tpu-w1"].vars
    assert inside["ansible_host"] == "10.0.0.1"
    assert "tpu_instance" not in inside
    through = read(iap=True).hosts["my-tpu-w1"].vars
    assert through["tpu_instance"] == "t1v-n-0a1b2c3d-w-1"


def test_names_are_patterns_and_filters_are_conditions(api: TpuApi, read: Read) -> None:
    for name in ("moe-a", "moe-b", "other"):
        api.add(name, "v6e-4", labels={"team": name[-1]})
    found = read(names=["moe-*"], filters=["tpu_labels.team == 'b'", "tpu_worker_id == 0"])
    assert list(found.hosts) == ["moe-b-w0"]


def test_variables_and_groups_can_be_composed(api: TpuApi, read: Read) -> None:
    api.add("my-tpu", labels={"team": "moe"})
    rules = {
        "compose": {"twice": "tpu_worker_id * 2", "broken": "nothing.there"},
        "groups": {"even": "tpu_worker_id % 2 == 0"},
        "keyed_groups": [{"key": "tpu_labels.team", "prefix": "team"}],
    }
    inventory = read(**rules)
    assert inventory.hosts["my-tpu-w1"].vars["twice"] == 2
    assert "broken" not in inventory.hosts["my-tpu-w1"].vars
    assert members(inventory, "even") == ["my-tpu-w0"]
    assert members(inventory, "team_moe") == ["my-tpu-w0", "my-tpu-w1"]
    for broken in ({"compose": {"broken": "nothing.there"}}, {"filters": ["nothing.there"]}):
        assert "broken" not in read(**broken, states=["ready"]).groups
        with pytest.raises(AnsibleError, match="nothing"):
            read(**broken, strict=True)


def test_what_the_api_says_is_no_template(api: TpuApi, read: Read) -> None:
    evil = "{{ lookup('ansible.builtin.pipe', 'false') }}"
    api.add("my-tpu", labels={"evil": evil}, healthDescription=evil)
    inventory = read(compose={"copied": "tpu_labels.evil"}, strict=True)
    variables = inventory.hosts["my-tpu-w0"].vars
    rendered = Templar(DataLoader(), variables=variables).template(dict(variables))
    assert rendered["tpu_labels"]["evil"] == rendered["copied"] == evil
    assert rendered["tpu_health_description"] == evil


def test_slices_in_other_states_stay_out_and_are_named(api: TpuApi, read: Read, capsys) -> None:
    api.add("well")
    api.add("sick", health="UNHEALTHY_MAINTENANCE", healthDescription="it is being mended")
    api.add("gone", state="PREEMPTED")
    api.add("growing", state="CREATING", networkEndpoints=[])
    inventory = read(groups={"unhealthy": "tpu_health != 'HEALTHY'"})
    assert set(members(inventory, "tpu_workers")) == {
        f"{it}-w{n}" for it in ("well", "sick") for n in (0, 1)
    }
    assert members(inventory, "unhealthy") == ["sick-w0", "sick-w1"]
    said = " ".join(capsys.readouterr().err.split())
    assert (
        "gone is PREEMPTED; growing is CREATING: left out of the inventory, which includes" in said
    )
    assert "sick is UNHEALTHY_MAINTENANCE it is being mended" in said
    assert "gone-w1" in read(states=["READY", "PREEMPTED"]).hosts


def test_no_slice_is_an_error_unless_one_is_to_be_made(api: TpuApi, read: Read) -> None:
    api.add("gone", state="PREEMPTED")
    with pytest.raises(AnsibleParserError, match=r"^gone is PREEMPTED: left out"):
        read(names=["gone"])
    words = rf"no TPU slice none in {ZONE} of {PROJECT} \(existing slices: gone\). Create it: "
    with pytest.raises(AnsibleParserError, match=words):
        read(names=["none"])
    for extra in ("state=present", "mixtral_state=absent", "expired=1", "mixtral_expired=1"):
        assert not read(names=["none"], extra=extra).hosts


@pytest.mark.parametrize(
    ("program", "configuration"),
    [
        (["ansible-playbook", "site.yml"], (ROOT / "ansible.cfg").read_text()),
        (["ansible-inventory", "--list"], ""),
        (
            ["ansible", "all", "--module-name=ansible.builtin.ping"],
            "[inventory]\nenable_plugins = yaml, mixtral.tpu.gcp_tpu, ini",
        ),
    ],
    ids=["the checkout's configuration", "no configuration", "another order of plugins"],
)
def test_a_program_of_ansible_says_the_error_alone_and_ends(
    api: TpuApi, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, program: list, configuration: str
) -> None:
    api.add("held")
    (tmp_path / "ansible.cfg").write_text(configuration)
    monkeypatch.setenv("TPU_NAME", "moe-1")
    monkeypatch.setenv("ANSIBLE_CONFIG", str(tmp_path / "ansible.cfg"))
    monkeypatch.setenv("ANSIBLE_COLLECTIONS_PATH", str(ROOT / "collections"))
    name, *options = program
    ran = subprocess.run(
        [Path(sys.executable).with_name(name), "--inventory=inventory/gcp", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 1
    assert ran.stdout == ""
    assert ran.stderr == (
        f"[ERROR]: there is no TPU slice moe-1 in {ZONE} of {PROJECT} (existing slices: held). "
        "Create it: ansible-playbook slice.yml -e state=present\n"
    )


def test_two_workers_of_one_name_are_refused(api: TpuApi, read: Read) -> None:
    api.add("my-tpu")
    api.add("my-tpu", zone="us-central1-a")
    with pytest.raises(AnsibleParserError, match="my-tpu-w0 is the name of two workers"):
        read(zones=["-"])


def test_a_slice_cannot_take_the_name_of_a_group(api: TpuApi, read: Read) -> None:
    api.add("tpu-workers", "v6e-4")
    api.add("all", "v6e-4")
    assert members(read(), "slice_tpu_workers") == ["tpu-workers-w0"]


def test_the_cache_spares_requests_until_it_is_refreshed(
    api: TpuApi, read: Read, tmp_path: Path
) -> None:
    api.add("my-tpu", metadata={"startup-script": "secret"})
    cached = {
        "cache": True, "cache_plugin": "jsonfile",
        "cache_connection": str(tmp_path / "cache"),
    }  # fmt: skip
    first = read(**cached).hosts["my-tpu-w0"].vars
    assert read(**cached).hosts["my-tpu-w0"].vars == first
    assert len(api.requests) == 1
    (file,) = (tmp_path / "cache").iterdir()
    assert "my-tpu" in json.dumps(json.loads(file.read_text()))
    assert "secret" not in file.read_text()
    # After maintenance a worker has another address.
    node = api.node("my-tpu")
    node["networkEndpoints"][0]["accessConfig"]["externalIp"] = "198.51.100.7"
    assert read(**cached).hosts["my-tpu-w0"].vars == first
    fresh = read(**cached, fresh=True).hosts["my-tpu-w0"].vars
    assert fresh["ansible_host"] == "198.51.100.7"
    assert read(**cached).hosts["my-tpu-w0"].vars == fresh
    assert len(api.requests) == 2


def test_a_busy_api_is_asked_again(api: TpuApi, read: Read) -> None:
    api.add("my-tpu")
    quota = "Quota exceeded for quota metric"
    api.faults += [Fault("nodes", 503), Fault("nodes", 429, message=quota)]
    assert "my-tpu-w1" in read().hosts
    assert len(api.requests) == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"projects": ["nope"]}, "on resource project nope (403). Check that nope is"),
        ({"zones": ["moon"]}, "or access is unauthorized (403). Check that moon is"),
        ({"auth_kind": "accesstoken", "access_token": "old"}, "the credentials were refused: "),
        ({"auth_kind": "accesstoken"}, "no token is given: export GCP_ACCESS_TOKEN=…"),
        ({"auth_kind": "application"}, "Log in: gcloud auth application-default login"),
        ({"auth_kind": "serviceaccount"}, "no key is given: export GCP_SERVICE_ACCOUNT_FILE=…"),
        (
            {"auth_kind": "serviceaccount", "service_account_file": "/none.json"},
            "/none.json: No such file or directory. Create a key",
        ),
        (
            {"auth_kind": "serviceaccount", "service_account_contents": '{"private_key": "hush"}'},
            "service_account_contents: this is not the key of a service account",
        ),
        ({"api_endpoint": "http://tpu.googleapis.com"}, "allowed is an https:// address"),
        ({"api_endpoint": "https://tpu.googleapis.com"}, "auth_kind is anonymous, and api"),
        ({"projects": [], "zones": []}, "gives no projects: export PROJECT"),
    ],
)  # fmt: skip
def test_an_error_is_one_line_with_what_to_do(
    api: TpuApi, read: Read, monkeypatch, tmp_path: Path, options: dict, words: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    api.tokens = {"new"} if "access_token" in options else None
    with pytest.raises(AnsibleParserError) as caught:
        read(**options)
    said = str(caught.value)
    assert words in said
    assert "\n" not in said
    assert "hush" not in said


@pytest.mark.parametrize(
    ("status", "message", "words"),
    [
        (
            403,
            "Cloud TPU API has not been used in project 1 before or it is disabled.",
            f"Enable the Cloud TPU API: gcloud services enable tpu.googleapis.com --project "
            f"{PROJECT}",
        ),
        (403, "Permission 'tpu.nodes.list' denied", "needs roles/tpu.viewer"),
        (404, "Requested entity was not found.", "Check the project, the zone"),
    ],
)
def test_a_refusal_of_the_api_is_told_with_what_to_do(
    api: TpuApi, read: Read, status: int, message: str, words: str
) -> None:
    api.faults.append(Fault("nodes", status, message=message))
    with pytest.raises(AnsibleParserError) as caught:
        read()
    assert f"{message.rstrip('.')} ({status}). " in str(caught.value)
    assert words in str(caught.value)


def test_an_api_that_does_not_answer_is_named(
    api: TpuApi, read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "ansible_collections.mixtral.tpu.plugins.plugin_utils.cloud_tpu.RETRY_SECONDS", 0.1
    )
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
    with pytest.raises(AnsibleParserError, match=f"no answer from {endpoint}: Connection refused"):
        read(api_endpoint=endpoint)
