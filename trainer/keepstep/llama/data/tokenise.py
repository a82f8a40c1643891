"""Text tokenised once, into shards: by as many processes as there are cores, resumable after any end.

The parent cuts the sources into units, writes them down, and numbers those whose shard is missing into a
file; workers take their next number from it by reading (they share its offset). A shard appears whole, its
sidecar after it, the manifest after all. So whatever is killed, the same command goes on.
"""

import ctypes
import fcntl
import json
import os
import signal
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from keepstep.core import durable
from keepstep.core.errors import InputError, KeepstepError, Refused
from keepstep.llama.data import records, shards
from keepstep.llama.data.records import Unit
from keepstep.llama.data.shards import Manifest, Shard
from keepstep.llama.tokenizer import Tokens, open_tokenizer

UNIT_BYTES = 64 << 20
_PLAN, _LOCK = "plan.json", ".lock"
_NUMBER = struct.Struct("<I")
_NAMED = 20  # bad records of a shard that are named
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    tokenizer: str  # its file, or bytes
    tokenization: str  # its name: part of what must stay the same
    field: str
    sources: Mapping[str, str]  # paths by name
    unit_bytes: int
    units: Sequence[Unit]

    def write(self, folder: Path) -> None:
        durable.write_json(folder / _PLAN, asdict(self))

    @classmethod
    def read(cls, folder: Path) -> "Plan":
        value = json.loads((folder / _PLAN).read_bytes())
        found = [
            Unit(**{**unit, "files": tuple(tuple(f) for f in unit["files"])}) for unit in value.pop("units")
        ]
        return cls(**value, units=found)

    def files(self) -> list[str]:
        """Of each unit's shard, relative to the store."""
        seen: Counter[str] = Counter()
        names = []
        for unit in self.units:
            names.append(f"{unit.source}/shard-{seen[unit.source]:05d}.tokens")
            seen[unit.source] += 1
        return names


def tokenise(
    out: Path,
    sources: Mapping[str, Path],
    *,
    tokenizer: str,
    field: str = "text",
    workers: int = 1,
    unit_bytes: int = UNIT_BYTES,
    tell: Callable[[Shard, int, int], None] = lambda *_: None,
    make: Callable[[Path, Sequence[int]], Iterator[Shard]] | None = None,
) -> Manifest:
    """Make or complete a store. `tell` hears of each new shard, how many are complete, and of how many.

    `make` is who makes the shards of units by number: so many workers on this machine if it is left out.

    InputError for what cannot be tokenised, and for a store that was begun with other input; Refused while
    another process writes it.
    """
    chosen = open_tokenizer(tokenizer)
    for name in sources:
        if not name.replace("-", "").replace("_", "").isalnum():
            raise InputError(f"{name!r} is no name", where="--source", next="Use letters, digits, - and _.")
    paths = {name: path.absolute() for name, path in sources.items()}
    found = [unit for name, path in paths.items() for unit in records.units(name, path, unit_bytes)]
    if empty := [name for name in sources if all(unit.source != name for unit in found)]:
        raise InputError(
            "there is no text", where=f"source {empty[0]}", why=f"{paths[empty[0]]} has no files"
        )
    plan = Plan(
        tokenizer=tokenizer if tokenizer == "bytes" else str(Path(tokenizer).absolute()),
        tokenization=chosen.name, field=field, sources={n: str(p) for n, p in paths.items()},
        unit_bytes=unit_bytes, units=found,
    )  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    with _locked(out):
        _begin(out, plan)
        files = plan.files()
        missing = [number for number, file in enumerate(files) if not _sidecar(out / file).is_file()]
        done = len(files) - len(missing)
        makes = make or partial(_by_processes, workers=workers)
        for shard in makes(out, missing) if missing else ():
            done += 1
            tell(shard, done, len(files))
        complete = [_read_sidecar(out / file) for file in files]
        manifest = Manifest(
            tokenizer=chosen.name, vocabulary=chosen.vocabulary, bos=chosen.bos, eos=chosen.eos,
            sources={
                name: tuple(s for s, unit in zip(complete, found, strict=True) if unit.source == name)
                for name in sources
            },
        )  # fmt: skip
        manifest.write(out)
    return manifest


def _begin(out: Path, plan: Plan) -> None:
    """Write the plan down, or see that it is the one that was begun; clear what a killed process left."""
    if (out / _PLAN).is_file():
        begun = Plan.read(out)
        if begun != plan:
            raise InputError(
                "the folder was begun with other input", where=str(out), why=_difference(begun, plan),
                next="Tokenise into a new folder, or delete this one.",
            )  # fmt: skip
    else:
        if any(entry.name != _LOCK for entry in out.iterdir()):
            raise InputError("is not empty", where=str(out), next="Name a new folder.")
        plan.write(out)
    for left in out.glob("**/.*.*.[0-9]*"):
        left.unlink()
    for shard in out.glob("*/*.tokens"):
        if not _sidecar(shard).is_file():
            shard.unlink()
    for sidecar in out.glob("*/*.json"):
        if not sidecar.with_suffix(".tokens").is_file():  # somebody took a damaged shard away
            sidecar.unlink()


def _difference(begun: Plan, now: Plan) -> str:
    for name in ("tokenization", "field", "sources", "unit_bytes"):
        there, here = getattr(begun, name), getattr(now, name)
        if there != here:
            return f"{name} {there} then, {here} now"
    before = {file[0]: file for unit in begun.units for file in unit.files}
    after = {file[0]: file for unit in now.units for file in unit.files}
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    return (
        f"{len(changed)} files were changed, added or removed, the first is {changed[0]}"
        if changed
        else "units"
    )


def _by_processes(out: Path, missing: Sequence[int], *, workers: int) -> Iterator[Shard]:
    """Shards as they are completed. Ends all workers however it ends."""
    reading, writing = os.pipe()
    processes: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryFile() as numbers, os.fdopen(reading, "rb") as told:
        try:
            try:
                numbers.write(b"".join(_NUMBER.pack(number) for number in missing))
                numbers.flush()
                numbers.seek(0)
                command = [sys.executable, "-m", "keepstep.llama.data", "worker", str(out), str(os.getpid())]
                while len(processes) < min(workers, len(missing)):
                    processes.append(subprocess.Popen(command, stdin=numbers, stdout=writing))
            finally:
                os.close(writing)
            for line in told:
                yield made(out, json.loads(line))
            if codes := [code for process in processes if (code := process.wait()) != 0]:
                raise KeepstepError(
                    "a worker ended", where="tokenise", why=f"exit code {codes[0]}",
                    next="What is complete stays: the same command goes on from here.",
                )  # fmt: skip
        finally:
            for process in processes:
                process.kill()
                process.wait()


def work(out: Path, parent: int) -> int:
    """A worker: units by the numbers on stdin, a line of JSON for each on stdout."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return 1  # it was gone before it could be watched
    try:
        worker = Worker(out)
        while number := os.read(0, _NUMBER.size):
            (unit,) = _NUMBER.unpack(number)
            _say(worker.told(unit))
    except KeepstepError as error:
        _say(error_of(error))
        return error.exit_code
    return 0


class Worker:
    """Makes shards of a store's units, in whatever process."""

    def __init__(self, out: Path) -> None:
        self._out, self._plan = out, Plan.read(out)
        self._files = self._plan.files()
        tokenizer = open_tokenizer(self._plan.tokenizer)
        self._encode, self._dtype = tokenizer.encode, shards.dtype_of(tokenizer.vocabulary)

    def told(self, number: int) -> Mapping[str, Any]:
        """The shard of unit `number` is made; what `made` reads. A unit that cannot be read raises."""
        file, unit = self._files[number], self._plan.units[number]
        _make(self._out, file, unit, self._plan.field, self._encode, self._dtype)
        return {"made": file}


def made(out: Path, told: Mapping[str, Any]) -> Shard:
    """InputError if a worker said so."""
    if "error" in told:
        raise InputError(**told["error"])
    return _read_sidecar(out / told["made"])


def error_of(error: KeepstepError) -> Mapping[str, Any]:
    """What `made` raises again."""
    told = {"what": error.what, "where": error.where, "why": error.why, "next": error.next}
    return {"error": {name: text[:500] for name, text in told.items()}}


def _make(
    out: Path, file: str, unit: Unit, field: str, encode: Callable[[bytes], Tokens], dtype: Any
) -> None:
    texts: list[Tokens] = []
    text_bytes = 0
    bad: Counter[str] = Counter()
    named: list[str] = []
    for record in records.records(unit, field):
        if record.bad:
            bad[record.bad] += 1
            if len(named) < _NAMED:
                named.append(f"{record.where}: {record.bad}")
            continue
        texts.append(encode(record.text).astype(dtype))
        text_bytes += len(record.text)
    tail = shards.write_shard(out / file, texts, dtype)
    shard = Shard(
        file=file, documents=len(texts), tokens=sum(len(text) for text in texts), text_bytes=text_bytes,
        tail=tail, made_from=asdict(unit), bad=dict(bad), named=tuple(named), hashed=True,
    )  # fmt: skip
    durable.write_json(_sidecar(out / file), asdict(shard))


def _say(value: Mapping[str, Any]) -> None:
    """One short line: the pipe's writers do not mix below 4,096 bytes."""
    os.write(1, json.dumps(value).encode() + b"\n")


def _sidecar(shard: Path) -> Path:
    return shard.with_suffix(".json")


def _read_sidecar(shard: Path) -> Shard:
    return Shard(**json.loads(_sidecar(shard).read_bytes()))


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    with (out / _LOCK).open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Refused(
                "the folder is being written", where=str(out), why="another process tokenises into it",
                next="Wait until it is done, or end it.",
            ) from error  # fmt: skip
        yield
