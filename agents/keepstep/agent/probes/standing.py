"""Checks as they stand: since when, and the worst of them first. Pure."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import msgspec

from keepstep.core.health import Level
from keepstep.wire.health import Check

CHECKS_MAX = 128  # of a node; a machine with more than that wrong is known to be wrong
_TEXT_MAX = 300


def check(name: str, component: str, level: Level, value: float, limit: float | None, text: str) -> Check:
    return Check(
        name=name, component=component, level=level, value=round(float(value), 6), limit=limit,
        text=text[:_TEXT_MAX],
    )  # fmt: skip


@dataclass(slots=True)
class Standing:
    """`update` with all that is not well now, every time."""

    now: tuple[Check, ...] = ()
    _since: dict[tuple[str, str], float] = field(default_factory=dict)
    _levels: dict[tuple[str, str], str] = field(default_factory=dict)

    def update(self, found: Iterable[Check], at: float) -> bool:
        """True: one has come, gone, or changed its level: to be told at once."""
        worst = sorted(found, key=lambda each: (each.level != Level.BAD, each.name, each.component))[
            :CHECKS_MAX
        ]
        levels = {(each.name, each.component): each.level for each in worst}
        changed = levels != self._levels
        self._levels = levels
        self._since = {key: self._since.get(key, at) for key in levels}
        self.now = tuple(
            msgspec.structs.replace(each, for_s=round(at - self._since[each.name, each.component], 1))
            for each in worst
        )
        return changed
