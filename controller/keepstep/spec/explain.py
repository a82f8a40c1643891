"""`spec explain` and `spec schema`: what the models say of themselves."""

import textwrap
from collections.abc import Iterable
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from keepstep.core.errors import InputError
from keepstep.core.job import UNLIMITED
from keepstep.spec.document import JobDocument
from keepstep.spec.problems import did_you_mean
from keepstep.spec.scalars import Interval, duration_text, size_text
from keepstep.spec.section import Section
from keepstep.spec.tree import Entry, entries, walk

_BOUNDS = (("ge", "at least"), ("gt", "more than"), ("le", "at most"), ("lt", "less than"))
_WIDTH = 100


def paths() -> tuple[str, ...]:
    """Every field, dotted; what the user names himself stands as NAME or is left out."""
    return tuple(".".join(entry.path) for entry in walk())


def explain(path: str = "") -> str:
    """The meaning, way of writing, bounds and default of a field, and the fields within it."""
    if not path.strip("."):
        return "\n".join([_one_line(JobDocument.__doc__ or ""), "", *_listed(entries())])
    section: type[Section] | None = JobDocument
    entry: Entry | None = None
    for part in path.strip(".").replace("[", ".").replace("]", "").split("."):
        if entry is not None and entry.many and not _belongs(entry, part):
            entry = Entry(entry.path, entry.info, entry.section, "", entry.kind)  # one of the user's own
            continue
        known = entries(section, entry.path if entry else ()) if section else {}
        if part not in known:
            raise _unknown(path, entry, part, known)
        entry = known[part]
        section = entry.section
    assert entry is not None
    return _told(entry)


def schema() -> dict[str, Any]:
    """JSON Schema of the document, with meanings and with defaults as they are written."""
    data = JobDocument.model_json_schema()
    data["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    data["title"] = "keepstep job"
    definitions = data.get("$defs", {})
    for model in _models():
        target = data if model is JobDocument else definitions[model.__name__]
        for name, entry in entries(model).items():
            field = target["properties"][name]
            field["description"] = _one_line(entry.info.description or "")  # pydantic drops a repeated one
            field.pop("default", None)
            field.pop("default_text", None)
            default = _default_value(entry)
            if default is not None:
                field["default"] = default
            elif derived := _derived(entry.info):
                field["description"] = f"{field['description']} Default: {derived}."
            if entry.section is not None and not entry.many:
                _also_empty(field)
    return data


def _models() -> Iterable[type[Section]]:
    return {JobDocument: None} | {entry.section: None for entry in walk() if entry.section is not None}


def _also_empty(field: dict[str, Any]) -> None:
    """A section with nothing beneath it counts as left out; so an editor should not complain."""
    if "$ref" in field:
        field["anyOf"] = [{"$ref": field.pop("$ref")}, {"type": "null"}]


def _told(entry: Entry) -> str:
    lines = [".".join(entry.path), _indented(entry.info.description or "")]
    facts = []
    if entry.kind is not None:
        facts.append(("written as", entry.kind.written))
        if entry.kind.example:
            facts.append(("for example", entry.kind.example))
    facts += [("allowed", text) for text in (_allowed(entry),) if text]
    facts.append(("default", _default_text(entry)))
    if entry.many:
        facts.append(("holds", "a mapping from names of your own" if entry.many == "map" else "a list"))
    lines += [f"  {name + ':':<13}{text}" for name, text in facts]
    if entry.section is not None:
        if entry.section.__doc__:
            lines += ["", _indented(_one_line(entry.section.__doc__))]
        lines += ["", "  Fields:", *(f"  {line}" for line in _listed(entries(entry.section, entry.path)))]
    return "\n".join(lines)


def _listed(known: dict[str, Entry]) -> list[str]:
    width = max(len(name) for name in known)
    return [f"  {name:<{width}}  {_one_line(entry.info.description or '')}" for name, entry in known.items()]


def _allowed(entry: Entry) -> str:
    words = _words(entry.info.annotation)
    extra = entry.info.json_schema_extra
    if not words and isinstance(extra, dict) and isinstance(extra.get("enum"), list):
        words = [str(each) for each in extra["enum"] if each is not None]  # type: ignore[union-attr]
    if words:
        return ", ".join(words)
    limits = [
        (said, limit)
        for name, said in _BOUNDS
        for limit in (getattr(each, name, None) for each in _metadata(entry.info))
        if limit is not None
    ]
    return ", ".join(dict.fromkeys(f"{said} {_value_text(entry, limit)}" for said, limit in limits))


def _metadata(info: FieldInfo) -> list[Any]:
    """Of a field, wherever Optional has put it."""
    found = list(info.metadata)
    for each in get_args(info.annotation):
        found += [
            part
            for extra in getattr(each, "__metadata__", ())
            for part in getattr(extra, "metadata", [extra])
        ]
    return found


def _words(annotation: Any) -> list[str]:
    if get_origin(annotation) is Literal:
        return [str(each) for each in get_args(annotation)]
    return [word for each in get_args(annotation) for word in _words(each)]


def _default_text(entry: Entry) -> str:
    if entry.info.is_required():
        return "none: it must be given"
    derived = _derived(entry.info)
    if derived:
        return derived
    value = _default_value(entry)
    if value is None:
        return _default_section(entry)
    if isinstance(value, list):
        return f"[{', '.join(map(str, value))}]"
    return str(value) if not isinstance(value, int) or isinstance(value, bool) else f"{value:,}"


def _default_section(entry: Entry) -> str:
    if entry.many:
        return "empty"
    given = entry.info.default
    if not isinstance(given, Section):
        return "left out"
    values = given.model_dump(exclude_unset=True)
    return (
        f"{{{', '.join(f'{name}: {value}' for name, value in values.items())}}}"
        if values
        else "its fields' own"
    )


def _derived(info: FieldInfo) -> str:
    extra = info.json_schema_extra
    return str(extra.get("default_text", "")) if isinstance(extra, dict) else ""


def _default_value(entry: Entry) -> Any:
    """As one would write it; None: there is none, or it follows from other fields."""
    value = entry.info.default
    written = entry.kind.written if entry.kind else ""
    if written.startswith("auto") and (value is None or value == Interval()):
        return "auto"
    if value is PydanticUndefined or value is None or isinstance(value, Section):
        return None
    if isinstance(value, tuple):
        return list(value) or None
    if isinstance(value, bool | str):
        return value
    return _value_text(entry, value) if "duration" in written or written.startswith("a size") else value


def _value_text(entry: Entry, value: float) -> str:
    written = entry.kind.written if entry.kind else ""
    if "duration" in written:
        return duration_text(value)
    if written.startswith("a size"):
        return size_text(int(value))
    if value == UNLIMITED and "unlimited" in written:
        return "unlimited"
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _belongs(entry: Entry, part: str) -> bool:
    """Whether a part names a field of what a list or mapping holds, rather than one of its keys."""
    return entry.section is not None and part in entry.section.model_fields


def _unknown(path: str, entry: Entry | None, part: str, known: dict[str, Entry]) -> InputError:
    inside = ".".join(entry.path) if entry else ""
    hint = did_you_mean(part, known)
    if known and not hint.startswith("Did"):
        same = [name for name in paths() if name.rsplit(".", 1)[-1] == part]
        hint = f"Did you mean {' or '.join(same[:3])}?" if same else hint
    if not known:
        hint = f"{inside} has no fields within it."
    return InputError(f"no such field: {path}", next=hint)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _indented(text: str) -> str:
    return textwrap.fill(_one_line(text), _WIDTH, initial_indent="  ", subsequent_indent="  ")
