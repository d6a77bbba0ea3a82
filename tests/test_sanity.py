"""What ansible-test asks of a collection, of this one as it is built."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
LEFT_OUT = [
    # They download packages first. The pages of the plugins have a test of their own, ansible-lint
    # runs yamllint and reads meta/runtime.yml, and ruff does what pep8 and pylint do. Besides,
    # validate-modules allows no license but the GPL.
    "ansible-doc", "changelog", "import", "pep8", "pylint", "runtime-metadata", "validate-modules",
    "yamllint",
    # They need a program of the system.
    "pslint", "shellcheck",
    # The report is a page for people, and is set as such.
    "no-smart-quotes",
]  # fmt: skip


def test_the_built_collection_passes_ansible_test(tmp_path: Path) -> None:
    subprocess.run(
        [BIN / "ansible-galaxy", "collection", "build", "--output-path", tmp_path],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    # ansible-test knows a collection by its directory.
    collection = tmp_path / "ansible_collections/mixtral/tpu"
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(collection, filter="data")
    checked = subprocess.run(
        [BIN / "ansible-test", "sanity", f"--python={PYTHON}", "--color=no"]
        + [f"--skip-test={name}" for name in LEFT_OUT],
        # ansible-test keeps a virtual environment in the user's home.
        cwd=collection, env=os.environ | {"HOME": str(tmp_path)}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    print(checked.stdout)
    assert checked.returncode == 0
