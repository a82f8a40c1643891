"""What an attempt needs of its node, in one value."""

import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keepstep.agent import host, preparation
from keepstep.agent.carriers import Carriers
from keepstep.agent.folder import Folder
from keepstep.agent.settings import AgentSettings
from keepstep.agent.slots import Slots
from keepstep.agent.standbys import Standbys
from keepstep.agent.work import Work
from keepstep.core.clock import Clock
from keepstep.core.job import CommandRun


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    settings: AgentSettings
    folder: Folder
    clock: Clock
    boot: str
    slots: Slots
    standbys: Standbys
    carriers: Carriers
    work: Work
    controller: Callable[[], str]  # its URL: the address of ranks depends on the way to it
    predecessors: Callable[[str, int], list[Awaitable[Any]]]  # ends of older attempts of a job, still to come
    changed: Callable[[], None]  # something that the controller should hear of at once
    device_uuid: Callable[[str], str]  # of a device as CUDA_VISIBLE_DEVICES names it; "": not known
    tell: Callable[[str, str, int, dict[str, Any]], None]  # an event: kind, job, attempt, data

    async def recipe_for(self, job: str, run: Mapping[str, Any], directory: Path) -> preparation.Recipe:
        """How a job's ranks are made here, its files fetched. `directory`: of a run that brings no files.

        Errors: InputError for what this node cannot do, Unreachable for files that cannot be fetched.
        """
        what = preparation.read_run(run)
        workdir = directory
        if isinstance(what, CommandRun):
            workdir = Path(what.workdir)
            if what.ship == "bundle" and what.bundle:
                workdir = await self.work.folder_for(
                    job, what.bundle, within_s=self.settings.prepare_within_s
                )
        made = await asyncio.to_thread(preparation.recipe, what, workdir, dict(os.environ))
        return self.standbys.informed(made)

    def gpu_of(self, slots: Sequence[int], local_rank: int) -> str:
        """UUID of the GPU that a rank computes on: of those of its attempt, one by LOCAL_RANK."""
        devices = self.slots.gpus(slots)
        return self.device_uuid(devices[local_rank]) if local_rank < len(devices) else ""

    def address(self, nodes: int) -> tuple[str, str]:
        """Address and interface of this node's ranks in a gang of so many nodes."""
        if nodes == 1:
            return "127.0.0.1", "lo"
        return host.training_address(self.controller(), self.settings.address, self.settings.interface)
