"""A state machine is one table: (state, event) -> state. What the table does not know raises.

The diagrams of the documents are made from the tables by `mermaid`, so the two cannot disagree.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Generic, TypeVar

S = TypeVar("S", bound=StrEnum)
E = TypeVar("E", bound=StrEnum)


class UnknownTransition(AssertionError):
    """An event came in a state that has no answer to it: a bug, not bad luck."""


@dataclass(frozen=True, slots=True)
class Table(Generic[S, E]):
    noun: str
    first: S
    rows: Mapping[tuple[S, E], S]

    def next(self, state: S, event: E) -> S:
        try:
            return self.rows[state, event]
        except KeyError:
            raise UnknownTransition(f"{self.noun} is {state}: no answer to {event}") from None

    def allows(self, state: S, event: E) -> bool:
        return (state, event) in self.rows

    @property
    def final(self) -> frozenset[S]:
        """States that nothing leaves."""
        left = {state for state, _ in self.rows}
        return frozenset(set(self.rows.values()) - left)

    def mermaid(self) -> str:
        lines = ["stateDiagram-v2", f"    [*] --> {self.first}"]
        lines += [f"    {state} --> {after}: {event}" for (state, event), after in self.rows.items()]
        lines += [f"    {state} --> [*]" for state in sorted(self.final)]
        return "\n".join(lines) + "\n"


def rows(*table: tuple[S | tuple[S, ...], E, S]) -> dict[tuple[S, E], S]:
    """Spell out rows whose left side names several states."""
    spelled: dict[tuple[S, E], S] = {}
    for left, event, after in table:
        for state in left if isinstance(left, tuple) else (left,):
            assert (state, event) not in spelled, (state, event)
            spelled[state, event] = after
    return spelled
