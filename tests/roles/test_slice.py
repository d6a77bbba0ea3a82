"""slice.yml as users run it, against an API on this machine."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from tests.playbook import Playbook, run_playbook
from tests.servers.cloud_tpu import PROJECT, ZONE, TpuApi

Play = Callable[..., Playbook]


@pytest.fixture
def api() -> Iterator[TpuApi]:
    with TpuApi() as api:
        yield api


@pytest.fixture
def play(api: TpuApi, tmp_path: Path) -> Play:
    """Run it with these variables of a user."""

    def run(*variables: str, inventory: str | Path = "inventory/local") -> Playbook:
        return run_playbook(
            "slice.yml",
            *(word for variable in variables for word in ("-e", variable)),
            environment={"TPU_NAME": "my-tpu", "ZONE": ZONE, "PROJECT": PROJECT}
            | {"TPU_API_ENDPOINT": api.endpoint, "GCP_AUTH_KIND": "anonymous"}
            | {"HOME": str(tmp_path), "NO_PROXY": "127.0.0.1"},
            inventory=inventory,
            slice_known_hosts=str(tmp_path / "known_hosts"),
        )

    return run


def test_what_users_say_is_what_the_api_is_asked_for(api: TpuApi, play: Play) -> None:
    made = play(
        "state=present", "accelerator_type=v5p", "topology=2x2x2", "spot=true", "max_hours=0.5",
        "external_ips=false", "subnetwork=train", '{"labels": {"team": "moe"}}',
        '{"data_disks": ["text"]}', '{"slice_metadata": {"startup-script": "true"}}',
    )  # fmt: skip
    assert made.code == 0
    assert "changed=1" in made.screen
    assert "my-tpu is READY: 2 workers" in made.screen
    node = api.node("my-tpu")
    assert node["acceleratorType"] == "v5p-16"
    assert node["schedulingConfig"] == {"spot": True}
    assert node["labels"] == {"team": "moe", "max-minutes": "30"}
    assert node["metadata"] == {"startup-script": "true"}
    assert node["dataDisks"] == [{"sourceDisk": f"projects/{PROJECT}/zones/{ZONE}/disks/text"}]
    assert node["networkConfig"]["subnetwork"] == "train"
    assert node["networkConfig"]["enableExternalIps"] is False

    other = play("state=present", "accelerator_type=v5p-8")
    assert other.code == 2
    assert "cannot be changed in place: accelerator_type of my-tpu is v5p-16" in other.screen
    assert "Traceback" not in other.screen


def test_wrong_names_and_values_are_refused_before_the_api_is_asked(
    api: TpuApi, play: Play
) -> None:
    refused = play("state=present", "spot=maybe", "acelerator_type=v5p-8")
    assert refused.code == 2
    assert (
        "-e acelerator_type: there is no such variable. Did you mean accelerator_type?"
        in refused.words
    )
    assert "spot" in refused.screen
    assert not api.requests


def test_an_inventory_says_what_a_slice_is_that_has_no_workers_yet(
    api: TpuApi, play: Play, tmp_path: Path
) -> None:
    groups = {
        # A shop's own variables
        "all": {"state": "absent", "zone": "basement", "mixtral_zone": ZONE},
        "tpu_workers": {"accelerator_type": "v5p-8", "spot": True, "network": "of-workers"},
        "my_tpu": {"network": "of-slice"},
    }
    (tmp_path / "group_vars").mkdir()
    for name, variables in groups.items():
        (tmp_path / f"group_vars/{name}.yml").write_text(yaml.safe_dump(variables))
    hosts = tmp_path / "hosts.yml"
    hosts.write_text("tpu_workers: {children: {my_tpu: {}}}")

    assert "state is ''" in play(inventory=hosts).words
    made = play("state=present", inventory=hosts)
    assert made.code == 0
    node = api.node("my-tpu")
    assert node["acceleratorType"] == "v5p-8"
    assert node["schedulingConfig"] == {"spot": True}
    assert node["networkConfig"]["network"] == "of-slice"
    assert made.recap.count("localhost") == 1
