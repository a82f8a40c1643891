"""The contract's end of a Ray cluster. Ray itself is in the driver, a child process that may die.

What should be is decided anew whenever the driver has seen something or a job has changed, from nothing but
what jobs want and what is there: so a new controller, a new driver and an old one come to the same.
"""

import asyncio
import contextlib
import json
import logging
import os
import sys
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from keepstep.core.clock import Clock
from keepstep.core.ids import JobId, Node
from keepstep.pools.pool import Asked, Known, News, Told
from keepstep.pools.ray.groups import Terms, names, shape, usable
from keepstep.pools.ray.words import RayNode, Seen, Wanted, WantedAgent

log = logging.getLogger(__name__)

_LINE_BYTES_MAX = 64 << 20
_SILENT_S = 15.0  # the driver says something each second
_HUNG_S = 90.0  # longer than Ray itself waits for a head that may come back
_AGAIN_S = 3.0  # between two starts of the driver
_RENEW_S = 10.0  # an agent that Ray keeps and that does not connect gets a new credential
_RAYLET_FENCE_S = 75.0  # a raylet that cannot reach its head ends after 60 s, and its actors with it
_STOP_WITHIN_S = 40.0
_END_WITHIN_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RaySettings:
    address: str  # "auto", host:port of the head from a node of the cluster, or ray://host:port from anywhere
    terms: Terms
    url: str  # at which the cluster's nodes reach the controller
    folder: str  # on each node, for this controller's agents alone
    orphan_exit_s: float = 600.0  # agents without controller and without ranks end by themselves


@dataclass(slots=True)
class _Credential:
    endpoint: str
    renewed: int
    at: float


@dataclass(slots=True, kw_only=True)
class RayPool:
    settings: RaySettings
    clock: Clock
    log_file: Path  # the driver's
    issue: Callable[[Node], Awaitable[str]]  # a credential of one node's own
    term: int  # the controller's: what it orders is refused once a newer one has been there
    name: str = "ray"
    _driver: asyncio.subprocess.Process | None = None
    _reading: asyncio.Task[None] | None = None
    _tried_at: float = float("-inf")
    _seen: Seen | None = None
    _seen_at: float = 0.0
    _problem: str = ""
    _asked: Asked | None = None
    _selectors: dict[str, dict[str, str]] = field(default_factory=dict)  # with which groups were asked for
    _credentials: dict[str, _Credential] = field(default_factory=dict)  # by actor
    _issuing: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    _away: dict[str, float] = field(default_factory=dict)  # actors whose agent is not connected, since when
    _dead: dict[Node, tuple[RayNode, float]] = field(default_factory=dict)  # and when that was first seen
    _last: bytes = b""
    _waits: dict[JobId, str] = field(default_factory=dict)
    _news: list[News] = field(default_factory=list)

    async def reconcile(self, asked: Asked) -> Told:
        self._asked = asked
        await self._keep_driver()
        self._decide()
        news, self._news = tuple(self._news), []
        return Told(nodes=self._known(), waits=self._all_waits(asked), news=news)

    async def confirm_dead(self, node: Node) -> str:
        """Ray's word, once nothing of the node can run: its actors end with it, and its agent with its actor.

        A raylet that was only cut off lives on for a minute, and so may ranks.
        """
        found = self._dead.get(node)
        if found is None or self._problem or any(name == node for name in self._named().values()):
            return ""
        dead, since = found
        if not dead.orderly and self.clock.monotonic() - since < _RAYLET_FENCE_S:
            return ""
        return f"Ray says that node {node} ({dead.id[:8]}) is dead: {dead.death}"

    async def close(self, *, stop: bool) -> None:
        if stop and self._driver is not None and self._seen is not None:
            self._asked = Asked(connected=lambda _: False)
            deadline = self.clock.monotonic() + _STOP_WITHIN_S
            self._decide()
            while self._seen.groups or self._seen.actors:
                if self._problem or self.clock.monotonic() > deadline or self._driver.returncode is not None:
                    log.warning("left on Ray: %s", [group.name for group in self._seen.groups])
                    break
                await asyncio.sleep(0.05)
        for task in self._issuing.values():
            task.cancel()
        await self._end_driver()

    # ------------------------------------------------------------ the driver

    async def _keep_driver(self) -> None:
        now = self.clock.monotonic()
        if self._driver is not None and self._driver.returncode is None:
            silent_s = now - max(self._seen_at, self._tried_at)
            if silent_s > _SILENT_S and not self._problem:
                self._trouble(f"nothing was heard of it for {_SILENT_S:g} s")
            if silent_s > _HUNG_S:
                self._driver.kill()
            return
        if now - self._tried_at < _AGAIN_S:
            return
        await self._end_driver()
        self._tried_at, self._last = now, b""
        log_file = os.open(self.log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            self._driver = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "keepstep.pools.ray.driver", self.settings.address,
                self.settings.terms.prefix, str(self.term), stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE, stderr=log_file, limit=_LINE_BYTES_MAX,
                env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0"},
            )  # fmt: skip
        finally:
            os.close(log_file)
        self._reading = asyncio.create_task(self._read(self._driver))

    async def _read(self, driver: asyncio.subprocess.Process) -> None:
        assert driver.stdout is not None
        async for line in driver.stdout:
            self._take(msgspec.json.decode(line, type=Seen))
        code = await driver.wait()
        if not self._problem and driver is self._driver:
            self._trouble(f"its driver ended ({code}); {self.log_file} has its words")

    async def _end_driver(self) -> None:
        driver, reading, self._driver, self._reading = self._driver, self._reading, None, None
        if driver is not None and driver.stdin is not None:
            driver.stdin.close()
            try:
                await asyncio.wait_for(driver.wait(), _END_WITHIN_S)
            except TimeoutError:
                driver.kill()
                await driver.wait()
        if reading is not None:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    def _take(self, seen: Seen) -> None:
        if seen.problem:
            self._trouble(seen.problem)
            return
        before = self._seen
        self._seen, self._seen_at = seen, self.clock.monotonic()
        if self._problem:
            self._problem = ""
            self._tell(*_returned(before, seen))
        elif before is None:
            self._tell("ray", f"Ray {seen.version} at {self.settings.address}: {_counted(self._usable())}")
        self._note_deaths(before, seen)
        for actor, why in seen.failures.items():
            if before is None or before.failures.get(actor) != why:
                text = f"no agent can begin on Ray's node {actor.rpartition('@')[2][:8]}: {why}"
                self._tell("ray agent failed", text)
        self._decide()

    def _trouble(self, problem: str) -> None:
        if not self._problem:
            text = f"Ray at {self.settings.address} does not answer: {problem.splitlines()[0]}"
            self._tell("ray lost", f"{text}. What runs goes on, nothing new can start")
        self._problem = problem

    def _note_deaths(self, before: Seen | None, seen: Seen) -> None:
        known = {node.id: node for node in before.nodes} if before is not None else {}
        called = names(usable(self.settings.terms, before)) if before is not None else {}
        for node in seen.nodes:
            if before is None and not node.alive:  # it died while nobody looked
                self._dead[Node(node.name)] = node, self.clock.monotonic()
            if not node.alive and node.id in called and known[node.id].alive:
                name = called[node.id]
                self._dead[name] = node, self.clock.monotonic()
                self._tell("ray node dead", f"Ray says that node {name} is dead: {node.death}", name)
        for name in self._named().values():
            self._dead.pop(name, None)

    # ------------------------------------------------------------ what should be

    def _decide(self) -> None:
        seen, asked = self._seen, self._asked
        if seen is None or asked is None or self._driver is None or self._problem:
            return
        wanted = shape(self.settings.terms, asked.wants, seen, asked.cordoned, self._selectors)
        self._waits = {**_beginning(wanted.agents, seen, asked), **wanted.waits}
        self._selectors = {
            group.name: self._selectors.get(group.name, group.selector) for group in wanted.groups
        }
        there = {actor.name for actor in seen.actors}
        agents = tuple(self._with_endpoint(agent, there, asked) for agent in wanted.agents)
        alive = {agent.actor for agent in agents}
        for actor in set(self._credentials) - alive:
            del self._credentials[actor]
        named = self._named().items()
        drains = {identity: asked.drained[name] for identity, name in named if name in asked.drained}
        self._say(Wanted(groups=wanted.groups, agents=agents, drains=drains))

    def _say(self, wanted: Wanted) -> None:
        line = msgspec.json.encode(wanted) + b"\n"
        if line == self._last or self._driver is None or self._driver.stdin is None:
            return
        self._last = line
        with contextlib.suppress(ConnectionError):  # it is just ending: the next one is told
            self._driver.stdin.write(line)

    def _with_endpoint(self, agent: WantedAgent, there: set[str], asked: Asked) -> WantedAgent:
        now, node = self.clock.monotonic(), Node(agent.node)
        known = self._credentials.get(agent.actor)
        if asked.connected(node):
            self._away.pop(agent.actor, None)
        since = self._away.setdefault(agent.actor, now)
        stale = now - max(since, known.at if known else since) >= _RENEW_S
        lacking = known is None and agent.actor not in there
        if (lacking or (stale and not asked.connected(node))) and agent.actor not in self._issuing:
            self._issuing[agent.actor] = asyncio.create_task(self._issue(agent.actor, node))
        folder = str(Path(self.settings.folder) / agent.node)
        arguments = ("--pool", self.name, *agent.arguments)
        arguments += ("--exit-when-orphaned", f"{self.settings.orphan_exit_s:g}")
        endpoint, renewed = (known.endpoint, known.renewed) if known else ("", 0)
        return msgspec.structs.replace(
            agent, folder=folder, arguments=arguments, endpoint=endpoint, renewed=renewed
        )

    async def _issue(self, actor: str, node: Node) -> None:
        before = self._credentials.get(actor)
        secret = await self.issue(node)
        endpoint = json.dumps({"url": self.settings.url, "token": secret})
        renewed = (before.renewed if before else 0) + 1
        self._credentials[actor] = _Credential(endpoint, renewed, self.clock.monotonic())
        del self._issuing[actor]
        self._decide()

    # ------------------------------------------------------------ what is told

    def _usable(self) -> tuple[RayNode, ...]:
        return usable(self.settings.terms, self._seen) if self._seen is not None else ()

    def _named(self) -> dict[str, Node]:
        return names(self._usable())

    def _known(self) -> tuple[Known, ...]:
        called = self._named()
        return tuple(
            Known(
                name=called[node.id],
                slots=int(node.total[self.settings.terms.resource]),
                leaves="Ray drains it" if node.draining else "",
                leaves_in_s=node.drains_in_s,
            )
            for node in self._usable()
        )

    def _all_waits(self, asked: Asked) -> dict[JobId, str]:
        if self._problem:
            text = f"Ray at {self.settings.address} does not answer: {self._problem.splitlines()[0]}"
            return {want.job: text for want in asked.wants}
        if self._seen is None:
            return {want.job: f"connects to Ray at {self.settings.address}" for want in asked.wants}
        return self._waits

    def _tell(self, kind: str, text: str, node: Node | None = None) -> None:
        log.info("%s", text)
        self._news.append(News(kind=kind, text=text, node=node))


def _counted(nodes: tuple[RayNode, ...]) -> str:
    return f"{len(nodes)} nodes that jobs can use" if len(nodes) != 1 else "1 node that jobs can use"


def _beginning(agents: Iterable[WantedAgent], seen: Seen, asked: Asked) -> dict[JobId, str]:
    """Of placed gangs, whose agents are not there yet."""
    waits: dict[JobId, list[str]] = {}
    for agent in agents:
        if not asked.connected(Node(agent.node)):
            why = f" ({seen.failures[agent.actor]})" if agent.actor in seen.failures else ""
            waits.setdefault(JobId(agent.group.split("/")[2]), []).append(f"{agent.node}{why}")
    return {job: f"agents begin on {', '.join(nodes[:8])}" for job, nodes in waits.items()}


def _returned(before: Seen | None, seen: Seen) -> tuple[str, str]:
    if before is None:
        return "ray back", f"Ray {seen.version} answers"
    if before.cluster != seen.cluster:
        text = "Ray is back as another cluster, its head was started anew: what ran there is over, gangs are"
        return "ray back", f"{text} asked for again and begin from what is stored"
    agents = len(seen.actors)
    return "ray back", f"Ray is back, the same cluster: {agents} agents of ours are there and are kept"
