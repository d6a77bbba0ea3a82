"""Command-line flags from dataclasses: one flag for each field, described by its annotation.

``steps: Annotated[int, "How many steps.", AtLeast(1)] = 10`` is the flag ``--steps``. A field
without a default is required. Hugging Face's HfArgumentParser does the like, with transformers.
"""

import argparse
import dataclasses
import difflib
import math
import types
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Union, get_args, get_origin, get_type_hints

_BOOLEANS = {"true": True, "false": False, "yes": True, "no": False, "1": True, "0": False}


class BadInput(ValueError):
    """Something the user gave cannot work; the message says what, and what to do about it."""


class AtLeast(NamedTuple):
    """The smallest value that a number may have."""

    value: float


class Alias(NamedTuple):
    """Another name of the flag; only one of the two may be given."""

    name: str


class Guide(NamedTuple):
    """The flag's value on the guide's command line, where it is not the default."""

    value: Any


class Flag(NamedTuple):
    """A field of a dataclass as a flag."""

    name: str
    kind: Any  # Path, str, int, float, bool or a Literal of strings
    optional: bool  # whether the field may be None
    default: Any  # dataclasses.MISSING for a required flag
    help: str
    least: float  # -inf where any number is allowed
    alias: str | None
    guide: Guide | None

    @property
    def choices(self) -> tuple[str, ...]:
        """The texts that a Literal may be, none for another kind."""
        return get_args(self.kind)


def flags_of(group: type) -> Iterator[Flag]:
    """Yield the flags that the dataclass ``group`` describes, in its order."""
    hints = get_type_hints(group, include_extras=True)
    for field in dataclasses.fields(group):
        kind, help_text, *marks = get_args(hints[field.name])
        optional = get_origin(kind) in (types.UnionType, Union)
        marked = {type(mark): mark for mark in marks}
        yield Flag(
            name=field.name,
            kind=get_args(kind)[0] if optional else kind,
            optional=optional,
            default=field.default,
            help=help_text,
            least=marked.get(AtLeast, AtLeast(-math.inf)).value,
            alias=marked[Alias].name if Alias in marked else None,
            guide=marked.get(Guide),
        )


def parse_flags(argv: list[str], prog: str, groups: Iterable[type]) -> list[Any]:
    """Return one instance of each dataclass in ``groups``, filled from ``argv``.

    Fields are Path, str, int, float, bool or a Literal of strings, or one of them ``| None``.
    Raises BadInput for an unknown or missing flag and for a value its field does not allow.
    """
    # Absent flags stay absent: the dataclasses alone hold the defaults.
    parser = _Parser(prog=prog, argument_default=argparse.SUPPRESS, allow_abbrev=False)
    known, aliases = [], {}
    for group in groups:
        section = parser.add_argument_group(group.__doc__)
        for flag in flags_of(group):
            known.append(f"--{flag.name}")
            options: dict[str, Any] = {"type": _converter(flag), "help": flag.help}
            if flag.default not in (dataclasses.MISSING, None, "", False):
                options["help"] += f" (default: {flag.default})"
            if choices := _choices(flag.kind):
                options["metavar"] = f"{{{','.join(choices)}}}"
            if flag.kind is bool:
                options |= {"nargs": "?", "const": True}
            section.add_argument(f"--{flag.name}", **options)
            if flag.alias:
                known.append(f"--{flag.alias}")
                aliases[flag.alias] = flag.name
                options["help"] = f"Another name of --{flag.name}."
                section.add_argument(f"--{flag.alias}", **options)
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        raise BadInput(
            f"unknown argument {unknown[0]!r}.{did_you_mean(unknown[0].partition('=')[0], known)} "
            "--help lists all flags"
        )
    given = vars(namespace)
    for alias in aliases.keys() & given.keys():
        name, value = aliases[alias], given.pop(alias)
        if name in given:
            raise BadInput(
                f"--{alias} {value} and --{name} {given[name]} are given together, but they are "
                "two names of one flag; give one of them"
            )
        given[name] = value
    return [_fill(group, given) for group in groups]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `` Did you mean X?`` for the known name most like ``name``, or nothing if none is."""
    matches = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {matches[0]}?" if matches else ""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise BadInput(message.removeprefix("argument "))


def _fill(group: type, given: dict[str, Any]) -> Any:
    fields = dataclasses.fields(group)
    missing = [
        f"--{field.name}"
        for field in fields
        if field.default is dataclasses.MISSING and field.name not in given
    ]
    if missing:
        raise BadInput(f"{' and '.join(missing)} missing; --help says what to give")
    return group(**{field.name: given[field.name] for field in fields if field.name in given})


def _choices(kind: Any) -> dict[str, Any]:
    """Return the texts that a boolean or a Literal may be given as, with what they mean."""
    return _BOOLEANS if kind is bool else {choice: choice for choice in get_args(kind)}


def _converter(flag: Flag) -> Callable[[str], Any]:
    """Return the function that turns a flag's text into a value of its kind."""
    kind, least = flag.kind, flag.least
    choices = _choices(kind)

    def choice(text: str) -> Any:
        if text.lower() not in choices:
            allowed = ", ".join(map(repr, choices))
            raise argparse.ArgumentTypeError(f"{text!r} is not allowed; allowed are {allowed}")
        return choices[text.lower()]

    def number(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or value < least:
            name = "an integer" if kind is int else "a number"
            bound = f", at least {least}" if math.isfinite(least) else ""
            raise argparse.ArgumentTypeError(f"{text!r} is not allowed; it must be {name}{bound}")
        return value

    def path(text: str) -> Path:
        if not text:
            raise argparse.ArgumentTypeError("is empty; give a path, or leave the flag out")
        if "://" in text:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not allowed; it must be a path of this host. Mount a bucket to read "
                "from it; --checkpoint_bucket writes checkpoints to one"
            )
        return Path(text).expanduser()

    return choice if choices else {int: number, float: number, Path: path}.get(kind, str)
