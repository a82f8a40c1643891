"""Evidence on suspicion: what each rank of an attempt is doing, asked of the kernel, of the rank, of py-spy.

evidence   job, attempt? (the newest here), stacks? (true), ras? (false: ask one node only)
           -> {ranks: [{rank, process, wchan, interpreter, stack, groups, links, error}...],
               ras?: {missing, behind, failed} or {error}}
interpreter  answers | stuck (the control server lives and the interpreter does not let it look: its lock is
             held) | unknown (no control server, or the process is stopped)
links        as keepstep.agent.sockets tells them; stacks=false asks for these and the kernel's word alone

All ranks at once, within about three seconds whatever state they are in. Nothing here changes a rank: py-spy
reads memory without stopping it, and one that a debugger holds is only looked at.
"""

import asyncio
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from keepstep.agent import controlserver, kernel, ras, recorder, sockets, stacks
from keepstep.agent.evidence import control_socket
from keepstep.agent.kernel import Standing
from keepstep.agent.launches import Launches
from keepstep.core.errors import KeepstepError, NotFound, TimedOut

_PING_S, _ASK_S = 0.5, 2.0
_STUCK_S = 1.5  # leaves time for py-spy, which finds the stack all the same
_WITHIN_S = 3.0
_SPIES = 4  # py-spy processes at a time: they come while the machine may be busy
_TRACE_BYTES = 1 << 20


async def gather(params: Mapping[str, Any], launches: Launches) -> dict[str, Any]:
    """Errors: NotFound for an attempt that does not run here."""
    job = str(params["job"])
    number = int(params.get("attempt") or launches.latest(job) or 0)
    attempt = launches.attempts.get((job, number))
    if attempt is None:
        raise NotFound(f"attempt {number} of {job} does not run on this node")
    pids = {rank.rank: rank.pid for rank in attempt.status().ranks if rank.state == "running"}
    there = await asyncio.to_thread(sockets.connections)
    inquiry = _Inquiry(attempt.directory, there, stacks=bool(params.get("stacks", True)))
    found = await asyncio.gather(*(inquiry.rank(rank, pid) for rank, pid in sorted(pids.items())))
    if not params.get("ras"):
        return {"ranks": found}
    clock = launches.around.clock
    return {
        "ranks": found,
        "ras": await ras.ask(attempt.directory, list(pids.values()), clock, within_s=_WITHIN_S),
    }


class _Inquiry:
    def __init__(self, directory: Path, there: list[sockets.Connection], *, stacks: bool) -> None:
        self._directory, self._there, self._stacks = directory, there, stacks
        self._spy = shutil.which("py-spy", path=str(Path(sys.executable).parent)) or shutil.which("py-spy")
        self._spies = asyncio.Semaphore(_SPIES)

    async def rank(self, rank: int, pid: int) -> dict[str, Any]:
        standing = await asyncio.to_thread(kernel.standing_of, pid)
        report: dict[str, Any] = {
            "rank": rank, "process": standing.process, "wchan": standing.wchan, "interpreter": "unknown",
            "stack": [], "groups": [], "error": "",
            "links": await asyncio.to_thread(sockets.links_of, pid, self._there),
        }  # fmt: skip
        if not self._stacks:
            return report
        try:
            async with asyncio.timeout(_WITHIN_S):
                await self._ask(report, standing, control_socket(self._directory, rank), pid)
        except TimeoutError:
            report["error"] = report["error"] or f"not all of it came within {_WITHIN_S} s"
        return report

    async def _ask(self, report: dict[str, Any], standing: Standing, socket: Path, pid: int) -> None:
        """Fill in what can be had; what was found stays when the time is over."""
        if standing.process in {"zombie", "gone"}:
            return
        if standing.process not in {"stopped", "traced"} and await self._serves(socket, report):
            await asyncio.gather(self._groups(socket, report), self._traceback(socket, report))
        if not report["stack"]:
            await self._spied(pid, report)

    async def _serves(self, socket: Path, report: dict[str, Any]) -> bool:
        try:
            return await controlserver.ask(socket, "ping", within_s=_PING_S) != b""
        except KeepstepError as error:
            report["error"] = str(error)
            return False

    async def _groups(self, socket: Path, report: dict[str, Any]) -> None:
        try:
            trace = json.loads(await controlserver.ask(socket, "fr_trace_json", within_s=_ASK_S))
            noted = await asyncio.to_thread(_noted, socket.with_name(f"{socket.name}.groups"))
            report["groups"] = recorder.groups_of(trace, recorder.members_of(noted))
        except (KeepstepError, ValueError, TypeError, LookupError) as error:
            report["error"] = f"no flight recorder: {error}"

    async def _traceback(self, socket: Path, report: dict[str, Any]) -> None:
        """It takes the interpreter's lock, so its silence tells who has it: nobody gives it back."""
        try:
            text = await controlserver.ask(socket, "dump_traceback", within_s=_STUCK_S)
        except TimedOut:
            report["interpreter"] = "stuck"
        except KeepstepError as error:
            report["error"] = str(error)
        else:
            report["interpreter"] = "answers"
            report["stack"] = list(stacks.of_traceback(text.decode(errors="replace")))

    async def _spied(self, pid: int, report: dict[str, Any]) -> None:
        if self._spy is None:
            report["error"] = report["error"] or "py-spy is not installed beside the agent"
            return
        async with self._spies:
            spy = await asyncio.create_subprocess_exec(
                self._spy, "dump", "--nonblocking", "--json", "--pid", str(pid),
                stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
            )  # fmt: skip
            try:
                said, why = await spy.communicate()
            finally:
                if spy.returncode is None:
                    spy.kill()
                    await spy.wait()
        try:
            report["stack"] = list(stacks.of_pyspy(said))
        except ValueError:
            told = why.decode(errors="replace").strip().splitlines()
            report["error"] = f"py-spy: {told[0][:300] if told else 'it said nothing'}"


def _noted(path: Path) -> str:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return file.read(_TRACE_BYTES)
    except OSError:
        return ""
