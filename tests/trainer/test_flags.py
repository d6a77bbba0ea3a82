from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest

from trainer.flags import Alias, AtLeast, BadInput, Guide, flags_of, parse_flags


@dataclass(frozen=True, kw_only=True)
class Walk:
    """Where to go"""

    to: Annotated[Path, "the end"]
    steps: Annotated[int, "how many", AtLeast(1), Guide(20), Alias("strides")] = 10
    pace: Annotated[float, "how fast", AtLeast(0)] = 1.5
    shoes: Annotated[Literal["", "boots"], "on the feet"] = ""
    back: Annotated[bool, "and return"] = False


@dataclass(frozen=True, kw_only=True)
class Weather:
    """What it is like"""

    rain: Annotated[str, "how much"] = "none"
    map: Annotated[Path | None, "a map"] = None


def parse(*argv: str) -> tuple[Walk, Weather]:
    return tuple(parse_flags(list(argv), "walk", (Walk, Weather)))


def test_absent_flags_have_the_defaults_of_the_dataclass() -> None:
    assert parse("--to", "sea") == (Walk(to=Path("sea")), Weather())


def test_flags_reach_their_group_with_their_type() -> None:
    walk, weather = parse(
        *("--to=~/sea", "--steps", "3", "--pace", "2", "--shoes", "boots", "--back"),
        *("--rain", "", "--map", "m"),
    )
    assert walk == Walk(to=Path.home() / "sea", steps=3, pace=2.0, shoes="boots", back=True)
    assert weather == Weather(rain="", map=Path("m"))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *((text, True) for text in ("true", "yes", "1", "True")),
        *((text, False) for text in ("false", "no", "0", "False")),
    ],
)
def test_booleans_take_a_value(text: str, value: bool) -> None:
    assert parse("--to", "sea", "--back", text)[0].back is value
    assert parse("--to", "sea", f"--back={text}")[0].back is value


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--back", "maybe"], ["--back", "'maybe'", "'true', 'false', 'yes', 'no', '1', '0'"]),
        (["--steps", "0"], ["--steps", "'0'", "an integer, at least 1"]),
        (["--steps", "2.5"], ["--steps", "'2.5'", "an integer"]),
        (["--pace", "nan"], ["--pace", "'nan'", "a number"]),
        (["--pace", "inf"], ["--pace", "'inf'"]),
        (["--shoes", "skis"], ["--shoes", "'skis'", "'boots'"]),
        (["--map", ""], ["--map", "empty"]),
        (["--map", "gs://bucket/map"], ["--map", "'gs://bucket/map'", "it must be a path"]),
        (["--steps"], ["--steps", "expected one argument"]),
        (["--stepz", "3"], ["'--stepz'", "Did you mean --steps?"]),
        (["--step", "3"], ["'--step'", "Did you mean --steps?"]),
        (["--stepz=3"], ["Did you mean --steps?"]),
        (["--qqq"], ["'--qqq'", "--help"]),
        (["--stridez", "3"], ["'--stridez'", "Did you mean --strides?"]),
        (["--strides", "0"], ["--strides", "'0'", "an integer, at least 1"]),
        (
            ["--strides", "3", "--steps", "3"],
            ["--strides 3 and --steps 3 are given", "give one of"],
        ),
        (["stray"], ["'stray'"]),
    ],
)
def test_what_is_wrong_is_said(argv: list[str], said: list[str]) -> None:
    with pytest.raises(BadInput) as caught:
        parse("--to", "sea", *argv)
    for part in said:
        assert part in str(caught.value)


def test_a_flag_has_another_name() -> None:
    assert parse("--to", "sea", "--strides", "3") == parse("--to", "sea", "--steps", "3")


def test_the_guides_value_is_no_default() -> None:
    steps = {flag.name: flag for flag in flags_of(Walk)}["steps"]
    assert (steps.default, steps.guide, steps.least) == (10, Guide(20), 1)
    assert parse("--to", "sea")[0].steps == 10


def test_a_missing_flag_is_named() -> None:
    with pytest.raises(BadInput, match="--to missing"):
        parse()


def test_a_misspelt_required_flag_is_called_misspelt_rather_than_missing() -> None:
    with pytest.raises(BadInput, match="Did you mean --to"):
        parse("--too", "sea")


def test_help_lists_groups_flags_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse("--help")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "Another name of --steps" in text
    for part in ("Where to go", "What it is like", "--steps", "how many (default: 10)", "{,boots}"):
        assert part in text
