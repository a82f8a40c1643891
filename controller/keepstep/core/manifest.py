"""A checkpoint's manifest: written last, so that its presence means complete, and sealed. No torch.

It names every file with its size and checksum, the model and layout that wrote them, and how far the data was
used. The seal is a digest of the manifest itself, so a flipped byte in it is not taken for truth.

Two forms of files are known: pieces in PyTorch's distributed format, which ranks write while they train, and
slots of memory, which carriers write when no rank is left (`core.slotfile`). Both load in every layout.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from keepstep.core import durable, snapshots
from keepstep.core.checkpoints import MANIFEST, Point, point_of
from keepstep.core.clock import SystemClock
from keepstep.core.errors import InputError, KeepstepError
from keepstep.core.ids import Attempt, Step

PIECES, SLOTS = "pieces", "slots"
_FORMATS = {PIECES: 1, SLOTS: 2}  # the first format that knows the form
FORMAT = 2
_BLOCK = 1 << 20
_IRRELEVANT = frozenset({"max_seq", "preset"})  # to the meaning of weights


class CorruptCheckpoint(KeepstepError):
    """A checkpoint whose files are not what its manifest says. The next older one may be whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    bytes: int
    xxh3: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    job: str
    attempt: int
    step: int
    layout: Mapping[str, int]
    model: Mapping[str, Any]
    tokens: int  # trained on so far
    files: Mapping[str, File]
    data: Mapping[str, Any]  # the corpus's position
    torch: str
    written_at: float = 0.0  # wall time, for people
    form: str = PIECES  # of its files

    @property
    def at(self) -> Point:
        return Point(step=Step(self.step), attempt=Attempt(self.attempt))

    def write(self, folder: Path) -> None:
        """Commit: from the moment of the rename the checkpoint is complete."""
        value = {"format": _FORMATS[self.form], **asdict(self), "written_at": SystemClock().wall()}
        durable.write_json(folder / MANIFEST, value | {"seal": _seal(value)})

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """InputError if the folder is incomplete or newer than this program, CorruptCheckpoint if damaged."""
        path = folder / MANIFEST
        try:
            value = json.loads(path.read_bytes())
        except FileNotFoundError as error:
            raise InputError(
                "is no complete checkpoint",
                where=str(folder),
                why=f"it has no {MANIFEST}, which is written last",
                next="Name a folder that has one.",
            ) from error
        except (ValueError, OSError) as error:
            raise _corrupt(path, str(error)) from error
        if not isinstance(value, dict) or not isinstance(value.get("format"), int):
            raise _corrupt(path, "it says no format")
        if value["format"] > FORMAT:
            raise InputError(
                f"the checkpoint has format {value['format']}",
                where=str(path),
                why=f"this version of keepstep reads formats up to {FORMAT}",
                next="Use the version that wrote it, or a newer one.",
            )
        seal = value.pop("seal", None)
        if seal != _seal(value):
            raise _corrupt(path, "its seal does not fit its content")
        named = {field.name: value[field.name] for field in fields(cls) if field.name in value}
        files = {name: File(bytes=file["bytes"], xxh3=file["xxh3"]) for name, file in value["files"].items()}
        manifest = cls(**{**named, "files": files})
        if (at := point_of(folder.name)) is not None and at != manifest.at:
            raise _corrupt(
                path,
                f"the folder says step {at.step} of attempt {at.attempt}, "
                f"the manifest step {manifest.step} of attempt {manifest.attempt}",
            )
        return manifest

    def damage(self, folder: Path, names: Iterable[str]) -> list[str]:
        """What is wrong with files, one sentence for each that is not what was written."""
        found = []
        for name in names:
            file, path = self.files[name], folder / name
            try:
                size = path.stat().st_size
                if size != file.bytes:
                    found.append(f"{name} has {size:,} bytes instead of {file.bytes:,}")
                elif (present := _checksum(path)) != file.xxh3:
                    found.append(f"{name} has checksum {present} instead of {file.xxh3}")
            except OSError as error:
                found.append(f"{name} cannot be read: {error.strerror}")
        return found

    def check_model(self, model: Mapping[str, Any], where: Path) -> None:
        """InputError that names every field in which the checkpoint's model is another one."""
        names = sorted((set(self.model) | set(model)) - _IRRELEVANT)
        different = [
            f"{name} is {self.model.get(name)} there and {model.get(name)} here"
            for name in names
            if self.model.get(name) != model.get(name)
        ]
        if different:
            raise InputError(
                "the checkpoint is of another model",
                where=str(where),
                why="; ".join(different),
                next="Use the model that the checkpoint was made with, or start from other weights.",
            )


def corrupt(folder: Path, damage: Iterable[str]) -> CorruptCheckpoint:
    return _corrupt(folder, "; ".join(damage))


def _corrupt(path: Path, why: str) -> CorruptCheckpoint:
    return CorruptCheckpoint(
        "the checkpoint is damaged",
        where=str(path),
        why=why,
        next="Restore an older checkpoint of the same job; this one must not be used.",
    )


def _checksum(path: Path) -> str:
    digest = snapshots.digest("xxh3")
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _seal(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
