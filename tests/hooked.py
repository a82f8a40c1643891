"""Gangs of unchanged scripts with the hook in them, under a real shim: what their beacons say at the end."""

import asyncio
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from keepstep.agent.evidence import control_socket
from keepstep.agent.rank.preload import Wanted
from keepstep.agent.rankenv import hooked
from keepstep.agent.shimlink import Ending, Shim
from keepstep.agent.standby import StandbyServer
from keepstep.core.beacon import Phase, Record, Seen
from shims import ENV, WITHIN_S, launch_file, launched, said, script

HOOKED = hooked(ENV)
LOAD_S = 300.0  # torch, from a disk that others read from, too
MODULES = ("torch", "torch.distributed", "torch._dynamo?", "numpy?")

TOY = """
import torch, torch.distributed as dist, torch.nn as nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, TensorDataset

def loader(batches=6, **more):
    return DataLoader(TensorDataset(torch.ones(batches * 2, 3)), batch_size=2, **more)
"""


@dataclass(frozen=True)
class Shown:
    """Of one rank."""

    record: Record
    phases: dict[Phase, Seen]
    said: str
    ending: Ending

    @property
    def count(self) -> dict[str, int]:
        """How often each phase was completed; Python collects its garbage when it likes."""
        found = {phase.name.lower(): seen.count for phase, seen in self.phases.items()}
        found.pop("collecting", None)
        return found


@contextmanager
def loaded(folder: Path, env: dict[str, str] = HOOKED) -> Iterator[StandbyServer]:
    """A standby server with torch, so that each test costs no import."""
    server = StandbyServer(
        folder, interpreter=(sys.executable,), env=env, cwd="/", wanted=Wanted(modules=MODULES)
    )
    asyncio.run(server.ensure(timeout_s=LOAD_S))
    try:
        yield server
    finally:
        asyncio.run(server.stop())


@asynccontextmanager
async def gang(
    folder: Path,
    text: str,
    *,
    ranks: int = 1,
    server: StandbyServer | None = None,
    env: dict[str, str] = HOOKED,
    name: str = "1",
) -> AsyncIterator[tuple[Shim, Path]]:
    """Ranks that run `text`; the shim, and the attempt's folder. Warm with a server, else cold."""
    directory = folder / name
    file = launch_file(
        folder, script(folder, text), ranks=ranks, warm=server is not None, env=env, store=True
    )
    own = {rank.rank: {"KEEPSTEP_CONTROL": str(control_socket(directory, rank.rank))} for rank in file.ranks}
    placed = tuple(replace(rank, env=rank.env | own[rank.rank]) for rank in file.ranks)
    async with launched(directory, replace(file, ranks=placed), standby=server) as shim:
        if server is not None:
            assert shim.status.warm, shim.status.note
        yield shim, directory


async def seen(folder: Path, text: str, **how: object) -> list[Shown]:
    """Run to the end; what each rank has shown, in order."""
    async with gang(folder, text, **how) as (shim, directory):  # type: ignore[arg-type]
        ending = await shim.ended(timeout_s=LOAD_S if how.get("server") is None else WITHIN_S)
        return [
            Shown(beacon.read() or Record(), beacon.phases(), said(directory, rank), ending)
            for rank, beacon in sorted(shim.beacons.items())
        ]
