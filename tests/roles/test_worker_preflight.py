"""What a worker that does not fit is told."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PLAYBOOK = """
- hosts: all
  gather_facts: false
  roles: [worker_preflight]
"""


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            ["worker_preflight_install_gib=100000", "worker_preflight_image=no/such:image"],
            r"GiB of disk are free for /var/lib/docker; 100000.0 are needed to build the image",
        ),
        (["worker_preflight_memory_gib=100000"], "GiB of memory; 100000 are needed"),
        (["worker_preflight_clock_seconds=-1"], "at most -1 s are allowed"),
        (["worker_preflight_accelerator=true"], "there is neither /dev/accel* nor /dev/vfio/*"),
        (
            ['{"worker_preflight__distributions": {"Debian": "99"}}'],
            "Supported, on x86_64: Debian 99 or newer",
        ),
    ],
)
def test_a_worker_that_does_not_fit_is_refused(tmp_path, variables, message):
    playbook = tmp_path / "play.yml"
    playbook.write_text(PLAYBOOK)
    ran = subprocess.run(
        [Path(sys.executable).parent / "ansible-playbook", "-i", "here,", "-c", "local", "--check"]
        + ["-e", f"ansible_python_interpreter={sys.executable}", playbook]
        + [word for variable in variables for word in ("-e", variable)],
        env=os.environ
        | {"ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"}
        | {"ANSIBLE_ROLES_PATH": str(ROOT / "roles")},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.returncode == 2, ran.stdout
    assert message in " ".join(ran.stdout.split())
