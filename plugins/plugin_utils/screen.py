"""Lines for people, beside what Ansible's stdout callback prints."""

from __future__ import annotations

from functools import cache

from ansible import constants as C
from ansible.plugins.callback.default import CallbackModule as DefaultCallback
from ansible.plugins.loader import callback_loader
from ansible.utils.display import Display

display = Display()


def show(text: str, color: str | None = None) -> None:
    """Display a line, or several, on stdout, or on stderr where stdout is for programs."""
    display.display(text, color=color, stderr=not stdout_is_for_people())


def show_heading(text: str, color: str) -> None:
    """Display a heading as wide as those of plays and tasks."""
    show(f"\n{text} ".ljust(display.columns + 1, "*"), color)


@cache
def stdout_is_for_people() -> bool:
    """Return whether Ansible's stdout callback is its default one, or one derived from it.

    Others may print a format that further lines would spoil, such as ansible.posix.json.
    """
    callback = callback_loader.get(C.DEFAULT_STDOUT_CALLBACK, class_only=True)
    return issubclass(callback, DefaultCallback)
