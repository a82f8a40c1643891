"""What is wrong with a spec: one problem each, placed in the text, told together and in the text's order."""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from keepstep.core.errors import InputError

Path = tuple[str | int, ...]
MOST_TOLD = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """`path` is the field; at_key: the name of the field is wrong, not its value."""

    path: Path
    what: str
    why: str = ""
    next: str = ""
    at_key: bool = False


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """Lines and columns count from 1; line 0: not in a file, `source` says it all."""

    turn: int  # of the source: the file comes before what overrides it
    line: int
    column: int
    source: str

    def __str__(self) -> str:
        return f"{self.source}:{self.line}:{self.column}" if self.line else self.source


class Map(Protocol):
    def place(self, path: Path, *, at_key: bool = False) -> Place: ...


class SpecError(InputError):
    """One problem, or several: then `what` tells all of them and `problems` has each."""

    def __init__(self, problems: Sequence[Problem], told: Sequence[InputError]) -> None:
        first = told[0]
        if len(told) == 1:
            super().__init__(first.what, where=first.where, why=first.why, next=first.next)
        else:
            lines = [str(error) for error in told[:MOST_TOLD]]
            rest = len(told) - len(lines)
            tail = f"{len(told)} problems" + (f", the first {MOST_TOLD} of which are shown" if rest else "")
            super().__init__("\n".join([*lines, f"{tail}."]))
        self.problems = tuple(problems)


def refuse(problems: Iterable[Problem], text: Map) -> None:
    """Raise SpecError if there is any problem."""
    placed = sorted(((text.place(p.path, at_key=p.at_key), p) for p in problems), key=lambda pair: pair[0])
    told = [
        InputError(f"{dotted(p.path)}: {p.what}" if p.path else p.what, where=str(at), why=p.why, next=p.next)
        for at, p in placed
    ]
    if told:
        raise SpecError([p for _, p in placed], told)


def dotted(path: Path) -> str:
    """run.command[2]"""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def counted(count: int, noun: str, many: str = "") -> str:
    """1 rank, 2 ranks, 16,384 ranks"""
    return f"{count:,} {noun if count == 1 else many or noun + 's'}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A sentence that helps with a misspelt word: the nearest ones, or all if they are few."""
    known = list(known)
    folded = {name.casefold().replace("-", "_"): name for name in known}
    near = difflib.get_close_matches(word.casefold().replace("-", "_"), folded, n=2, cutoff=0.6)
    if near:
        return f"Did you mean {' or '.join(folded[name] for name in near)}?"
    return f"Known here: {', '.join(known)}." if known else ""


def shown(value: object, width: int = 40) -> str:
    """A value as part of a sentence: short, on one line."""
    text = value if isinstance(value, str) else repr(value)
    text = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
    if len(text) > width:
        text = text[: width - 3] + "..."
    return f'"{text}"' if not text or " " in text or text != str(value) else text
