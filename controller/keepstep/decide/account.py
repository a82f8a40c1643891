"""Where a job's slot-seconds went: every one in exactly one bucket, tied to the incident that cost it.

The control loop records moments; between two of them every slot of the gang is in one bucket and every spare
stands by. Sums are whole microseconds, so that the buckets add up to slots x time exactly.

    waiting       queued: counted with the slots it asks for, though it holds none
    starting      from a placement that follows no incident to its first step
    productive    steps that nobody had done before
    replayed      steps that were done before and lost
    detecting     from the failure to the verdict
    recovering    from the verdict to the next attempt's first step
    idle          held, but asked by a person or by growth to end
    checkpoint stall, straggling    taken out of the attempt's productive, then replayed time
    unobserved    no controller was there to see
    standby       spares

Moments come in the order in which they were recorded. A wall clock that steps back does not undo time: such a
moment counts as simultaneous with the one before it. Only `failed` lies in the past: at the failure's time,
but not before its attempt was placed.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from keepstep.core.ids import Attempt

Kind = Literal[
    "submitted",
    "placed",
    "went",
    "stepped",  # the first step of an attempt
    "progressed",  # past the newest step that any earlier attempt completed
    "failed",
    "detected",
    "stopping",
    "dead",
    "queued",
    "suspended",
    "finished",
    "stall",
    "straggled",
    "unobserved",
]
BUCKETS = (
    "productive",
    "replayed",
    "starting",
    "checkpoint stall",
    "detecting",
    "recovering",
    "straggling",
    "waiting",
    "standby",
    "unobserved",
    "idle",
)
_TAKEN = {"stall": "checkpoint stall", "straggled": "straggling"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    at_s: float  # on one axis for the whole job
    kind: Kind
    attempt: Attempt | None = None
    step: int | None = None  # of stepped and progressed, for people
    slots: int = 0  # of submitted and queued: asked for; of placed: held by the gang
    spare_slots: int = 0
    incident: int | None = None
    seconds: float = 0.0  # of stall, straggled and unobserved: how long, ending at `at_s`


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger:
    """Slot-microseconds, so that sums are exact; seconds for people."""

    buckets: Mapping[str, int]
    incidents: Mapping[int, Mapping[str, int]]
    total: int

    def slot_s(self, bucket: str) -> float:
        return self.buckets[bucket] / 1e6

    @property
    def total_slot_s(self) -> float:
        return self.total / 1e6

    @property
    def held(self) -> int:
        """What the gang held; neither the time in the queue nor spares."""
        return self.total - self.buckets["waiting"] - self.buckets["standby"]

    @property
    def goodput(self) -> float:
        """Productive share of what the gang held; 0 before it held anything."""
        return self.buckets["productive"] / self.held if self.held else 0.0

    @property
    def goodput_with_spares(self) -> float:
        with_spares = self.held + self.buckets["standby"]
        return self.buckets["productive"] / with_spares if with_spares else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Slot-seconds by bucket and by incident, and both goodputs, as plain JSON."""
        return {
            "buckets": {bucket: slot_us / 1e6 for bucket, slot_us in self.buckets.items()},
            "incidents": {
                str(incident): {bucket: slot_us / 1e6 for bucket, slot_us in cost.items()}
                for incident, cost in self.incidents.items()
            },
            "total": self.total_slot_s,
            "goodput": self.goodput,
            "goodput_with_spares": self.goodput_with_spares,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class _Now:
    """What every slot is doing from one moment to the next."""

    bucket: str = ""  # "": neither asked for nor held
    slots: int = 0
    spare_slots: int = 0
    attempt: Attempt | None = None
    incident: int | None = None
    trained: bool = False  # some attempt stepped
    behind: bool = False  # an earlier attempt stepped, and this one has not come past it yet


@dataclass(slots=True, kw_only=True)
class _Sums:
    by: dict[tuple[str, Attempt | None, int | None], int] = field(default_factory=dict)
    total: int = 0

    def add(self, bucket: str, attempt: Attempt | None, incident: int | None, slot_us: int) -> None:
        if slot_us:
            key = (bucket, attempt, incident)
            self.by[key] = self.by.get(key, 0) + slot_us

    def take(self, bucket: str, moment: Moment, slot_us: int) -> None:
        """Out of the attempt's training time, no more than there is."""
        for source in ("productive", "replayed"):
            for key in [key for key in self.by if key[0] == source and key[1] == moment.attempt]:
                taken = min(slot_us, self.by[key])
                self.by[key] -= taken
                self.add(bucket, moment.attempt, moment.incident, taken)
                slot_us -= taken


def ledger(moments: Iterable[Moment], until_s: float) -> Ledger:
    """The account of a job up to `until_s` on the moments' axis; moments after it are left out."""
    until = _us(until_s)
    timeline = [(at, moment) for at, moment in _ordered(list(moments)) if at <= until]
    away = _away(timeline)
    sums, now, since = _Sums(), _Now(), timeline[0][0] if timeline else until
    held: dict[Attempt | None, int] = {}
    for at, moment in timeline:
        _spend(sums, now, since, at, away)
        now, since = _next(now, moment), at
        if moment.kind == "placed":
            held[moment.attempt] = moment.slots
    _spend(sums, now, since, until, away)
    for _, moment in timeline:
        if moment.kind in _TAKEN:
            slots = held.get(moment.attempt, 0)
            sums.take(_TAKEN[moment.kind], moment, max(_us(moment.seconds), 0) * slots)
    return _ledger(sums)


def _ordered(moments: Sequence[Moment]) -> list[tuple[int, Moment]]:
    """Each moment with its time in microseconds: as recorded, failures moved back to where they belong."""
    now = placed = 0
    timed: list[tuple[int, int, Moment]] = []
    for index, moment in enumerate(moments):
        at = _us(moment.at_s)
        if index == 0:
            now = placed = at
        if moment.kind == "failed":
            # When the loop noticed is not known here; what follows in the record bounds it from above.
            timed.append((max(at, placed), index, moment))
            continue
        now = max(now, at)
        if moment.kind in ("placed", "stepped"):
            placed = now
        timed.append((now, index, moment))
    latest = now
    capped = [
        (min(at, _following(timed, place, latest)), index, m) for place, (at, index, m) in enumerate(timed)
    ]
    return [(at, moment) for at, _, moment in sorted(capped, key=lambda one: (one[0], one[1]))]


def _following(timed: Sequence[tuple[int, int, Moment]], place: int, latest: int) -> int:
    """When the next moment that is not a failure was recorded."""
    return next((at for at, _, moment in timed[place:] if moment.kind != "failed"), latest)


def _next(now: _Now, moment: Moment) -> _Now:
    match moment.kind:
        case "submitted" | "queued":
            return replace(now, bucket="waiting", slots=moment.slots, spare_slots=0, incident=moment.incident)
        case "placed":
            return replace(
                now,
                bucket="starting" if moment.incident is None else "recovering",
                slots=moment.slots,
                spare_slots=moment.spare_slots,
                attempt=moment.attempt,
                incident=moment.incident,
                behind=now.trained,
            )
        case "stepped" | "progressed" if moment.attempt == now.attempt and now.bucket not in _OVER:
            behind = now.behind and moment.kind == "stepped"
            # A replay is what its incident cost; new steps cost nobody anything.
            return replace(
                now,
                bucket="replayed" if behind else "productive",
                incident=now.incident if behind else None,
                trained=True,
                behind=behind,
            )
        case "failed" if moment.attempt == now.attempt and now.bucket not in _OVER:
            return replace(now, bucket="detecting", incident=moment.incident)
        case "detected" if moment.attempt == now.attempt:
            return replace(now, bucket="recovering", incident=moment.incident)
        case "stopping" if moment.attempt == now.attempt:
            return replace(now, bucket="idle", incident=None)
        case "suspended" | "finished":
            return replace(now, bucket="", slots=0, spare_slots=0, incident=None)
        case _:
            return now


_OVER = frozenset({"detecting", "idle", "waiting", ""})  # late words of an attempt do not bring it back


def _away(timeline: Sequence[tuple[int, Moment]]) -> list[tuple[int, int]]:
    """When no controller was there, as disjoint intervals in order."""
    spans = sorted(
        (at - _us(m.seconds), at) for at, m in timeline if m.kind == "unobserved" and m.seconds > 0
    )
    merged: list[tuple[int, int]] = []
    for start, end in spans:
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def _spend(sums: _Sums, now: _Now, since: int, until: int, away: Sequence[tuple[int, int]]) -> None:
    """From `since` to `until` nothing changed."""
    whole = max(until - since, 0)
    if not now.bucket or not whole:
        return
    unseen = 0
    if now.bucket != "waiting":
        unseen = sum(max(0, min(until, end) - max(since, start)) for start, end in away)
    sums.add(now.bucket, now.attempt, now.incident, now.slots * (whole - unseen))
    sums.add("unobserved", now.attempt, now.incident, now.slots * unseen)
    sums.add("standby", now.attempt, None, now.spare_slots * whole)
    sums.total += (now.slots + now.spare_slots) * whole


def _ledger(sums: _Sums) -> Ledger:
    buckets = dict.fromkeys(BUCKETS, 0)
    incidents: dict[int, dict[str, int]] = {}
    for (bucket, _, incident), slot_us in sums.by.items():
        buckets[bucket] += slot_us
        if incident is not None and slot_us:
            cost = incidents.setdefault(incident, {})
            cost[bucket] = cost.get(bucket, 0) + slot_us
    assert sum(buckets.values()) == sums.total, (buckets, sums.total)
    return Ledger(buckets=buckets, incidents=incidents, total=sums.total)


def _us(seconds: float) -> int:
    return round(seconds * 1e6)
