"""The environment of ranks: what torchrun would have set, so that a script cannot tell the difference.

MASTER_ADDR, MASTER_PORT, TORCHELASTIC_USE_AGENT_STORE, KEEPSTEP_ATTEMPT and KEEPSTEP_BEACON_FD are not here:
they are known only when the attempt goes, and the shim adds them. Pure: the caller reads the environment.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from keepstep.core import beacon

HOOK = Path(__file__).with_name("hook")
MAX_RESTARTS = 1000  # told to scripts only: the budget itself is the controller's
_INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TP_SOCKET_IFNAME")
_OF_AN_OUTER_LAUNCH = frozenset({
    "RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME", "WORLD_SIZE", "LOCAL_WORLD_SIZE",
    "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
    "NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES",
})  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """One node's part of a gang."""

    job: str
    attempt: int
    world_size: int
    nodes: int
    node_rank: int
    ranks: Sequence[int]  # global, in local-rank order


def inherited(environ: Mapping[str, str]) -> dict[str, str]:
    """What ranks take over from their agent: all but the traces of an outer launch, and keepstep's own."""
    return {
        name: value
        for name, value in environ.items()
        if name not in _OF_AN_OUTER_LAUNCH and not name.startswith(("TORCHELASTIC_", "KEEPSTEP_"))
    }


def hooked(env: Mapping[str, str]) -> dict[str, str]:
    """With keepstep.agent.hook.keepstep_hook in reach of every Python, behind what the job has on its path.

    KEEPSTEP_HOOK=0 in the job's own environment turns it off.
    """
    if env.get("KEEPSTEP_HOOK") == "0":
        return dict(env)
    path = [entry for entry in env.get("PYTHONPATH", "").split(os.pathsep) if entry]
    return {
        **env,
        "PYTHONPATH": os.pathsep.join([*path, str(HOOK)]),
        "KEEPSTEP_BEACON_CODE": beacon.__file__,
    }


def node_env(
    place: Place,
    given: Mapping[str, str],
    *,
    interface: str,
    gpus: Sequence[str],
    flights: str = "",
    ras_port: int = 0,
) -> dict[str, str]:
    """The environment that all ranks of a node share. `given` is the job's own and wins where it is a choice.

    `flights`: where NCCL's flight recorders are dumped, as the beginning of a path. `ras_port`: this job's
    own, since processes that share one answer each other's questions.

    `gpus`: the devices of this attempt on this node in local-rank order. Every rank sees all of them and
    picks its own by LOCAL_RANK, as under torchrun.
    """
    env = dict(given)
    env.update(
        {
            "WORLD_SIZE": str(place.world_size),
            "LOCAL_WORLD_SIZE": str(len(place.ranks)),
            "GROUP_RANK": str(place.node_rank),
            "GROUP_WORLD_SIZE": str(place.nodes),
            "ROLE_NAME": "default",
            "ROLE_WORLD_SIZE": str(place.world_size),
            "TORCHELASTIC_RESTART_COUNT": str(place.attempt - 1),
            "TORCHELASTIC_MAX_RESTARTS": str(MAX_RESTARTS),
            "TORCHELASTIC_RUN_ID": place.job,
        }
    )
    env.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
    if len(place.ranks) > 1:
        env.setdefault("OMP_NUM_THREADS", "1")
    if interface:
        for name in _INTERFACES:
            env.setdefault(name, interface)
    if gpus:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        if not env.keys() & {"TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"}:
            env["TORCH_FR_BUFFER_SIZE"] = "2000"
        if flights and not env.keys() & {"TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"}:
            env["TORCH_FR_DUMP_TEMP_FILE"] = flights
        if ras_port:
            env.setdefault("NCCL_RAS_ADDR", f"127.0.0.1:{ras_port}")
    return env


def rank_env(
    place: Place,
    local_rank: int,
    *,
    error_file: str,
    job_file: str = "",
    control: str = "",
    carrier: str = "",
    snapshot_every: int | None = None,
) -> dict[str, str]:
    """What is one rank's alone."""
    rank = place.ranks[local_rank]
    env = {
        "RANK": str(rank),
        "LOCAL_RANK": str(local_rank),
        "ROLE_RANK": str(rank),
        "TORCHELASTIC_ERROR_FILE": error_file,
    }
    if job_file:
        env["KEEPSTEP_JOB_FILE"] = job_file
    if control:
        env["KEEPSTEP_CONTROL"] = control
    if carrier:
        env["KEEPSTEP_CARRIER"] = carrier
        env["KEEPSTEP_SNAPSHOT_EVERY"] = str(snapshot_every or 1)
    return env
