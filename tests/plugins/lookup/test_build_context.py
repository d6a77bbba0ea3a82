"""The identity of an image: when it changes and when not."""

import pytest
from ansible.errors import AnsibleLookupError
from ansible_collections.mixtral.tpu.plugins.lookup.build_context import hash_files, list_files


@pytest.fixture
def tree(tmp_path):
    (tmp_path / "trainer/presets").mkdir(parents=True)
    (tmp_path / "trainer/loop.py").write_text("step()\n")
    (tmp_path / "trainer/presets/tiny.json").write_text("{}\n")
    (tmp_path / "Dockerfile").write_text("FROM scratch\n")
    return tmp_path


def identity(tree):
    return hash_files(tree, list_files(tree, ["trainer", "Dockerfile"]))


def test_files_are_listed_once_and_in_order(tree):
    paths = ["trainer/presets", "trainer", "Dockerfile"]
    assert list_files(tree, paths) == ["Dockerfile", "trainer/loop.py", "trainer/presets/tiny.json"]


def test_what_tools_leave_behind_changes_nothing(tree):
    before = identity(tree)
    (tree / "trainer/__pycache__").mkdir()
    (tree / "trainer/__pycache__/loop.cpython-311.pyc").write_bytes(b"x")
    (tree / "trainer/.loop.py.swp").write_bytes(b"x")
    (tree / "trainer/.cache").mkdir()
    (tree / "trainer/.cache/file").write_bytes(b"x")
    (tree / "trainer/loop.py").touch()
    (tree / "other").write_text("not part of it")
    assert identity(tree) == before


def test_every_real_change_changes_it(tree):
    seen = [identity(tree)]
    (tree / "trainer/loop.py").write_text("step() \n")
    seen.append(identity(tree))
    (tree / "trainer/loop.py").chmod(0o755)
    seen.append(identity(tree))
    (tree / "trainer/loop.py").rename(tree / "trainer/steps.py")
    seen.append(identity(tree))
    (tree / "trainer/empty.py").touch()
    seen.append(identity(tree))
    assert len(set(seen)) == len(seen)


def test_a_path_that_is_not_there_is_named(tree):
    with pytest.raises(AnsibleLookupError, match="trainer/nix"):
        list_files(tree, ["trainer/nix"])
