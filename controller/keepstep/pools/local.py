"""Several nodes on this machine, each a real agent with its slots, so that losing one is a real event.

The agents outlive the controller: they are started in sessions of their own and found again by the note
that the pool leaves in each node's folder. An agent that died while ranks of its node live is started again
at once (they are its to adopt); a node of which nothing lives is lost, and comes back after
`return_after_s`, as a machine would after a reboot.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from keepstep.agent.rank import marker
from keepstep.core.clock import Clock
from keepstep.core.home import Home, lives, start_ticks
from keepstep.core.ids import Node
from keepstep.pools.pool import Asked, Told

_NOTE = "process.json"
_LEAVE_WITHIN_S = 20.0
_EARLY_S = 5.0  # an agent that ends sooner than this is not started again at once


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalSettings:
    nodes: tuple[str, ...] = ("a",)
    slots: int = 4
    return_after_s: float = 30.0  # a lost node's way back, long enough to be seen as lost
    orphan_exit_s: float = 600.0  # agents without controller and without ranks end by themselves


@dataclass(slots=True)
class _Agent:
    pid: int = 0
    ticks: int = 0
    child: subprocess.Popen[bytes] | None = None
    started_at: float = float("-inf")
    gone_at: float | None = None

    @property
    def alive(self) -> bool:
        if self.child is not None and self.child.poll() is not None:
            self.child = None
        return self.pid != 0 and lives(self.pid, self.ticks)


@dataclass(slots=True, kw_only=True)
class LocalPool:
    home: Home
    clock: Clock
    settings: LocalSettings
    name: str = "local"
    _agents: dict[Node, _Agent] = field(default_factory=dict)

    async def reconcile(self, asked: Asked) -> Told:
        for name in map(Node, self.settings.nodes):
            agent = self._agents.setdefault(name, self._found(name))
            if agent.alive:
                agent.gone_at = None
                continue
            now = self.clock.monotonic()
            if agent.gone_at is None:
                agent.gone_at = now
            fresh = agent.pid == 0
            waits = _EARLY_S if await self._anything_lives(name) else self.settings.return_after_s
            early = now - agent.started_at < _EARLY_S
            if fresh or (waits == _EARLY_S and not early) or now - agent.gone_at >= waits:
                self._start(name, agent)
        return Told()

    async def confirm_dead(self, node: Node) -> str:
        agent = self._agents.get(node)
        if agent is None or agent.alive or await self._anything_lives(node):
            return ""
        return f"the agent of node {node} (pid {agent.pid}) is gone, and no process of its ranks is left"

    async def close(self, *, stop: bool) -> None:
        if not stop:
            return
        for agent in self._agents.values():
            if agent.alive:
                os.kill(agent.pid, signal.SIGINT)  # ranks and standby servers end with it
        deadline = self.clock.monotonic() + _LEAVE_WITHIN_S
        while any(agent.alive for agent in self._agents.values()):
            if self.clock.monotonic() > deadline:
                for agent in self._agents.values():
                    if agent.alive:
                        os.kill(agent.pid, signal.SIGKILL)
                return
            await asyncio.sleep(0.05)

    def pids(self) -> dict[Node, int]:
        return {name: agent.pid for name, agent in self._agents.items() if agent.alive}

    def _found(self, name: Node) -> _Agent:
        """The agent that an earlier controller started, if its note is there."""
        try:
            note = json.loads((self._folder(name) / _NOTE).read_text())
            return _Agent(pid=int(note["pid"]), ticks=int(note["start_ticks"]))
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return _Agent()

    def _start(self, name: Node, agent: _Agent) -> None:
        folder = self._folder(name)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        log = os.open(folder / "agent.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            agent.child = subprocess.Popen(
                self._command(name, folder),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=folder,
                start_new_session=True,
            )
        finally:
            os.close(log)
        agent.pid, agent.ticks = agent.child.pid, start_ticks(agent.child.pid) or 0
        agent.started_at, agent.gone_at = self.clock.monotonic(), None
        temporary = folder / f"{_NOTE}.tmp"
        temporary.write_text(json.dumps({"pid": agent.pid, "start_ticks": agent.ticks}))
        temporary.replace(folder / _NOTE)

    def _command(self, name: Node, folder: Path) -> list[str]:
        return [
            sys.executable, "-m", "keepstep.agent", "--node", name, "--dir", str(folder),
            "--endpoint-file", str(self.home.controller_file), "--pool", self.name,
            "--slots", str(self.settings.slots), "--address", "127.0.0.1", "--interface", "lo",
            "--exit-when-orphaned", str(self.settings.orphan_exit_s),
        ]  # fmt: skip

    def _folder(self, name: Node) -> Path:
        return self.home.nodes / name

    async def _anything_lives(self, name: Node) -> bool:
        """Whether any process of any attempt on this node is left, by the marker that all of them carry."""
        return bool(await asyncio.to_thread(marker.bearers, self._markers(name)))

    def _markers(self, name: Node) -> list[str]:
        jobs = self._folder(name) / "jobs"
        return [f"{path.parent.name}/{path.name}/{name}" for path in jobs.glob("*/*") if path.name.isdigit()]
