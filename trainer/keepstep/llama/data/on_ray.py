"""Shards made by Ray Data, on as many nodes as a cluster has.

Every node finds the folder and the sources under the same paths, and has keepstep installed. An actor that is
lost with its node is replaced by Ray, and its unit made again; what a killed command leaves is completed by
the same command, wherever it runs.
"""

import json
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from keepstep.core.errors import InputError, KeepstepError
from keepstep.llama.data import tokenise
from keepstep.llama.data.shards import Shard

_REACHED_S = 10.0


class Maker:
    """In an actor of Ray's: a unit's number in; out what `tokenise.made` reads, as JSON in one column."""

    def __init__(self, out: str) -> None:
        self._worker = tokenise.Worker(Path(out))

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        try:
            told = self._worker.told(int(row["unit"]))
        except KeepstepError as error:
            told = tokenise.error_of(error)
        return {"told": json.dumps(told)}


def _reach(address: str) -> None:
    """OSError if nobody listens there: Ray would try for minutes, and end the process."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon:
        socket.create_connection((host, int(port)), timeout=_REACHED_S).close()


def shards_of(out: Path, missing: Sequence[int], *, address: str) -> Iterator[Shard]:
    """Shards as they are completed, made by the cluster at `address` ("auto": the one of this machine).

    InputError if there is no such cluster, or none of its nodes has a processor to give.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise InputError(
            "Ray Data is not installed here", where="--ray", why=str(error), next="Install ray[data]."
        ) from error
    try:
        _reach(address)
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (OSError, ValueError) as error:
        raise InputError(
            f"there is no Ray cluster at {address}", where="--ray", why=str(error),
            next="Name the address that `ray start` printed, or auto on a node of the cluster.",
        ) from error  # fmt: skip
    try:
        cores = int(ray.cluster_resources().get("CPU", 0))
        if not cores:
            raise InputError("no node of the cluster has a CPU to give", where="--ray", next="Add a node.")
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = context.print_on_execution_start = False
        units = ray.data.from_items([{"unit": unit} for unit in missing], override_num_blocks=len(missing))
        rows = units.map(
            Maker, fn_constructor_args=(str(out.absolute()),), num_cpus=1,
            concurrency=(1, min(cores, len(missing))),
        )  # fmt: skip
        for row in rows.iter_rows():
            yield tokenise.made(out, json.loads(row["told"]))
    finally:
        ray.shutdown()
