"""Lets nodes show that they compute right: before they return, and a whole pool by pairs.

A node that is to return is tried alone, then with a partner that is known to be good; where that fails, with
another one, so that a sick partner or link is not taken for it. What it came to moves its life on.
"""

import asyncio
import logging
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from keepstep.control.health import Validation
from keepstep.control.trials import Came, Trials, figures
from keepstep.core.errors import KeepstepError, NotFound, Refused
from keepstep.core.ids import Node
from keepstep.core.states import WORKING, LifeState
from keepstep.decide.asked import screened as screened_sick
from keepstep.decide.life import Life
from keepstep.decide.screen import Pair, Round, Screened, next_round, rounds_max, screened, told
from keepstep.decide.trial import named
from keepstep.decide.validation import Verdict
from keepstep.store import Writer
from keepstep.store.rows import NewEvent

if TYPE_CHECKING:
    from keepstep.control.fleet import Member
    from keepstep.control.loop import Controller

log = logging.getLogger(__name__)

_PARTNERS = 2  # the second one where it fails with the first
_LOOK_S = 1.0
_START_WITHIN_S = 120.0  # a partner that was idle may get a job meanwhile


@dataclass(slots=True, kw_only=True)
class Screening:
    """One under way, or the last one. It ends with its controller."""

    number: str
    who: str  # asked for it, and so for taking the sick ones out
    nodes: tuple[str, ...]
    rounds: list[Round] = field(default_factory=list)
    reasons: dict[Pair, str] = field(default_factory=dict)  # why it failed
    done: bool = False
    problem: str = ""

    @property
    def found(self) -> Screened:
        return screened(self.nodes, self.rounds)

    @property
    def rounds_max(self) -> int:
        return rounds_max(len(self.nodes))


class Validations:
    def __init__(self, controller: "Controller") -> None:
        self._controller = controller
        self._trials = Trials(controller)
        self._tried: set[tuple[Node, int]] = set()
        self.screening: Screening | None = None

    def reconcile(self) -> None:
        """Try each node that is validating and was not tried in this time out. Called after every look."""
        controller = self._controller
        for node in controller.health.ward.busy:
            life = controller.health.ward.life(node)
            key = node, life.revision
            member = controller.fleet.members.get(node)
            here = member is not None and member.talks(controller.time)
            if life.state is LifeState.VALIDATING and here and key not in self._tried:
                self._tried.add(key)
                controller.begin(self._validate(life))

    # ------------------------------------------------------------ one node

    async def _validate(self, life: Life) -> None:
        controller = self._controller
        try:
            came = await self._came(life)
            if came is not None:
                await controller.health.validation(controller.fleet, life.node, came, controller.write)
        except Refused as problem:
            log.info("%s: its validation came too late: %s", life.node, problem)
        except KeepstepError as problem:
            log.warning("%s: its validation is begun again: %s", life.node, problem)
            self._tried.discard((life.node, life.revision))

    async def _came(self, life: Life) -> Validation | None:
        node, occasion = life.node, str(life.revision)

        def wanted() -> bool:
            now = self._controller.health.ward.life(node)
            return now.state is LifeState.VALIDATING and now.revision == life.revision

        of = await self._trials.failed_job(life.out_job)
        alone = await self._trials.run(named("validate", [node], occasion), [node], wanted=wanted, of=of)
        if alone is None:
            return None
        if alone.judged.verdict is Verdict.UNTESTED:
            return Validation(passed=False, tested=False, text=alone.judged.reason, job=alone.job)
        if alone.judged.verdict is not Verdict.OK:
            return _validation(alone, f"{alone.judged.verdict}: {alone.judged.reason}", passed=False)
        failed: list[str] = []
        mute: list[str] = []  # with whom nothing could be tested
        await self._others_back(node)
        for partner in self._partners(node)[:_PARTNERS]:
            both = [node, partner]
            pair = await self._trials.run(
                named("validate", both, occasion), both, wanted=wanted, of=of, pair=True,
                start_within_s=_START_WITHIN_S,
            )  # fmt: skip
            if pair is None or pair.judged.verdict is Verdict.UNTESTED:
                mute.append(partner)
                continue
            if pair.judged.verdict is Verdict.OK:
                but = f"; not {failed[0]}: that one or the link to it is suspect" if failed else ""
                return _validation(alone, f"{alone.judged.reason}, and with {partner}{but}", pair)
            failed.append(f"with {partner}, {pair.judged.verdict}: {pair.judged.reason}")
        if not wanted():
            return None
        if failed:
            return _validation(alone, "; ".join(failed), passed=False)
        but = f"nothing could be tested with {' and '.join(mute)}" if mute else "no partner was idle"
        return _validation(alone, f"{alone.judged.reason}; {but}")

    async def _others_back(self, node: Node) -> None:
        """Right after a controller's start its agents are still on their way: that is not said to be none."""
        controller = self._controller
        while controller.up_s < controller.policy.return_within_s and any(
            not member.talks(controller.time) for member in self._alike(node) if member.life in WORKING
        ):
            told = controller.told
            with suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_S):
                    await told.wait()

    def _alike(self, node: Node) -> "list[Member]":
        members = self._controller.fleet.members
        mine = members[node]
        others = (member for name, member in members.items() if name != node)
        return [other for other in others if (other.pool, other.slots) == (mine.pool, mine.slots)]

    def _partners(self, node: Node) -> list[Node]:
        """Idle nodes in service like it, those that are not on probation first."""
        idle = {member.name for member in self._idle()}
        alike = [member for member in self._alike(node) if member.name in idle]
        alike.sort(key=lambda member: (member.life is not LifeState.HEALTHY, member.name))
        return [member.name for member in alike]

    def _idle(self) -> "list[Member]":
        controller = self._controller
        present = [entry.present for entry in controller.book.entries.values()]
        busy = {name for one in present if one is not None for name in (*one.nodes, *one.spares)}
        return [
            member
            for member in controller.fleet.members.values()
            if member.life in WORKING and member.talks(controller.time) and member.pool != "run"
            and not member.leaving and not member.leaves and member.name not in busy
        ]  # fmt: skip

    # ------------------------------------------------------------ a pool

    def screen(self, names: Iterable[str], number: str, who: str) -> Screening:
        """Begin to screen these nodes, or all idle ones of a kind. Errors: NotFound, Refused."""
        if self.screening is not None and not self.screening.done:
            raise Refused("a screening is under way", next="`keepstep node screen --show` shows it.")
        idle = {member.name: member for member in self._idle()}
        asked = [Node(name) for name in names]
        for name in asked:
            if name not in self._controller.fleet.members:
                raise NotFound(f"there is no node {name!r}", next="`keepstep node list` shows them.")
            if name not in idle:
                raise Refused(f"node {name} is not idle and in service", next="Leave it out, or wait.")
        chosen = [idle[name] for name in asked] or list(idle.values())
        kinds = {(member.pool, member.slots) for member in chosen}
        if len(chosen) < 2 or len(kinds) > 1:
            raise Refused(
                "nodes are screened by pairs of the same pool with as many slots",
                why=f"these are {len(chosen)} idle nodes of {len(kinds)} kinds",
                next="Name at least two nodes of a kind.",
            )
        nodes = tuple(sorted(member.name for member in chosen))
        self.screening = Screening(number=number, who=who, nodes=nodes)
        self._controller.begin(self._screen(self.screening))
        return self.screening

    async def _screen(self, screening: Screening) -> None:
        try:
            while pairs := next_round(screening.nodes, screening.rounds):
                came = await asyncio.gather(*(self._pair(screening, pair) for pair in pairs))
                tried = zip(pairs, came, strict=True)
                screening.rounds.append({pair: ok for pair, ok in tried if ok is not None})
            await self._note(screening)
        except KeepstepError as problem:
            screening.problem = str(problem)
            log.warning("screening %s came to no end: %s", screening.number, problem)
        finally:
            screening.done = True

    async def _pair(self, screening: Screening, pair: Pair) -> bool | None:
        nodes, health = [Node(pair.a), Node(pair.b)], self._controller.health
        due = health.now + health.policy.deadlines.validate_s
        name = named("screen", nodes, screening.number)
        came = await self._trials.run(
            name, nodes, wanted=lambda: health.now < due, start_within_s=_START_WITHIN_S
        )
        if came is None or came.judged.verdict is Verdict.UNTESTED:
            return None
        passed = came.judged.verdict is Verdict.OK
        if not passed:
            screening.reasons[pair] = f"{came.judged.verdict}: {came.judged.reason}"
        return passed

    async def _note(self, screening: Screening) -> None:
        """Into each node's history; whoever is sick is validated, which takes it out."""
        controller, found = self._controller, screening.found
        texts = {
            name: told(screening.nodes, screening.rounds, screening.reasons, name)
            for name in sorted(found.good | found.sick)
        }

        def write(writer: Writer) -> None:
            for name, text in texts.items():
                passed = name in found.good
                event = f"{'good' if passed else 'sick'}: {text}"
                writer.add_event(
                    NewEvent(kind="node screened", text=event, node=Node(name), principal=screening.who)
                )
                writer.add_validation(
                    name, job=f"screen-{screening.number}", passed=passed, text=text, figures={}
                )

        await controller.write(write)
        health = controller.health
        for name in sorted(found.sick):
            sick = partial(screened_sick, who=screening.who, why=texts[name], now=health.now)
            text = f"sick by a screening: {texts[name]}"
            await health.change(
                controller.fleet, Node(name), sick, "node found", text, controller.write, screening.who
            )
        controller.wake()


def _validation(alone: Came, text: str, pair: Came | None = None, *, passed: bool = True) -> Validation:
    return Validation(passed=passed, text=text, job=alone.job, figures=figures(alone, pair))
