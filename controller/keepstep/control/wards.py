"""Keeps up with what lives say is to be done: repairs under way, tickets, validations.

Level by level: whoever should be repaired, and for whom no task of this controller is at work, gets one.
The outcome is written into the life that it belongs to, if that still waits for it.
"""

from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

from keepstep.control.fleet import Fleet
from keepstep.control.health import Health, Write
from keepstep.control.repair import Order, Repairs
from keepstep.core.ids import Node
from keepstep.core.states import LifeState
from keepstep.decide.life import Life, Outcome
from keepstep.decide.lifecycle import HOOK_OF, ended

Begin = Callable[[Coroutine[Any, Any, None]], Any]


class Wards:
    def __init__(self, health: Health, fleet: Fleet, repairs: Repairs, write: Write, begin: Begin) -> None:
        self._health, self._fleet, self._repairs = health, fleet, repairs
        self._write, self._begin = write, begin
        self._under_way: set[str] = set()

    def reconcile(self) -> None:
        """Begin what should be under way and is not. Called after every look."""
        for node in self._health.ward.busy:
            life = self._health.ward.life(node)
            repair = life.repair
            if life.state is LifeState.REPAIRING and repair and repair.outcome is Outcome.BEGUN:
                self._once(repair.key, self._repair(life))
            elif (
                life.state is LifeState.REPLACE and not life.ticket and "ticket" in self._health.policy.hooks
            ):
                self._once(f"{node}/{life.revision}/ticket", self._ticket(life))

    def _once(self, key: str, work: Coroutine[Any, Any, None]) -> None:
        if key in self._under_way:
            work.close()
            return
        self._under_way.add(key)
        self._begin(work).add_done_callback(lambda _: self._under_way.discard(key))

    async def _repair(self, life: Life) -> None:
        repair = life.repair
        assert repair is not None
        name = HOOK_OF[repair.action]
        hook = self._health.policy.hooks.get(name)
        if hook is None:
            return  # taken out of the policy meanwhile: its deadline comes
        order = Order(key=repair.key, node=life.node, action=str(repair.action), reason=life.reason)
        result = await self._repairs.carry_out(order, hook)

        def note(now: Life) -> Life:
            waits = now.repair is not None and now.repair.key == repair.key
            begun = waits and now.repair is not None and now.repair.outcome is Outcome.BEGUN
            return ended(now, result.outcome, result.text) if begun else now

        text = f"{name} {result.outcome}{f': {result.text}' if result.text else ''} ({repair.key})"
        await self._changed(life.node, note, "node repair", text)

    async def _ticket(self, life: Life) -> None:
        key = f"{life.node}/{life.revision}/ticket"
        order = Order(key=key, node=life.node, action="replace", reason=life.reason)
        result = await self._repairs.carry_out(order, self._health.policy.hooks["ticket"])
        text = f"ticket {result.outcome}{f': {result.text}' if result.text else ''} ({key})"
        await self._changed(life.node, lambda now: replace(now, ticket=key), "node ticket", text)

    async def _changed(self, node: Node, change: Callable[[Life], Life], kind: str, text: str) -> None:
        await self._health.change(self._fleet, node, change, kind, text, self._write)
