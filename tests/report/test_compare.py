import numpy as np
import pytest

from report.compare import ratio, table


def test_the_ratio_is_that_of_the_medians_and_lies_in_its_spread() -> None:
    generator = np.random.default_rng(1)
    base = list(1 + 0.1 * generator.random(200))
    twice = list(2 * (1 + 0.1 * generator.random(200)))
    found, low, high = ratio(base, twice)
    assert found == pytest.approx(np.median(twice) / np.median(base))
    assert low < 2 < high
    assert high - low < 0.05
    # One step that compiled changes nothing.
    assert ratio(base, [*twice, 500.0])[0] == pytest.approx(found, rel=0.005)


def test_steps_that_are_all_alike_have_no_spread() -> None:
    assert ratio([1.0] * 5, [3.0] * 9) == (3.0, 3.0, 3.0)


def test_two_steps_have_no_ratio() -> None:
    assert ratio([1.0] * 9, [1.0] * 2) is None
    assert ratio([], [1.0] * 9) is None


def test_a_table_has_columns() -> None:
    rows = [("", ["a", "long one"]), ("time", ["1 s", "2 s"]), ("none", [])]
    assert table(rows) == ["        a    long one", "  time  1 s  2 s", "  none"]
