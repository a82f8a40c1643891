"""Files that are whole or not there, also after a power cut. Standard library only."""

import json
import os
from pathlib import Path
from typing import Any


def write(path: Path, content: bytes, *, sync: bool = True) -> None:
    """Replace a file in one step: written beside it, synced, renamed; the folder is synced too.

    Two writers may race; one of them wins whole. OSError when the disk is full: the old file stays. Not
    synced, it survives the end of every process, and a power cut may leave the old file or an empty one.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        beside.rename(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    if sync:
        sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    write(path, json.dumps(value, indent=1).encode() + b"\n")


def sync_folder(path: Path) -> None:
    """Make what was created, renamed or removed in a folder last."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
