"""What is known of scripts from their last runs: which modules they import, and what they set too early.

Kept by the script's own content, so that a changed script begins anew. A warm rank does not tell what it
found loaded, so a record only grows.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from keepstep.core import durable

_log = logging.getLogger("keepstep.agent")
_RECORDS_MAX = 200
WORTH_MODULES = 20  # fewer are imported faster than a second standby is loaded


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    modules: tuple[str, ...] = ()  # of site-packages, in the order of their import
    sets: tuple[str, ...] = ()  # variables whose value a run changed
    unfit: dict[str, str] = field(
        default_factory=dict
    )  # top-level names that are never loaded ahead, and why
    tried: bool = False  # the others were found fit
    conflict: str = ""  # why nothing is loaded ahead for this script, although it could be

    @property
    def fit(self) -> tuple[str, ...]:
        found = tuple(name for name in self.modules if name.partition(".")[0] not in self.unfit)
        return found if len(found) >= WORTH_MODULES and not self.conflict else ()

    def with_run(self, modules: Sequence[str], sets: Sequence[str]) -> "Known":
        """After a run of the script."""
        more = tuple(dict.fromkeys((*self.modules, *modules)))
        sets = tuple(sorted({*self.sets, *sets}))
        return replace(self, modules=more, sets=sets, tried=self.tried and more == self.modules)


class Learnt:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def of(self, script: str) -> Known:
        try:
            raw: dict[str, Any] = json.loads((self._folder / f"{script}.json").read_bytes())
            modules, sets = tuple(raw["modules"]), tuple(raw["sets"])
            rest = {name: raw[name] for name in ("unfit", "tried", "conflict")}
            return Known(modules=modules, sets=sets, **rest)
        except (OSError, ValueError, KeyError, TypeError):  # none yet, or of another version
            return Known()

    def keep(self, script: str, known: Known) -> None:
        try:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            durable.write_json(self._folder / f"{script}.json", asdict(known))
            newest = sorted(self._folder.glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
            for old in newest[:-_RECORDS_MAX]:
                old.unlink(missing_ok=True)
        except OSError as error:
            _log.warning("what a script imports cannot be kept in %s: %s", self._folder, error)


def digest(interpreter: Sequence[str], argv: Sequence[str], content: bytes) -> str:
    """A script, as far as it decides what is imported."""
    whole = json.dumps([list(interpreter), list(argv[:2] if argv[0] == "-m" else argv[:1])]).encode()
    return hashlib.sha256(whole + b"\0" + content).hexdigest()[:16]


def accounts(directory: Path) -> tuple[list[str], list[str]]:
    """What the ranks of an attempt have told so far: modules and variables."""
    modules: dict[str, None] = {}
    sets: set[str] = set()
    for path in sorted(directory.glob("learnt-*.json")):
        try:
            told = json.loads(path.read_bytes())
            modules |= dict.fromkeys(told["modules"])
            sets.update(told["sets"])
        except (OSError, ValueError, KeyError, TypeError):
            continue  # half of it, or what a script has put in its place
    return list(modules), sorted(sets)
