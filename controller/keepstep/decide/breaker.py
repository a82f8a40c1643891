"""How much may be out of service at once: of the fleet, of a rack, of a job.

One node always may, else a share; and newly, within a while, half of that. The bounds hold for what keepstep
takes out by itself: a person may cordon as much as they like, which counts against what keepstep may. Nothing
is queued behind the breaker: whoever needs to go and may not still needs it at the next look, or no longer.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from keepstep.core.ids import JobId, Node
from keepstep.core.rules import Bounds
from keepstep.decide.life import Life


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What the shares are of."""

    fleet: int
    racks: Mapping[str, int] = field(default_factory=dict)
    jobs: Mapping[JobId, int] = field(default_factory=dict)  # nodes of each that runs


@dataclass(slots=True, kw_only=True)
class Room:
    """Counted once from all lives, then kept up as nodes are let go."""

    bounds: Bounds
    sizes: Sizes
    out: dict[str, int] = field(default_factory=dict)
    soon: dict[str, int] = field(default_factory=dict)

    @classmethod
    def counted(cls, lives: Iterable[Life], bounds: Bounds, sizes: Sizes, now: float) -> "Room":
        room = cls(bounds=bounds, sizes=sizes)
        for life in lives:
            if life.out_at is None:
                continue
            soon = now - life.out_at < bounds.soon_s
            for key in _keys(life.out_rack, life.out_job):
                if not life.works:
                    room.out[key] = room.out.get(key, 0) + 1
                if soon:
                    room.soon[key] = room.soon.get(key, 0) + 1
        return room

    def held(self, node: Node, rack: str, job: JobId | None) -> str:
        """Why one more may not go now, or nothing."""
        for key in _keys(rack, job):
            size, name = self._size(key)
            most = max(1, int(self.bounds.share * size))
            if self.out.get(key, 0) >= most:
                return f"the breaker holds {node}: {self.out[key]} of {size} nodes of {name} are out already"
            newly = max(1, int(self.bounds.share_soon * size))
            if self.soon.get(key, 0) >= newly:
                minutes = self.bounds.soon_s / 60
                return f"the breaker holds {node}: {self.soon[key]} of {name} went within {minutes:g} min"
        return ""

    def take(self, rack: str, job: JobId | None) -> None:
        for key in _keys(rack, job):
            self.out[key] = self.out.get(key, 0) + 1
            self.soon[key] = self.soon.get(key, 0) + 1

    def _size(self, key: str) -> tuple[int, str]:
        kind, _, name = key.partition(":")
        if kind == "rack":
            return self.sizes.racks.get(name, 0), f"rack {name}"
        if kind == "job":
            return self.sizes.jobs.get(JobId(name), 0), name
        return self.sizes.fleet, "the fleet"


def _keys(rack: str, job: JobId | None) -> list[str]:
    return ["fleet", *([f"rack:{rack}"] if rack else []), *([f"job:{job}"] if job is not None else [])]
