"""What is known of UNet calls' costs, however many sizes there are, and while another thread measures."""

from __future__ import annotations

import pytest

from diffuserve.engine import Group, StepCosts

ONE = Group("a", 64, 64)


def sizes(count: int) -> list[Group]:
    return [Group("a", 512 + 8 * (number % 64), 512 + 8 * (number // 64)) for number in range(count)]


def test_sizes_measured_long_ago_are_forgotten_whole_and_can_be_measured_again() -> None:
    known, others = StepCosts(), sizes(4100)
    for rows, seconds in ((2, 0.2), (4, 0.3)):
        known.observe(ONE, rows, seconds)
    for group in others:
        known.observe(group, 2, 0.5)
    assert [known.seconds(group, 2) for group in others[-512:]] == pytest.approx([0.5] * 512)
    assert known.seconds(ONE, 2) == pytest.approx(0.5 * ONE.pixels / others[-512].pixels, rel=0.1), "of a like size"
    assert known.efficient_rows(ONE, 16, 0.9) == 16
    for rows, seconds in ((4, 0.3), (2, 0.2)):
        known.observe(ONE, rows, seconds)
    assert known.seconds(ONE, 3) == pytest.approx(0.25)


def test_a_size_that_is_measured_all_the_time_is_never_forgotten() -> None:
    known = StepCosts()
    for group in sizes(600):
        known.observe(ONE, 2, 0.2)
        known.observe(ONE, 4, 0.3)
        known.observe(group, 2, 0.5)
    assert known.seconds(ONE, 3) == pytest.approx(0.25)


class Measuring(str):
    """A checkpoint's name during whose comparison the loop measures another size."""

    costs: StepCosts
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        self.costs.observe(Group("a", 4096, 4096), 2, 1.0)
        return str(self) == other


def test_what_is_not_measured_is_estimated_while_a_new_size_is() -> None:
    known, name = StepCosts(), Measuring("a")
    known.observe(ONE, 2, 0.2)
    known.observe(ONE._replace(height=128), 2, 0.4)
    name.costs = known
    assert known.seconds(Group(name, 96, 64), 2) == pytest.approx(0.3)
