"""What a carrier holds of a state, written into the job's checkpoint folder.

Only ever asked for when no rank is left, so nothing overwrites what is read here. It is written on a thread:
ranks of other nodes and the agent are answered meanwhile.
"""

import asyncio
import os
from pathlib import Path
from typing import Any

from keepstep.agent.carrier.book import Book, Key
from keepstep.agent.carrier.memory import Memory
from keepstep.core.errors import InputError, NotFound
from keepstep.core.manifest import File
from keepstep.core.slotfile import Source, name_of
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


async def _stored(book: Book, key: Key, at: Stamp, folder: Path) -> tuple[dict[str, Any], File]:
    damaged: InputError | None = None
    for memory, number in list(book.candidates(key, at)):
        slot = memory.slots[number]
        descriptor = os.dup(memory.descriptor)  # the file may be given up meanwhile
        try:
            source = Source(descriptor, memory.shape, number, slot)
            file = await asyncio.to_thread(source.write, folder, at)
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
