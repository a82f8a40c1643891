"""What the beacons of one attempt say, looked at again and again."""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from keepstep.core.beacon import BeaconReader, Point, Record

_LOSSES = 39  # of the last steps, for the judge
_STARTING_S = 600.0  # a script that has not stepped by then is looked at as seldom as one that has


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    stepped: bool = False  # a rank completed a step since the last look
    first: bool = False  # it was a rank's first one: the controller should hear of it at once
    points: tuple[list[Any], ...] = ()  # [step, age_s, loss, grad_norm, tokens_per_s, tflops, mfu]


@dataclass(slots=True)
class Progress:
    """Survives its beacons: the last record of each rank stays when the ranks are gone."""

    records: dict[int, Record] = field(default_factory=dict)  # by global rank
    started_s: float | None = None  # when the ranks were started, or found by this agent
    losses: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=_LOSSES))
    _steps_ns: dict[int, int] = field(default_factory=dict)  # when each rank had stepped, at the last look
    _point_step: int = -1
    _source: int | None = None

    def starting(self, now_s: float) -> bool:
        """Whether a first step is still to come, so that it is worth looking often."""
        if self.started_s is None or now_s - self.started_s > _STARTING_S:
            return False
        return not self.records or any(record.step_ns == 0 for record in self.records.values())

    def refresh(self, beacons: Mapping[int, BeaconReader]) -> None:
        """Take the records as they are now, for a report; what is new is still to be looked at."""
        for rank, beacon in beacons.items():
            if (record := beacon.read()) is not None:
                self.records[rank] = record

    def look(self, beacons: Mapping[int, BeaconReader], now_ns: int, *, points: bool) -> Look:
        self.refresh(beacons)
        stepped = first = False
        for rank, record in self.records.items():
            before_ns = self._steps_ns.get(rank, 0)
            stepped = stepped or record.step_ns != before_ns
            first = first or (record.step_ns != 0 and before_ns == 0)
            self._steps_ns[rank] = record.step_ns
        found = self._points(beacons, now_ns) if points and stepped else ()
        return Look(stepped=stepped, first=first, points=found)

    def _points(self, beacons: Mapping[int, BeaconReader], now_ns: int) -> tuple[list[Any], ...]:
        """New points of the loss curve, from the rank that knows most: not each has the loss."""
        if self._source is None:
            known = {rank: _known(beacon.points(self._point_step)) for rank, beacon in beacons.items()}
            best = max(known, key=lambda rank: (known[rank], -rank), default=None)
            if best is None or known[best] < 0:
                return ()
            # A rank without a loss serves for now; a better one may only be late by a moment.
            self._source = best if known[best] >= _WITH_LOSS else None
            source = best
        else:
            source = self._source
        points = beacons[source].points(self._point_step)
        if points:
            self._point_step = points[-1].step
            self.losses.extend((point.step, point.loss) for point in points if math.isfinite(point.loss))
        return tuple(
            [p.step, (now_ns - p.at_ns) / 1e9, p.loss, p.grad_norm, p.tokens_per_s, p.tflops, p.mfu]
            for p in points
        )


_WITH_LOSS = 16


def _known(points: Sequence[Point]) -> int:
    """How much a rank knows of the newest step; -1: nothing."""
    if not points:
        return -1
    newest = points[-1]
    figures = (newest.grad_norm, newest.tokens_per_s, newest.tflops, newest.mfu)
    return (0 if math.isnan(newest.loss) else _WITH_LOSS) + sum(not math.isnan(figure) for figure in figures)
