"""What pydantic found, in our words."""

import difflib
from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from keepstep.spec.problems import Path, Problem, did_you_mean, shown
from keepstep.spec.scalars import duration_text, noun, size_text
from keepstep.spec.tree import Entry, entries, entry_at, section_at, walk

_BOUNDS = {
    "greater_than_equal": ("ge", "at least"),
    "greater_than": ("gt", "more than"),
    "less_than_equal": ("le", "at most"),
    "less_than": ("lt", "less than"),
}
_LISTS = {"tuple_type", "list_type"}
_MAPPINGS = {"dict_type", "mapping_type", "model_type", "model_attributes_type"}
_MISPLACED = {"size": "gpus_per_node", "gpus": "gpus_per_node", "slots": "gpus_per_node"}


def problems_of(error: ValidationError) -> Iterable[Problem]:
    for detail in error.errors(include_url=False):
        yield _problem(detail)


def _problem(detail: ErrorDetails) -> Problem:
    path: Path = tuple(detail["loc"])
    at_key = bool(path) and path[-1] == "[key]"
    if at_key:
        path = path[:-1]
    context: dict[str, Any] = detail.get("ctx") or {}
    value = detail.get("input")
    match detail["type"]:
        case "spec":
            what, why, next_ = (str(context.get(part, "")) for part in ("what", "why", "next"))
            return Problem(path=path, what=what, why=why, next=next_, at_key=at_key)
        case "missing" if path and isinstance(path[-1], int):
            return Problem(path=path[:-1], what="has too few values", next=_meaning(path))
        case "missing":
            return Problem(path=path, what="is missing", next=_meaning(path))
        case "extra_forbidden":
            return _unknown(path)
        case kind if kind in _BOUNDS:
            key, words = _BOUNDS[kind]
            bound = _in_units(entry_at(path), context[key])
            return Problem(path=path, what=f"must be {words} {bound}, not {_said(value)}")
        case kind if kind in _LISTS:
            return Problem(path=path, what=f"must be a list, not {noun(value)}", next="Write it as [a, b].")
        case kind if kind in _MAPPINGS:
            return Problem(path=path, what=f"must be a mapping, not {noun(value)}")
        case "too_long" | "too_short":
            length = context.get("max_length", context.get("min_length"))
            return Problem(path=path, what=f"must have {length} values, not {context.get('actual_length')}")
        case _:
            return Problem(path=path, what=detail["msg"][:1].lower() + detail["msg"][1:])


def _meaning(path: Path) -> str:
    entry = entry_at(path)
    return " ".join((entry.info.description or "").split()) if entry else ""


def _unknown(path: Path) -> Problem:
    name = str(path[-1])
    section = section_at(path[:-1])
    known = entries(section) if section else {}
    elsewhere = [] if _likeness(name, known) >= 0.75 else _elsewhere(name)
    hint = f"Did you mean {' or '.join(elsewhere)}?" if elsewhere else did_you_mean(name, known)
    return Problem(path=path, what="no such field", next=hint, at_key=True)


def _elsewhere(name: str) -> list[str]:
    """Fields of this name, or nearly, in another place."""
    wanted = _MISPLACED.get(name, name)
    everywhere = {entry.path[-1]: ".".join(entry.path) for entry in reversed(list(walk()))}
    near = difflib.get_close_matches(wanted, everywhere, n=1, cutoff=0.8)
    return [everywhere[each] for each in near]


def _likeness(name: str, known: Iterable[str]) -> float:
    return max((difflib.SequenceMatcher(None, each, name).ratio() for each in known), default=0.0)


def _in_units(entry: Entry | None, bound: float) -> str:
    written = entry.kind.written if entry and entry.kind else ""
    if "duration" in written:
        return duration_text(bound)
    if written.startswith("a size"):
        return size_text(int(bound))
    return f"{bound:,}" if isinstance(bound, int) else f"{bound:g}"


def _said(value: Any) -> str:
    return shown(value) if isinstance(value, str) else noun(value) if value is None else str(value)
