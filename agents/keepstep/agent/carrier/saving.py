"""What a carrier holds of a state, written into the job's checkpoint folder; and a script's, read from there.

Only ever asked for when no rank is left, so nothing overwrites what is read here. It is written on a thread:
ranks of other nodes and the agent are answered meanwhile. The built-in trainer reads such checkpoints itself,
in any layout; a script finds its state where it would be if nobody had been lost.
"""

import asyncio
import math
import os
import platform
from pathlib import Path
from typing import Any

from keepstep.agent.carrier.book import Book, Key
from keepstep.agent.carrier.memory import BLOCK, Memory
from keepstep.core.errors import InputError, NotFound
from keepstep.core.manifest import File, Manifest, corrupt
from keepstep.core.slotfile import Saved, Source, name_of, read
from keepstep.core.snapshots import Slot, Stamp

_PLACES = frozenset({"pieces", "tensors", "tree"})  # of a description: what a manifest does not repeat


async def save(book: Book, request: dict[str, Any]) -> dict[str, Any]:
    """Files by name, and what the manifest says of the job; dir is the checkpoint's own folder.

    Errors: NotFound for a state that is not here any more, InputError for one that is damaged, OSError for a
    storage that is full or gone.
    """
    parents = {int(n): Stamp(a, s) if a else None for n, a, s in request["lineage"]}
    book.parents = {**book.parents, **parents}
    folder, at = Path(request["dir"]), Stamp(*map(int, request["at"]))
    await asyncio.to_thread(folder.mkdir, parents=True, exist_ok=True)
    files: dict[str, list[Any]] = {}
    about: dict[str, Any] = {}
    for rank in request["ranks"]:
        source, file = await _stored(book, (int(request["world"]), int(rank)), at, folder)
        files[name_of(int(rank))] = [file.bytes, file.xxh3]
        about = source
    return {"files": files, "about": about}


def writer() -> str:
    """What drafts of this carrier are called: process numbers repeat in containers, names of hosts do not."""
    return f"{platform.node()}.{os.getpid()}"


async def load(book: Book, request: dict[str, Any]) -> tuple[dict[str, Any] | None, str]:
    """The states of this node's ranks into their slots: what the attempt begins from, else why it does not.

    Errors: InputError, CorruptCheckpoint.
    """
    folder, world = Path(request["saved"]), int(request["world"])
    ranks = [int(rank) for rank in request["ranks"]]
    manifest = await asyncio.to_thread(Manifest.read, folder)
    count = math.prod(manifest.layout.values())
    if count != world:
        return None, f"step {manifest.step} was stored of {count} ranks, and now there are {world}"
    if damage := await asyncio.to_thread(manifest.damage, folder, [name_of(rank) for rank in ranks]):
        raise corrupt(folder, damage)
    at = Stamp(manifest.attempt, manifest.step)
    for rank in ranks:
        saved = await asyncio.to_thread(read, folder / name_of(rank))
        memory = book.made(book.own, saved.roomy)
        memory.stamp([None] * len(memory.stamps))
        await asyncio.to_thread(_fill, memory, saved)
    book.restored(world)
    return {"world": world, "at": list(at)}, ""


def _fill(memory: Memory, saved: Saved) -> None:
    os.pwrite(memory.descriptor, saved.text, memory.shape.description_at(0))
    for start in range(0, len(saved.payload), BLOCK):
        os.pwrite(memory.descriptor, saved.payload[start : start + BLOCK], memory.shape.payload_at(0) + start)
    memory.write_slot(0, saved.slot)


async def _stored(book: Book, key: Key, at: Stamp, folder: Path) -> tuple[dict[str, Any], File]:
    damaged: InputError | None = None
    for memory, number in list(book.candidates(key, at)):
        slot = memory.slots[number]
        descriptor = os.dup(memory.descriptor)  # the file may be given up meanwhile
        try:
            source = Source(descriptor, memory.shape, number, slot)
            file = await asyncio.to_thread(source.write, folder, at, by=writer())
            about = {name: value for name, value in source.description.items() if name not in _PLACES}
        except InputError as error:
            damaged = error
            _drop(memory, number, slot)
        else:
            return about, file
        finally:
            os.close(descriptor)
    if damaged is not None:
        raise damaged
    raise NotFound(f"step {at.step} of attempt {at.attempt} of rank {key[1]} is not here any more")


def _drop(memory: Memory, number: int, slot: Slot) -> None:
    if memory.descriptor >= 0 and memory.slots[number] == slot:
        memory.write_slot(number, Slot())
