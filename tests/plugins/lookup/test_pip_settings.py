"""The controller's pip settings, as an image build gets them; pip itself reads them back."""

import subprocess
import sys

import pytest
from ansible.errors import AnsibleLookupError
from ansible_collections.mixtral.tpu.plugins.lookup.pip_settings import (
    certificates,
    parse,
    portable,
)


@pytest.fixture
def pip(tmp_path, monkeypatch):
    """What a controller's pip says about these settings."""

    def listing(environment: dict[str, str], configuration: str = "") -> str:
        file = tmp_path / "pip.conf"
        file.write_text(configuration)
        ran = subprocess.run(
            [sys.executable, "-m", "pip", "config", "list"],
            env={"PIP_CONFIG_FILE": str(file), "HOME": str(tmp_path)} | environment,
            capture_output=True,
            text=True,
            check=True,
        )
        return ran.stdout

    return listing


def test_what_says_where_packages_are_is_kept(pip):
    listing = pip(
        {"PIP_DEFAULT_TIMEOUT": "90", "PIP_EXTRA_INDEX_URL": "https://user:secret@mirror/simple"},
        "[global]\nindex-url = https://index.example/simple\nproxy = http://proxy:3128\n"
        "[install]\ntrusted-host =\n    one\n    two\n",
    )
    assert portable(parse(listing)) == {
        "index-url": "https://index.example/simple",
        "extra-index-url": "https://user:secret@mirror/simple",
        "proxy": "http://proxy:3128",
        "timeout": "90",
        "trusted-host": "one two",
    }


def test_what_exists_on_the_controller_only_is_left_out(pip):
    listing = pip(
        {"PIP_FIND_LINKS": "/opt/wheels https://wheels.example/", "PIP_CERT": "/etc/ca.crt"},
        "[global]\nextra-index-url = file:///opt/index\n    https://other.example/simple\n"
        "[install]\nuser = true\nno-index = true\n[list]\nformat = columns\n",
    )
    assert portable(parse(listing)) == {
        "find-links": "https://wheels.example/",
        "extra-index-url": "https://other.example/simple",
    }


def test_a_variable_beats_a_file_and_install_beats_global(pip):
    configuration = "[global]\nretries = 1\ntimeout = 1\n[install]\nretries = 2\ntimeout = 2\n"
    listing = pip({"PIP_RETRIES": "3"}, configuration)
    assert portable(parse(listing)) == {"retries": "3", "timeout": "2"}


def test_no_settings_are_fine(pip):
    assert portable(parse(pip({}))) == {}


def test_pip_s_own_bundle_comes_first(tmp_path):
    for name in ("pip", "ssl"):
        (tmp_path / name).write_text(f"{name} certificates")
    ssl = {"SSL_CERT_FILE": str(tmp_path / "ssl")}
    assert certificates({"cert": str(tmp_path / "pip")}, ssl) == "pip certificates"
    assert certificates({}, ssl) == "ssl certificates"


def test_a_bundle_that_is_not_there_is_named():
    with pytest.raises(AnsibleLookupError, match="/no/such"):
        certificates({"cert": "/no/such"}, {})
