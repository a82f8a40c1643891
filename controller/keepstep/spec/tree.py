"""The fields of the document as a tree, read off its models: for messages, `explain` and completion."""

import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from pydantic.fields import FieldInfo

from keepstep.spec.document import JobDocument
from keepstep.spec.fields import Kind
from keepstep.spec.problems import Path
from keepstep.spec.section import Section


@dataclass(frozen=True, slots=True)
class Entry:
    """One field. `many`: its keys or items are the user's own, and `section` is what each holds."""

    path: tuple[str, ...]
    info: FieldInfo
    section: type[Section] | None
    many: Literal["", "map", "list"]
    kind: Kind | None


def entries(section: type[Section] = JobDocument, path: tuple[str, ...] = ()) -> dict[str, Entry]:
    return {name: _entry((*path, name), info) for name, info in section.model_fields.items()}


def walk(section: type[Section] = JobDocument, path: tuple[str, ...] = ()) -> Iterator[Entry]:
    """Every field, each before those within it."""
    for entry in entries(section, path).values():
        yield entry
        if entry.section is not None:
            yield from walk(entry.section, entry.path)


def section_at(path: Path) -> type[Section] | None:
    """The section whose fields stand at `path`; None: the names there are the user's own."""
    section: type[Section] = JobDocument
    left = list(path)
    while left:
        entry = entries(section).get(str(left.pop(0)))
        if entry is None:
            return None
        if entry.many:
            if not left:
                return None
            left.pop(0)
        if entry.section is None:
            return None
        section = entry.section
    return section


def entry_at(path: Path) -> Entry | None:
    """The field that `path` leads to or into."""
    section: type[Section] | None = JobDocument
    found, left = None, list(path)
    while left and section is not None:
        entry = entries(section).get(str(left.pop(0)))
        if entry is None:
            return found
        found, section = entry, entry.section
        if entry.many and left:
            left.pop(0)
    return found


def _entry(path: tuple[str, ...], info: FieldInfo) -> Entry:
    kinds = [each for each in info.metadata if isinstance(each, Kind)]
    section, many, kind = _look(info.annotation)
    return Entry(path, info, section, many, kinds[0] if kinds else kind)


def _look(annotation: Any) -> tuple[type[Section] | None, Literal["", "map", "list"], Kind | None]:
    """What an annotation holds, beneath Optional, Annotated and one container."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation, "", None
    if origin is typing.Annotated:
        section, many, kind = _look(arguments[0])
        return section, many, next((each for each in arguments[1:] if isinstance(each, Kind)), kind)
    if origin in (types.UnionType, typing.Union):
        looks = [_look(each) for each in arguments if each is not types.NoneType]
        return next((each for each in looks if each[0] or each[2]), (None, "", None))
    if origin is dict:
        section, _, kind = _look(arguments[1])
        return section, "map", kind
    if origin is tuple:
        section, _, kind = _look(arguments[0])
        return section, "list", kind
    return None, "", None
