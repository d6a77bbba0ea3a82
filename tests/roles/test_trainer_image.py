"""What of an image's archive travels, for both forms that engines write."""

import gzip
import hashlib
import io
import json
import os
import random
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import yaml
from ansible.parsing.dataloader import DataLoader
from ansible.template import Templar

ROOT = Path(__file__).parents[2]
ROLE = ROOT / "roles/trainer_image"
SCRIPT = ROLE / "files/strip_layers.py"
LAYERS = [b"base" * 1000, random.Random(7).randbytes(5_000_000), b"trainer"]
DIGESTS = [hashlib.sha256(layer).hexdigest() for layer in LAYERS]
# The order is the engine's, not that of the image.
NAMES = {
    "by its own ids": ["c3/layer.tar", "a1/layer.tar", "b2/layer.tar"],
    "by digests": [f"blobs/sha256/{digest}" for digest in DIGESTS],
}


def archive(names: list[str]) -> bytes:
    """An archive as `docker save` writes it, with LAYERS under these names."""
    files = dict(sorted(zip(names, LAYERS, strict=True)))
    files |= {"0f.json": b"{}", "manifest.json": b"[{}]", "repositories": b"{}"}
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, content in files.items():
            if "/" in name:
                directory = tarfile.TarInfo(name.rpartition("/")[0])
                directory.type = tarfile.DIRTYPE
                tar.addfile(directory)
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("d4/layer.tar")
        link.type, link.linkname = tarfile.SYMTYPE, f"../{names[0]}"
        tar.addfile(link)
    return stream.getvalue()


def contents(stream: bytes) -> dict[str, bytes | None]:
    """Every member of an archive: its bytes, or None where it is no file."""
    with tarfile.open(fileobj=io.BytesIO(stream)) as tar:
        return {it.name: tar.extractfile(it).read() if it.isfile() else None for it in tar}


def thin(stream: bytes, *held: str) -> subprocess.CompletedProcess[bytes]:
    arguments = [f"sha256:{digest}" for digest in held]
    return subprocess.run([sys.executable, SCRIPT, *arguments], input=stream, capture_output=True)


@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
@pytest.mark.parametrize("held", [[], [0], [0, 1], [0, 1, 2]])
def test_only_layers_that_are_held_are_left_out(names, held):
    whole = archive(names)
    ran = thin(whole, *(DIGESTS[it] for it in held))
    assert ran.returncode == 0, ran.stderr
    left_out = {names[it] for it in held}
    assert contents(gzip.decompress(ran.stdout)) == {
        name: content for name, content in contents(whole).items() if name not in left_out
    }


@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
@pytest.mark.parametrize("held", [[], [0, 1]])
def test_an_archive_that_breaks_off_is_an_error(names, held):
    assert thin(archive(names)[:800_000], *(DIGESTS[it] for it in held)).returncode == 1


def test_an_empty_archive_is_an_error():
    assert thin(b"").returncode == 1


def template(file: str, name: str, role: Path = ROLE, /, **variables: object) -> str:
    """The command of the task ``name`` in a file of the role that stands in ``role``."""
    loader = DataLoader()
    of_role, tasks = (
        loader.load_from_file(str(ROLE / path), trusted_as_template=True)
        for path in ("vars/main.yml", file)
    )
    steps = {step["name"]: step for task in tasks for step in task.get("block", [task])}
    own = {"role_path": str(role), "ansible_playbook_python": sys.executable}
    templar = Templar(loader, variables=of_role | own | variables)
    return templar.template(steps[name]["mixtral.tpu.run_with_progress"]["cmd"])


@pytest.mark.parametrize("installed", [False, True])
def test_an_image_is_labelled_with_the_version_that_builds_it(tmp_path, installed):
    if installed:
        root, version = tmp_path, "7.8.9"
        (root / "MANIFEST.json").write_text(json.dumps({"collection_info": {"version": version}}))
    else:
        root, version = ROOT, yaml.safe_load((ROOT / "galaxy.yml").read_text())["version"]
    role = root / "roles/trainer_image"
    role.mkdir(parents=True, exist_ok=True)
    command = template(
        "tasks/build.yml", "Build {{ trainer_image__reference }}", role,
        trainer_image_name="trainer", trainer_image_stack="release", trainer_image_sources={},
        trainer_image_dockerfile="Dockerfile", trainer_image_base="debian",
        trainer_image__context={"sha256": "0"}, trainer_image__client="docker",
        trainer_image__pulled_base={}, trainer_image__found_bases={},
    )  # fmt: skip
    words = shlex.split(command)
    labels = [words[at + 1] for at, word in enumerate(words) if word == "--label"]
    assert f"org.opencontainers.image.version={version}" in labels


def test_an_archive_that_an_interrupted_playbook_still_writes_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    command = template(
        "tasks/ship.yml", "Archive the layers that workers lack",
        trainer_image_name="trainer", trainer_image_stack="release",
        trainer_image__found={"images": [{"RootFS": {"Layers": []}}]},
        trainer_image__images_of_workers=[[]],
    )  # fmt: skip

    (tmp_path / "mixtral-tpu").mkdir()
    image, docker = tmp_path / "image.tar", tmp_path / "docker"
    image.write_bytes(archive(NAMES["by digests"]))
    docker.write_text(f"#!/bin/sh\nsleep 0.5; cat {image}\n")
    docker.chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    saves = [subprocess.Popen(["sh", "-c", command], cwd=ROLE, env=env) for _ in range(2)]
    assert [save.wait(20) for save in saves] == [0, 0]
    (made,) = (tmp_path / "mixtral-tpu").iterdir()
    assert contents(gzip.decompress(made.read_bytes())) == contents(image.read_bytes())
