"""Looks at the beacons, and at how alone this agent is. One loop, a few times a second."""

import asyncio
import logging

from keepstep.agent import alone
from keepstep.agent.attempt import Attempt
from keepstep.agent.launches import Launches
from keepstep.agent.link import Contact
from keepstep.agent.preparation import checkpoint_folder
from keepstep.core import checkpoints
from keepstep.core.clock import Clock
from keepstep.core.errors import KeepstepError

_log = logging.getLogger("keepstep.agent")
LOOK_S = 0.25
LOOK_STARTING_S = 0.05  # a first step is to be noticed at once
PERIOD_S = 1.0  # the most that one late look counts as silence
_FENCE_LOOK_S = 5.0
_FENCE_SLOW_S = 20.0


class Watch:
    def __init__(self, launches: Launches, contact: Contact, clock: Clock) -> None:
        self._launches, self._contact, self._clock = launches, contact, clock
        self._answered_at: float | None = None
        self._fence_looks: dict[tuple[str, int], tuple[float, asyncio.Task[int | None] | None]] = {}

    async def run(self) -> None:
        last = self._clock.monotonic()
        while True:
            living = self._launches.living
            starting = any(attempt.progress.starting(last) for attempt in living)
            await asyncio.sleep(LOOK_STARTING_S if starting else LOOK_S)
            now = self._clock.monotonic()
            self.look(living, now, now - last)
            last = now

    def look(self, living: list[Attempt], now: float, elapsed_s: float) -> None:
        answered_at = self._contact.answered_at
        answered = now - answered_at if answered_at is not None and answered_at != self._answered_at else None
        self._answered_at = answered_at
        for attempt in living:
            stepped = attempt.look(points=True)
            attempt.feel(elapsed_s)
            attempt.solitude = attempt.solitude.tick(
                elapsed_s, PERIOD_S, answered_s=answered, stepped=stepped
            )
            self._judge(attempt, now)

    def _judge(self, attempt: Attempt, now: float) -> None:
        launch = attempt.launch
        bounds = alone.Bounds(
            lease_s=self._contact.lease_s, self_fence_s=launch.self_fence_s,
            orphan_lease_s=launch.orphan_lease_s, attached=launch.attached,
        )  # fmt: skip
        verdict: alone.Verdict = alone.judge(attempt.solitude, bounds, attempt=launch.attempt)
        if isinstance(verdict, alone.LookAtFence):
            known, fence = self._fence(attempt, now)
            if known:
                verdict = alone.judge_fence(attempt.solitude, bounds, attempt=launch.attempt, fence=fence)
        match verdict:
            case alone.Renew(reason):
                _log.info("attempt %s/%d goes on: %s", *attempt.key, reason)
                attempt.solitude = attempt.solitude.renewed()
            case alone.End(reason):
                if not attempt.ending:
                    _log.warning("attempt %s/%d: %s", *attempt.key, reason)
                    self._launches.around.tell("self_fenced", *attempt.key, {"text": reason})
                attempt.stop(reason, 0.0)

    def _fence(self, attempt: Attempt, now: float) -> tuple[bool, int | None]:
        """Whether there is something to go by, and what. A folder that does not answer is as good as none."""
        begun, task = self._fence_looks.get(attempt.key, (-_FENCE_LOOK_S, None))
        if task is not None and task.done():
            self._fence_looks[attempt.key] = begun, None
            return True, task.result()
        if task is None and now - begun >= _FENCE_LOOK_S:
            look = asyncio.create_task(asyncio.to_thread(_read_fence, attempt))
            self._fence_looks[attempt.key] = now, look
        return task is not None and now - begun > _FENCE_SLOW_S, None


def _read_fence(attempt: Attempt) -> int | None:
    folder = checkpoint_folder(attempt.launch)
    if folder is None:
        return None
    try:
        return checkpoints.read_fence(folder)
    except (KeepstepError, OSError) as error:
        _log.warning("the fence of %s/%d cannot be read: %s", *attempt.key, error)
        return None
