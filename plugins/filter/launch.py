"""Filters that turn variables into the trainer's arguments and files."""

import difflib
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleFilterError


def command_line(flags: dict[str, Any]) -> list[str]:
    """Return ``flags`` as an argument list.

    True becomes ``--flag`` without a value. False, None and the empty string are left out, because
    each is what the trainer assumes without the flag.
    """
    argv = []
    for name, value in flags.items():
        if value is True:
            argv.append(f"--{name}")
        elif value is not False and value not in (None, ""):
            argv += [f"--{name}", str(value)]
    return argv


def preset_file(name: str, directory: str) -> str:
    """Return the absolute path of a JSON file: a user's own, or a preset in ``directory``.

    A ``name`` with a slash or with the ending .json is a path, relative to the directory in which
    ansible-playbook was started. Raises AnsibleFilterError if there is no such file.
    """
    if "/" in name or name.endswith(".json"):
        path = Path(name).expanduser().absolute()
        if not path.is_file():
            raise AnsibleFilterError(
                f"{name!r}: there is no file {path}. Correct the path, or give the name of a preset"
            )
        return str(path)
    presets = {path.stem: path for path in sorted(Path(directory).resolve().glob("mixtral-*.json"))}
    if name not in presets:
        close = difflib.get_close_matches(name, presets, 1)
        raise AnsibleFilterError(
            f"{name!r} is no preset. {f'Did you mean {close[0]}? ' if close else ''}"
            f"The presets are {', '.join(presets)}; a file of your own is given by its path."
        )
    return str(presets[name])


class FilterModule:
    """Registers the filters."""

    def filters(self) -> dict[str, Any]:
        """Return the filters by name."""
        return {"command_line": command_line, "preset_file": preset_file}
