"""Has done what keepstep cannot do itself: reset, reboot, ticket, by a command, a webhook, Kubernetes or Ray.

A repair has a key and is done at most once, whatever becomes of the controller. A command's folder is made
before the command is begun and its outcome is written into it, by the command's own shell, which lives on
without a controller: the next one finds the folder and waits for the outcome, it never begins again. A
webhook is asked again under the same `Idempotency-Key`, and its receiver tells the two requests apart.
`timeout` ends a command that no controller is there to end.

Kubernetes and Ray are asked by commands of keepstep's own, which know how it is done there.
"""

import asyncio
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import httpx

from keepstep.core.clock import Clock
from keepstep.core.rules import Action, Hook
from keepstep.decide.life import Outcome

_LOOK_S = 0.2
_ASK_AGAIN_S = 5.0
_GRACE_S = 10.0  # beyond the command's own time, for its shell to say how it ended
_KILL_AFTER_S = 5
_OWN_S = 5.0  # of a managed repair's time are for the start and the end of its process
_TEXT_MAX = 300
_RUN = """
timeout -k {kill} {within} "$@" >output 2>&1 </dev/null
echo $? >code.new && mv code.new code
"""
_WORDS = {
    Action.RESET: "reset", Action.RESET_IDLE: "reset", Action.REBOOT: "reboot", Action.REPLACE: "replace",
}  # fmt: skip
_TIMED_OUT = {124, 137}  # of `timeout`


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What is to be done, where, why, and its key."""

    key: str
    node: str
    action: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    outcome: Outcome
    text: str = ""


class Means(Protocol):
    """One way to have something done."""

    async def carry_out(self, order: Order, hook: Hook) -> Result:
        """Once per key, also when asked again. Returns when it is over or its time is."""
        ...


@dataclass(frozen=True, slots=True)
class Repairs:
    """Takes a hook's own way, and tries again as often as the hook says."""

    means: Mapping[str, Means]

    async def carry_out(self, order: Order, hook: Hook) -> Result:
        way = self.means[hook.way]
        result = Result(outcome=Outcome.FAILED, text="it was never tried")
        for number in range(1, hook.tries + 1):
            one = Order(
                key=f"{order.key}/{number}", node=order.node, action=order.action, reason=order.reason
            )
            result = await way.carry_out(one, hook)
            if result.outcome is Outcome.DONE:
                return result
        return result


@dataclass(frozen=True, slots=True)
class Command:
    folder: Path  # of the controller's home: a folder for each key
    clock: Clock

    async def carry_out(self, order: Order, hook: Hook) -> Result:
        place = self.folder / re.sub(r"[^A-Za-z0-9._-]+", "_", order.key)
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            place.mkdir(mode=0o700)
        except FileExistsError:
            pass  # begun before, perhaps by a controller that is no more
        else:
            self._begin(place, order, hook)
        deadline = self.clock.monotonic() + hook.within_s + _KILL_AFTER_S + _GRACE_S
        while not (place / "code").exists():
            if self.clock.monotonic() > deadline:
                return Result(outcome=Outcome.FAILED, text=f"no end within {hook.within_s:g} s")
            await asyncio.sleep(_LOOK_S)  # it may be the child of a controller that is no more
        return _result(place, hook)

    def _begin(self, place: Path, order: Order, hook: Hook) -> None:
        words = [_filled(word, order) for word in hook.command]
        script = _RUN.format(kill=_KILL_AFTER_S, within=hook.within_s)
        # In the background of a shell that ends at once: it outlives this controller, and needs no reaping.
        subprocess.run(
            ["/bin/sh", "-c", f"({script}) &", "sh", *words], cwd=place, start_new_session=True, check=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=_GRACE_S,
        )  # fmt: skip


def _result(place: Path, hook: Hook) -> Result:
    code = int((place / "code").read_text().strip() or 1)
    lines = (place / "output").read_text(errors="replace").strip().splitlines()
    said = lines[-1][:_TEXT_MAX] if lines else ""
    if code == 0:
        return Result(outcome=Outcome.DONE, text=said)
    how = f"ended after {hook.within_s:g} s" if code in _TIMED_OUT else f"exit code {code}"
    return Result(outcome=Outcome.FAILED, text=f"{how}{f': {said}' if said else ''}")


@dataclass(frozen=True, slots=True)
class Webhook:
    """POSTs the order. 200: done; 202: begun, asked again; 4xx: refused; all else is tried again."""

    clock: Clock

    async def carry_out(self, order: Order, hook: Hook) -> Result:
        body = {"key": order.key, "node": order.node, "action": order.action, "reason": order.reason}
        deadline = self.clock.monotonic() + hook.within_s
        said = "it was not reached"
        async with httpx.AsyncClient(timeout=min(30.0, hook.within_s)) as client:
            while (left_s := deadline - self.clock.monotonic()) > 0:
                try:
                    headers = {"Idempotency-Key": order.key}
                    answer = await client.post(hook.webhook, json=body, headers=headers)
                except httpx.HTTPError as problem:
                    said = str(problem) or type(problem).__name__
                else:
                    said = f"HTTP {answer.status_code} {answer.text.strip()[:_TEXT_MAX]}".strip()
                    if answer.is_success and answer.status_code != 202:
                        return Result(outcome=Outcome.DONE, text=said)
                    if answer.is_client_error and answer.status_code not in (408, 425, 429):
                        return Result(outcome=Outcome.FAILED, text=said)
                await asyncio.sleep(min(_ASK_AGAIN_S, left_s))
        return Result(outcome=Outcome.FAILED, text=f"no end within {hook.within_s:g} s: {said}")


@dataclass(frozen=True, slots=True)
class Managed:
    """By a cluster's own management: `module` is run as a command, so it outlives this controller, too."""

    command: Command
    module: str
    arguments: tuple[str, ...] = ()

    async def carry_out(self, order: Order, hook: Hook) -> Result:
        within_s = hook.within_s - min(_OWN_S, hook.within_s / 2)
        words = (
            sys.executable, "-m", self.module, *self.arguments, "--node", hook.kubernetes or hook.ray,
            "--key", "{key}", "--action", _WORDS[Action(order.action)], "--reason", "{reason}",
            "--within", f"{within_s:g}",
        )  # fmt: skip
        return await self.command.carry_out(order, replace(hook, command=words))


def _filled(word: str, order: Order) -> str:
    places = {"node": order.node, "action": order.action, "reason": order.reason, "key": order.key}
    return re.sub(r"{(\w+)}", lambda found: places.get(found[1], found[0]), word)
