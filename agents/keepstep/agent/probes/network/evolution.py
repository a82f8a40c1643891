"""From counters of links to what is not well. Pure."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from keepstep.agent.probes.network.source import Interface, Port
from keepstep.agent.probes.network.thresholds import Thresholds
from keepstep.agent.probes.rates import Rate
from keepstep.agent.probes.standing import check
from keepstep.core.health import Level
from keepstep.wire.health import Check


@dataclass(slots=True)
class _Past:
    errors: Rate = field(default_factory=lambda: Rate(60.0))
    changes: Rate = field(default_factory=lambda: Rate(3600.0))
    was_up: bool = False


class Evolution:
    def __init__(self, thresholds: Thresholds | None = None) -> None:
        self._limits = thresholds or Thresholds()
        self._past: dict[str, _Past] = {}
        self._unreachable: dict[str, int] = {}  # buddy -> tries in a row

    def take(
        self, links: Iterable[Interface], ports: Iterable[Port], training: str, at: float
    ) -> tuple[Check, ...]:
        """`training`: the interface that ranks talk over; "" where it is not known."""
        found = [*self._links(links, training, at), *self._ports(ports, at)]
        return tuple(found)

    def reached(self, tries: Mapping[str, str]) -> tuple[Check, ...]:
        """Buddy -> why it was not reached; "" where it was."""
        self._unreachable = {
            buddy: self._unreachable.get(buddy, 0) + 1 for buddy, why in tries.items() if why
        }
        return tuple(
            check(
                "network.buddy_unreachable", buddy, Level.WARN, times, self._limits.unreachable,
                f"its carrier was not reached {times} times in a row: {tries[buddy]}",
            )
            for buddy, times in self._unreachable.items()
            if times >= self._limits.unreachable
        )  # fmt: skip

    def _links(self, links: Iterable[Interface], training: str, at: float) -> Iterator[Check]:
        limits = self._limits
        for link in links:
            if not link.physical and link.name != training:
                continue  # bridges and the like come and go with containers
            past = self._past.setdefault(link.name, _Past())
            down = link.state in {"down", "lowerlayerdown", "notpresent"}
            past.was_up = past.was_up or link.state == "up"
            if down and (past.was_up or link.name == training):
                level = Level.BAD if link.name == training else Level.WARN
                yield check("network.link_down", link.name, level, 1, 0, f"its state is {link.state}")
            errors = past.errors.take(at, link.errors)
            if errors > limits.errors_per_min:
                text = f"{errors:.0f} within a minute"
                yield check("network.errors", link.name, Level.WARN, errors, limits.errors_per_min, text)
            flaps = past.changes.take(at, link.carrier_changes) / 2
            if flaps > limits.flaps_per_h:
                text = f"down and up {flaps:.0f} times within an hour"
                yield check("network.flaps", link.name, Level.WARN, flaps, limits.flaps_per_h, text)

    def _ports(self, ports: Iterable[Port], at: float) -> Iterator[Check]:
        limits = self._limits
        for port in ports:
            past = self._past.setdefault(port.name, _Past())
            past.was_up = past.was_up or port.active
            if past.was_up and not port.active:
                yield check(
                    "network.link_down", port.name, Level.BAD, 1, 0, "the port is not active any more"
                )
            errors = past.errors.take(at, port.errors)
            if errors > limits.infiniband_per_min:
                text = f"{errors:.0f} within a minute"
                yield check(
                    "network.infiniband", port.name, Level.WARN, errors, limits.infiniband_per_min, text
                )
            flaps = past.changes.take(at, port.downed)
            if flaps > limits.flaps_per_h:
                text = f"down {flaps:.0f} times within an hour"
                yield check("network.flaps", port.name, Level.WARN, flaps, limits.flaps_per_h, text)
