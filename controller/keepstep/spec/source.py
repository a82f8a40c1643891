"""The text of a spec, read with the place of everything in it.

YAML leaves unquoted words to guessing: 1.1 readers take `no` for false, `010` for 8 and `1:30` for 90, and
`3e-4` for text; 1.2 readers do not. Here nothing is guessed: an unquoted word stays the text that was
written, marked as `Plain`, and the field that it belongs to decides what it may be (see fields.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path as File
from typing import Any

import yaml

from keepstep.core.errors import InputError
from keepstep.spec.problems import Path, Place, Problem

MAX_BYTES = 256 * 1024
MAX_VALUES = 20_000
_CORE = "tag:yaml.org,2002:"
_MARKS_OF_OTHER_ENCODINGS = (b"\xff\xfe", b"\xfe\xff")


class Plain(str):
    """An unquoted scalar, as written."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Spot:
    """Where a key and its value begin."""

    key: Place
    value: Place


@dataclass(frozen=True, slots=True)
class Document:
    data: Mapping[str, Any]
    spots: Mapping[Path, Spot]
    source: str
    problems: tuple[Problem, ...] = ()  # of the text itself

    def place(self, path: Path, *, at_key: bool = False) -> Place:
        """Of a field, or of the nearest one around it if it is not in the text."""
        if path and path not in self.spots:
            beneath = [at for at in self.spots if at[: len(path)] == path]
            path = min(beneath, key=len, default=path)  # --set made the field for the sake of one within it
        for length in range(len(path), 0, -1):
            spot = self.spots.get(path[:length])
            if spot is not None:
                return spot.key if at_key or length < len(path) else spot.value
        return Place(0, 1 if self.spots else 0, 1, self.source)


def read_file(file: File) -> str:
    name = str(file)
    try:
        with file.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except IsADirectoryError:
        raise InputError("is a folder, not a file", where=name, next="Name the YAML file in it.") from None
    except FileNotFoundError:
        raise InputError("no such file", where=name, next="Look for it with ls, or name another.") from None
    except (OSError, ValueError) as error:
        raise InputError("cannot be read", where=name, why=str(error)) from None
    return decoded(raw, name)


def decoded(raw: bytes, name: str) -> str:
    if len(raw) > MAX_BYTES:
        why = f"a spec has at most {MAX_BYTES // 1024} KiB"
        raise InputError("too large for a job spec", where=name, why=why, next="Is it the right file?")
    if raw.startswith(_MARKS_OF_OTHER_ENCODINGS):
        raise InputError("is UTF-16 text", where=name, next="Save it as UTF-8.")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        why = f"byte {error.start} is not UTF-8"
        raise InputError("is not text", where=name, why=why, next="A job spec is YAML in UTF-8.") from None
    if "\0" in text:
        raise InputError("is not text", where=name, why="it has NUL bytes", next="Is it the right file?")
    return text


def parse(text: str, source: str, *, turn: int = 0, what: str = "a job spec") -> Document:
    """The mapping in `text`; InputError if it is no YAML, or holds anything but one mapping."""
    node = _compose(text, source)
    if node is None:
        next_ = 'The least that runs is:  run: {command: "python train.py"}'
        raise InputError("is empty", where=source, next=next_)
    if not isinstance(node, yaml.MappingNode):
        kind = "a list" if isinstance(node, yaml.SequenceNode) else "a single value"
        why = f"the text is {kind}"
        next_ = f"{what[:1].upper()}{what[1:]} is a mapping: lines of   field: value"
        raise InputError(f"is not {what}", where=f"{source}:1:1", why=why, next=next_)
    reader = _Reader(source, turn)
    data = reader.value(node, ())
    return Document(data=data, spots=reader.spots, source=source, problems=tuple(reader.problems))


def parse_value(text: str, source: str, *, turn: int) -> tuple[Any, tuple[Problem, ...]]:
    """Any one value, as the right-hand side of --set has it; empty: None."""
    node = _compose(text, source)
    if node is None:
        return None, ()
    reader = _Reader(source, turn)
    return reader.value(node, ()), tuple(reader.problems)


def _compose(text: str, source: str) -> yaml.Node | None:
    if len(text) > MAX_BYTES:
        decoded(text.encode(errors="replace"), source)  # says why
    try:
        node: yaml.Node | None = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        raise _not_yaml(error, source) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        column = error.position - text.rfind("\n", 0, error.position)
        letter = f"U+{error.character:04X}" if isinstance(error.character, int) else repr(error.character)
        what = f"{letter} may not stand in YAML"
        raise InputError(what, where=f"{source}:{line}:{column}", next="Remove it.") from None
    except RecursionError:
        raise InputError("is nested too deeply", where=source, next="Is it the right file?") from None
    except ValueError as error:  # PyYAML's scanner on numbers too large for a character (\U escapes)
        raise InputError("is not YAML", where=source, why=str(error)) from None
    return node


def _not_yaml(error: yaml.MarkedYAMLError, source: str) -> InputError:
    mark = error.problem_mark or error.context_mark
    where = f"{source}:{mark.line + 1}:{mark.column + 1}" if mark else source
    problem = error.problem or "it breaks off"
    if r"'\t'" in problem:
        return InputError("a tab", where=where, why="YAML is indented with spaces", next="Replace the tab.")
    if "expected a single document" in (error.context or ""):
        next_ = "Leave out what follows ---, or write a file for each job."
        return InputError("a second document begins", where=where, why="a file holds one job", next=next_)
    if "mapping values are not allowed here" in problem:
        next_ = "Quote a value that has a colon in it, or look at the indentation of this line."
        return InputError("not YAML", where=where, why="a colon where none can be", next=next_)
    why = f"{error.context}, {problem}" if error.context else problem
    return InputError("not YAML", where=where, why=why, next="Look at the lines above it, too.")


class _Reader:
    """Walks the nodes once; notes places and problems on its way."""

    def __init__(self, source: str, turn: int) -> None:
        self.source, self.turn = source, turn
        self.spots: dict[Path, Spot] = {}
        self.problems: list[Problem] = []
        self._count = 0
        self._open: set[int] = set()  # nodes that are being walked, to notice one that holds itself
        self._resolver = yaml.SafeLoader("")

    def value(self, node: yaml.Node, path: Path) -> Any:
        self._count += 1
        if self._count > MAX_VALUES:
            raise InputError("too many values for a job spec", where=self.source, why="aliases multiply them")
        if id(node) in self._open:
            raise InputError("an alias that holds itself", where=str(self._place(node)))
        match node:
            case yaml.ScalarNode():
                return self._scalar(node, path)
            case yaml.SequenceNode():
                self._tag(node, path, "seq")
                return self._within(node, lambda: self._sequence(node, path))
            case yaml.MappingNode():
                self._tag(node, path, "map")
                return self._within(node, lambda: self._mapping(node, path))
        raise AssertionError(node)

    def _within(self, node: yaml.Node, walk: Any) -> Any:
        self._open.add(id(node))
        result = walk()
        self._open.discard(id(node))
        return result

    def _sequence(self, node: yaml.SequenceNode, path: Path) -> list[Any]:
        items = []
        for index, item in enumerate(node.value):
            at = self._place(item)
            self.spots[*path, index] = Spot(at, at)
            items.append(self.value(item, (*path, index)))
        return items

    def _mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                self.problems.append(Problem(path=path, what="a field's name is a list or a mapping"))
                continue
            name = str(key.value)
            here = (*path, name)
            if name in data:
                first = self.spots[here].key
                what = f"written twice, in lines {first.line} and {key.start_mark.line + 1}"
                self.problems.append(Problem(path=here, what=what, next="Keep one of them.", at_key=True))
                self.spots[here] = Spot(self._place(key), self._place(value))
                continue
            self.spots[here] = Spot(self._place(key), self._place(value))
            if key.tag == f"{_CORE}merge":
                why = "keepstep does not merge mappings"
                problem = Problem(path=here, what="cannot be used", why=why, next="Write the fields out.")
                self.problems.append(problem)
                continue
            data[name] = self.value(value, here)
        return data

    def _scalar(self, node: yaml.ScalarNode, path: Path) -> str | None:
        text = str(node.value)
        if node.style is not None:
            self._tag(node, path, "str")
            return text
        implied = self._resolver.resolve(yaml.ScalarNode, text, (True, False))  # type: ignore[no-untyped-call]
        if node.tag == implied:
            return None if implied == f"{_CORE}null" else Plain(text)
        self._tag(node, path, "str")  # an explicit !!str is as good as quotes
        return text

    def _tag(self, node: yaml.Node, path: Path, expected: str) -> None:
        if node.tag != f"{_CORE}{expected}":
            tag = str(node.tag).replace(_CORE, "!!")
            what = f"the tag {tag} cannot be used"
            self.problems.append(Problem(path=path, what=what, next="Write the value without it."))

    def _place(self, node: yaml.Node) -> Place:
        mark = node.start_mark
        return Place(self.turn, mark.line + 1, mark.column + 1, self.source)
