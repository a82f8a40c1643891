"""Process groups of a rank: one along each dimension of the layout, one of everybody.

The rendezvous store is hosted outside the ranks (torchrun's environment with TORCHELASTIC_USE_AGENT_STORE),
so no rank's death takes it along. Every group gets the same explicit deadline. A rank makes only the groups
that it is in, in the same order of dimensions as their other members, and waits for nobody else.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from keepstep.core.errors import InputError
from keepstep.core.ids import Rank
from keepstep.core.layout import Coordinates, Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """None: this rank is alone along that dimension."""

    layout: Layout
    rank: int
    world: dist.ProcessGroup | None = None
    dp: dist.ProcessGroup | None = None
    pp: dist.ProcessGroup | None = None
    cp: dist.ProcessGroup | None = None
    tp: dist.ProcessGroup | None = None

    @property
    def at(self) -> Coordinates:
        return self.layout.coordinates(self.rank)


def device_of(environment: Mapping[str, str]) -> torch.device:
    """CUDA where the machine has it, one device a local rank; else CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(environment.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def join(layout: Layout, device: torch.device, *, timeout_s: float) -> Groups:
    """Meet the other ranks (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT) and make the groups."""
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world_size != layout.world_size:
        raise InputError(
            f"{world_size} ranks were started, the layout {layout} needs {layout.world_size}",
            where="layout", next="Start as many ranks as the product of the layout's dimensions.",
        )  # fmt: skip
    if world_size == 1:
        return Groups(layout=layout, rank=0)
    timeout = timedelta(seconds=timeout_s)
    cuda = device.type == "cuda"
    dist.init_process_group(
        "nccl" if cuda else "gloo", init_method="env://", timeout=timeout, device_id=device if cuda else None
    )
    return groups(layout, rank, timeout)


def groups(layout: Layout, rank: int, timeout: timedelta) -> Groups:
    """The groups of a rank, once the default process group is there."""
    world = dist.distributed_c10d._get_default_group()
    mine: dict[str, dist.ProcessGroup | None] = dict.fromkeys(("dp", "pp", "cp", "tp"))
    for dimension in mine:
        if getattr(layout, dimension) == 1:
            continue
        if getattr(layout, dimension) == layout.world_size:
            mine[dimension] = world
            continue
        members = list(layout.group(dimension, Rank(rank)))
        group = dist.new_group(members, timeout=timeout, use_local_synchronization=True)
        assert isinstance(group, dist.ProcessGroup)
        mine[dimension] = group
    return Groups(layout=layout, rank=rank, world=world, **mine)


def beside(groups: Groups, *, timeout_s: float) -> dist.ProcessGroup | None:
    """A gloo group of all ranks for a thread of its own: collectives of two threads must not share one."""
    if groups.world is None:
        return None
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
    assert isinstance(group, dist.ProcessGroup)
    return group


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
