"""The derived files are what they are derived from."""

import subprocess
import sys
from pathlib import Path

import yaml

from docs.generate import documents, role_variable, yaml_value
from trainer.arguments import GROUPS
from trainer.flags import AtLeast, Flag, Guide, flags_of

ROOT = Path(__file__).parents[2]


def test_every_derived_file_is_up_to_date():
    checked = subprocess.run(
        [sys.executable, "-m", "docs.generate", "--check"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


def test_a_derived_file_says_so_at_its_top():
    for path, text in documents():
        if path == ROOT / "roles/train/meta/argument_specs.yml":
            assert "written by `make docs` from trainer/arguments.py" in text
        elif path.name == "plan.md":
            assert "Written by `make docs` from trainer/tpu.py" in text
        elif path.suffix != ".json":  # which has no comments
            assert "Written by `make docs` from" in text.splitlines()[0], path


def test_what_is_out_of_date_is_named_and_fails(tmp_path):
    """In a copy, with one flag more."""
    for name in ("docs", "playbooks", "plugins", "roles", "runtime", "trainer"):
        copied = subprocess.run(["cp", "-r", ROOT / name, tmp_path], check=False)
        assert copied.returncode == 0
    arguments = tmp_path / "trainer/arguments.py"
    seed = "    seed: Annotated["
    text = arguments.read_text().replace(
        seed, f'    made_up_flag: Annotated[float, "Weight of `z`.", AtLeast(0)] = 0.0\n{seed}'
    )
    arguments.write_text(text)

    def generate(*options):
        return subprocess.run(
            [sys.executable, "-m", "docs.generate", *options],
            cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip

    checked = generate("--check")
    assert checked.returncode == 1
    names = [line.partition(":")[0] for line in checked.stdout.splitlines()]
    assert names == [
        "roles/train/vars/main/flags.yml",
        "roles/train/meta/argument_specs.yml",
        "roles/train/defaults/main/flags.yml",
        "roles/mixtral/defaults/main/flags.yml",
    ]
    assert generate().returncode == 0
    assert generate("--check").stdout == ""
    page = (tmp_path / "docs/variables.md").read_text()
    assert "| `made_up_flag` | float | `0.0` | Weight of `z`. |" in page
    assert "`train_made_up_flag`" in page


def flag(**changes) -> Flag:
    fields = {
        "name": "steps", "kind": int, "optional": False, "default": 8, "help": "How many `n`.",
        "least": AtLeast(1).value, "alias": None, "guide": None,
    }  # fmt: skip
    return Flag(**fields | changes)


def test_a_flag_becomes_a_variable():
    made = role_variable(flag(guide=Guide(32), alias="count"))
    assert (made["type"], made["choices"], made["filter"]) == ("int", [], " | int")
    assert made["description"] == "How many C(n)."
    assert made["public"] == "mixtral_count | default(steps | default(32), true)"


def test_what_is_not_given_is_null_or_empty():
    made = role_variable(flag(optional=True, default=None))
    assert (made["public"], made["filter"]) == ("steps | default(none)", "")
    made = role_variable(flag(kind=Path, optional=True, default=None))
    assert made["public"] == "steps | default('')"
    made = role_variable(flag(kind=bool, default=False))
    assert (made["public"], made["filter"]) == ("steps | default(false)", " | bool")


def test_a_value_is_written_as_yaml_reads_it():
    for value in (None, True, 0, 5e-5, "no", "steps", "", ["", "no", "yes", "a: b"]):
        assert yaml.safe_load(yaml_value(value) or "null") == value


def test_a_help_text_is_a_sentence():
    for group in GROUPS:
        for one in flags_of(group):
            assert one.help[0].isupper() or one.help[0] == "`", one.name
            assert one.help.endswith("."), one.name
            assert "%" not in one.help, one.name
