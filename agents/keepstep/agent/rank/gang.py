"""The ranks of one shim: their beacons, pipes, starts, signals and exits."""

import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from . import ahead, become, spawn
from .learn import LEARNT
from .logs import Output, RotatedLog
from .protocol import BEACON_PAGE, MARKER, LaunchFile, RankLaunch, RankState


@dataclass
class _Member:
    launch: RankLaunch
    state: RankState
    beacon: int
    held: int | None = None  # pidfd
    output: Output | None = None


class Gang:
    """Created before any rank exists; `start` once."""

    def __init__(self, directory: Path, launch: LaunchFile) -> None:
        self._directory, self._launch = directory, launch
        self._members = [
            _Member(
                launch=rank,
                state=RankState(rank=rank.rank, local_rank=rank.local_rank),
                beacon=_beacon(),
            )
            for rank in sorted(launch.ranks, key=lambda rank: rank.local_rank)
        ]
        self._exits = 0

    @property
    def beacons(self) -> list[int]:
        """Descriptors, by local rank."""
        return [member.beacon for member in self._members]

    @property
    def states(self) -> tuple[RankState, ...]:
        return tuple(member.state for member in self._members)

    @property
    def outputs(self) -> list[Output]:
        return [member.output for member in self._members if member.output]

    @property
    def running(self) -> bool:
        return any(member.state.state == "running" for member in self._members)

    def start(
        self,
        *,
        added: dict[str, str],
        loaded: become.Loaded | None,
        cgroup: Path | None,
        let_go: Callable[[], None],
        crew: ahead.Crew | None = None,
    ) -> None:
        """Fork every rank. `added`: where the store is. `let_go`: closes the shim's own in the child."""
        rotate = self._launch.rotate
        sys.stdout.flush()
        sys.stderr.flush()
        for k, member in enumerate(self._members):
            pipe, end = os.pipe()
            env = {
                **self._launch.env,
                **member.launch.env,
                **added,
                MARKER: self._launch.marker,
                "KEEPSTEP_BEACON_FD": str(member.beacon),
            }
            account = self._directory / LEARNT.format(rank=member.launch.rank)
            around = spawn.Surroundings(
                env=env, output=end, keep=(member.beacon,), cgroup=cgroup, account=account
            )
            pid, member.held = self._rank(k, around, loaded, let_go, crew)
            os.close(end)
            log = RotatedLog(
                self._directory / f"rank-{member.launch.rank}.log",
                limit_bytes=rotate.bytes,
                files=rotate.files,
            )
            member.output = Output(pipe, log)
            member.state = replace(member.state, pid=pid, state="running")

    def _rank(
        self,
        k: int,
        around: spawn.Surroundings,
        loaded: become.Loaded | None,
        let_go: Callable[[], None],
        crew: ahead.Crew | None,
    ) -> tuple[int, int]:
        if crew is None:
            return spawn.rank(self._launch, around, loaded, let_go)
        try:
            return crew.rank(k, self._launch, around)
        except OSError:  # it ended while it waited: this rank is only slower
            return spawn.rank(self._launch, around, None, let_go)

    def exited(self, pid: int, status: int, at_ns: int) -> bool:
        """A child was reaped; whether it was a rank."""
        for member in self._members:
            if member.state.pid == pid and member.state.state == "running":
                self._exits += 1
                code = os.waitstatus_to_exitcode(status)
                member.state = replace(
                    member.state, state="exited", exited_ns=at_ns, order=self._exits,
                    exit_code=code if code >= 0 else None, signal=_name(-code) if code < 0 else None,
                )  # fmt: skip
                assert member.held is not None
                os.close(member.held)
                member.held = None
                return True
        return False

    def send(self, number: int, ranks: list[int] | None = None) -> None:
        """Signal the running ranks; only these processes, as torchrun does, not what they started."""
        for member in self._members:
            if member.held is not None and (ranks is None or member.launch.rank in ranks):
                with suppress(ProcessLookupError):  # it has just ended
                    signal.pidfd_send_signal(member.held, number)

    def close_outputs(self) -> None:
        """Everything is dead: what is left in the pipes is all there will be."""
        for member in self._members:
            if member.output:
                member.output.drain()
                member.output.close()
                member.output = None


def _beacon() -> int:
    page = os.memfd_create("keepstep-beacon")
    os.ftruncate(page, BEACON_PAGE)
    return page


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"SIG{number}"
