"""Which firing of which optimizer completes a step."""

import pytest

from keepstep.agent.hook.keepstep_marks import Steps


class Optimizer:
    pass


def counted(pattern: str, *, gone: str = "") -> list[int]:
    """Steps known after each firing; a letter is an optimizer."""
    held = {letter: Optimizer() for letter in pattern}
    steps = Steps()
    known: list[int] = []
    for at, letter in enumerate(pattern):
        before = known[-1] if known else 0
        known.append(before + steps.fired(held[letter]) + steps.ended())
        if letter in gone and letter not in pattern[at + 1 :]:
            del held[letter]
    return known


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("aaaa", [0, 2, 3, 4]),  # that the first one was a whole step is known when it comes again
        ("ababab", [0, 0, 1, 2, 2, 3]),
        ("abbbabbb", [0, 0, 0, 0, 1, 1, 1, 2]),
        ("abcabcabc", [0, 0, 0, 1, 1, 2, 2, 2, 3]),
        ("ababaab", [0, 0, 1, 2, 2, 4, 4]),  # b was left out once: four times a is four steps
    ],
)
def test_patterns(pattern: str, expected: list[int]) -> None:
    assert counted(pattern) == expected


def test_an_optimizer_that_is_gone_has_a_successor() -> None:
    assert counted("aaabbbb", gone="a")[-1] == 7


def test_an_optimizer_that_is_outlasted_has_a_successor() -> None:
    assert 30 <= counted("a" * 10 + "b" * 30)[-1] <= 40
    assert counted("a" * 10 + "b" * 30)[-1] >= counted("a" * 10 + "b" * 29)[-1] + 1
