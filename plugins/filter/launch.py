"""Filters that turn variables into what the trainer is started with."""

import difflib
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleFilterError


def command_line(flags: dict[str, Any]) -> list[str]:
    """Return ``flags`` as an argument list.

    True becomes a bare ``--flag``; False, None and the empty string are left out, because each of
    them is what the trainer assumes of a flag that it is not given.
    """
    argv = []
    for name, value in flags.items():
        if value is True:
            argv.append(f"--{name}")
        elif value is not False and value not in (None, ""):
            argv += [f"--{name}", str(value)]
    return argv


def preset_file(name: str, directory: str) -> str:
    """Return the absolute path of the JSON file that ``name`` means.

    ``name`` is a file (anything with a slash or ending in .json; relative to where ansible-playbook
    was started) or a preset in ``directory``. Raises AnsibleFilterError when there is no such file.
    """
    if "/" in name or name.endswith(".json"):
        path = Path(name).expanduser().absolute()
        if not path.is_file():
            raise AnsibleFilterError(f"{name!r}: there is no file {path}")
        return str(path)
    presets = {path.stem: path for path in sorted(Path(directory).resolve().glob("mixtral-*.json"))}
    if name not in presets:
        close = difflib.get_close_matches(name, presets, 1)
        raise AnsibleFilterError(
            f"{name!r} is no preset. {f'Did you mean {close[0]}? ' if close else ''}"
            f"Presets: {', '.join(presets)}. For a file of your own, give its path."
        )
    return str(presets[name])


class FilterModule:
    """Registers the filters."""

    def filters(self) -> dict[str, Any]:
        """Return the filters by name."""
        return {"command_line": command_line, "preset_file": preset_file}
