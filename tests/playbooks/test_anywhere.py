"""A checkout works in a path with blanks, from any directory, and with anybody's settings."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.playbook import write_inventory
from tests.servers.cloud_tpu import PROJECT, ZONE, TpuApi

ROOT = Path(__file__).resolve().parents[2]
# What others set in an ansible.cfg of their own, and what could change a playbook's meaning
SETTINGS = """
[defaults]
inventory = /nowhere/hosts
roles_path = /nowhere/roles
collections_path = /nowhere/collections
callbacks_enabled = ansible.posix.profile_tasks
stdout_callback = minimal
gathering = smart
hash_behaviour = merge
inject_facts_as_vars = false
error_on_undefined_vars = false
strategy = free
forks = 1
remote_tmp = {home}/temporary files
[connection]
pipelining = false
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this tree in a path with blanks. Everybody may write to it."""
    copy = tmp_path_factory.mktemp("some where") / "the checkout"
    listed = subprocess.check_output(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, text=True
    )
    for name in filter(None, listed.split("\0")):
        if os.path.lexists(ROOT / name):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name, follow_symlinks=False)
    copy.chmod(0o777)
    return copy


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home directory with a blank in its path."""
    path = tmp_path / "my home"
    path.mkdir()
    return path


@pytest.fixture
def settings(home: Path) -> Path:
    """The user's own ansible.cfg."""
    path = home / "ansible.cfg"
    path.write_text(SETTINGS.format(home=home))
    return path


def run(
    directory: str | Path, *command: str | Path, **environment: str | Path
) -> subprocess.CompletedProcess[str]:
    """Run a command in ``directory``, with no setting of Ansible but those in ``environment``."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("ANSIBLE_")}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    env |= {"ANSIBLE_NOCOLOR": "1"} | environment
    return subprocess.run(
        command, cwd=directory, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def test_provisioning_depends_on_no_setting_of_the_user(checkout: Path, settings: Path) -> None:
    ran = run(
        "/", "ansible-playbook", checkout / "site.yml", "-i", checkout / "inventory/local",
        "--check", "--tags=config,image", ANSIBLE_CONFIG=settings,
        ANSIBLE_COLLECTIONS_PATH="/nowhere",
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout
    # Ansible warns of what that strategy does not heed.
    assert "free strategy" not in ran.stdout


def test_without_an_inventory_the_one_that_is_proposed_works(checkout: Path) -> None:
    refused = run(checkout, "ansible-playbook", "status.yml")
    assert "ignoring it as an ansible.cfg source" in refused.stdout
    assert refused.returncode == 2
    option = re.search(r"-i '.+?'(?= has this machine)", refused.stdout)[0]
    shown = run(checkout, "ansible-playbook", "status.yml", *shlex.split(option))
    assert shown.returncode == 0, shown.stdout


def test_too_few_forks_are_told_with_the_file_that_sets_them(
    checkout: Path, settings: Path
) -> None:
    workers = write_inventory(settings.parent, {"one": {}, "two": {}})
    ran = run(
        "/", "ansible-playbook", checkout / "stop.yml", "-i", workers, "--check",
        ANSIBLE_CONFIG=settings,
    )  # fmt: skip
    assert ran.returncode == 2
    assert f"only 1 forks: run with --forks 2, or set forks in {settings}" in ran.stdout


def test_a_module_runs_without_a_playbook(checkout: Path) -> None:
    ran = run(
        "/", "ansible", "tpu_workers", "--playbook-dir", checkout,
        "-i", checkout / "inventory/local", "-m", "mixtral.tpu.trainer_state",
        "-a", "container=nobodys process_dir=/nowhere",
    )  # fmt: skip
    assert ran.stdout.startswith("localhost | SUCCESS"), ran.stdout


def test_the_host_keys_of_a_slice_are_in_one_file(checkout: Path, home: Path) -> None:
    with TpuApi() as api:
        api.add("my-tpu", "v5p-8")
        ran = run(
            "/", "ansible", "tpu_workers", "--playbook-dir", checkout,
            "-i", checkout / "inventory/gcp", "-m", "ansible.builtin.debug",
            "-a", "msg={{ ansible_ssh_common_args }}",
            TPU_API_ENDPOINT=api.endpoint, GCP_AUTH_KIND="anonymous", NO_PROXY="127.0.0.1",
            TPU_NAME="my-tpu", PROJECT=PROJECT, ZONE=ZONE, HOME=str(home),
        )  # fmt: skip
    assert ran.stdout.startswith("my-tpu-w0 | SUCCESS"), ran.stdout
    arguments = json.loads(ran.stdout.partition("=>")[2])["msg"]
    # Ansible splits the arguments into words, and ssh the value into files, by the same rules.
    option = "UserKnownHostsFile="
    (files,) = (word for word in shlex.split(arguments) if word.startswith(option))
    assert shlex.split(files.removeprefix(option)) == [f"{home}/.ssh/mixtral_tpu_known_hosts"]


def test_make_takes_the_project_s_settings(checkout: Path, settings: Path) -> None:
    # Only these settings lead a playbook that is not in the checkout's root to the collection.
    goal = "goal: ; @ansible-playbook -i inventory/simulated molecule/shared/create.yml"
    ran = run(
        checkout, "make", f"--eval={goal} --syntax-check", "goal",
        ANSIBLE_CONFIG=settings, ANSIBLE_COLLECTIONS_PATH="/nowhere",
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout
