"""`--set parallelism.tp=4`: a field of the document, given on the command line instead."""

import copy
import re
from collections.abc import Sequence
from typing import Any

from pydantic_core import PydanticCustomError

from keepstep.core.errors import InputError
from keepstep.spec.problems import Path, Place, Problem, shown
from keepstep.spec.scalars import noun
from keepstep.spec.source import Document, Spot, parse_value
from keepstep.spec.tree import section_at

_PART = re.compile(r"([^.\[\]]+)((?:\[\d+\])*)")
MOST = 1000


def apply_overrides(document: Document, overrides: Sequence[str]) -> Document:
    """A new document; later overrides win. The value is YAML; an empty one takes the field out."""
    data, spots = copy.deepcopy(dict(document.data)), dict(document.spots)
    problems = list(document.problems)
    if len(overrides) > MOST:
        raise InputError(
            f"--set {len(overrides)} times", why=f"at most {MOST}", next="Write them into the file."
        )
    for turn, override in enumerate(overrides, start=1):
        key, equals, text = override.partition("=")
        # The value is not repeated in messages: it may be a secret that should not have been there.
        source = f"--set {shown(key)}"
        path = _path(key, source)
        if not equals:
            next_ = f"Write --set {key}=VALUE."
            raise InputError("has no value", where=source, next=next_)
        value, found = parse_value(text, source, turn=turn)
        problems = [problem for problem in problems if problem.path[: len(path)] != path]
        problems += [
            Problem(path=(*path, *each.path), what=each.what, why=each.why, next=each.next) for each in found
        ]
        for below in [each for each in spots if each[: len(path)] == path]:
            del spots[below]
        place = Place(turn, 0, 0, "--set")
        spots[path] = Spot(place, place)
        _put(data, path, value, source)
    return Document(data=data, spots=spots, source=document.source, problems=tuple(problems))


def _path(key: str, source: str) -> Path:
    parts: list[str | int] = []
    for piece in key.split("."):
        match = _PART.fullmatch(piece.strip())
        if match is None:
            next_ = "As in --set parallelism.tp=4 or --set run.command[2]=--fast."
            raise InputError("names no field", where=source, next=next_)
        parts.append(match[1])
        parts.extend(int(index) for index in re.findall(r"\d+", match[2]))
    return tuple(parts)


def _put(data: dict[str, Any], path: Path, value: Any, source: str) -> None:
    at: Any = data
    for depth, part in enumerate(path):
        last = depth == len(path) - 1
        if isinstance(part, int):
            if not isinstance(at, list) or part >= len(at):
                length = len(at) if isinstance(at, list) else 0
                raise InputError(f"there is no item {part}", where=source, why=f"it has {length}, from 0")
            if last:
                at[part] = value
            at = at[part]
            continue
        if isinstance(at, str):
            at = _spelt_out(data, path[:depth], at)
        if not isinstance(at, dict):
            inside = ".".join(map(str, path[:depth]))
            what = f"{inside} is {noun(at)}, not a mapping"
            next_ = f"Set all of it:  --set '{inside}={{{part}: ...}}'"
            raise InputError(what, where=source, next=next_)
        if last and value is None:
            at.pop(part, None)
        elif last:
            at[part] = value
        elif at.get(part) is None:
            at[part] = {}
        at = at.get(part)


def _spelt_out(data: dict[str, Any], path: Path, word: str) -> Any:
    """`model: debug` as the mapping that it stands for, put in its place."""
    section = section_at(path)
    try:
        spelt = section.short(word) if section else word
    except PydanticCustomError:
        return word
    holder: Any = data
    for part in path[:-1]:
        holder = holder[part]
    if isinstance(spelt, dict):
        holder[path[-1]] = spelt
    return spelt
