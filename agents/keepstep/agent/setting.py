"""What a script sets in its environment, and whether before or after its imports, read from its source.

A cold start runs the script's first lines before its imports; a warm one has the imports done. A variable
that is set to a constant before the first import of what may be loaded ahead can be set for a standby, too.
One that is set between such imports, under a condition or to something that is computed has an unknown value.
One that is set after them is as late in a cold start.

Only the script and the modules beside it that it imports are read; what they hide (a library that reads a
file) is found by the first run, and counts as unknown.
"""

import ast
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

_FILES_MAX, _BYTES_MAX = 50, 1 << 20
_ENVIRON = {"os.environ", "environ"}


@dataclass(slots=True)
class Settings:
    early: dict[str, str | None] = field(default_factory=dict)  # None: the value is unknown
    late: set[str] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class _Set:
    name: str
    value: str | None
    default: bool = False  # only where there is none yet


class _Import:
    """Of something that may be loaded ahead."""


def settings_of(script: Path, env: Mapping[str, str]) -> Settings:
    """`env`: what the script will find."""
    try:
        happenings = list(_file(script, {script}))
    except (OSError, SyntaxError, ValueError):  # it will say so itself when it is run
        return Settings()
    found = Settings()
    last = max((at for at, what in enumerate(happenings) if isinstance(what, _Import)), default=-1)
    first = next((at for at, what in enumerate(happenings) if isinstance(what, _Import)), 0)
    for at, what in enumerate(happenings):
        if not isinstance(what, _Set):
            continue
        if at > last:
            found.late.add(what.name)
            continue
        if what.default and found.early.get(what.name, env.get(what.name)) is not None:
            continue
        found.early[what.name] = what.value if at < first else None
    found.late -= found.early.keys()
    return found


def _file(path: Path, seen: set[Path]) -> Iterator[_Set | _Import]:
    if len(seen) > _FILES_MAX or path.stat().st_size > _BYTES_MAX:
        return
    tree = ast.parse(path.read_bytes())
    yield from _body(tree.body, path.parent, seen, certain=True)


def _body(body: list[ast.stmt], folder: Path, seen: set[Path], *, certain: bool) -> Iterator[_Set | _Import]:
    """In the order of the text. What stands in a branch or a function may happen, or not."""
    for statement in body:
        if isinstance(statement, ast.Import | ast.ImportFrom):
            for name in _imported(statement):
                yield from _module(name, folder, seen)
            continue
        yield from _sets(statement, certain=certain)
        for inner in ("body", "orelse", "finalbody", "handlers", "cases"):
            for part in getattr(statement, inner, []):
                parts = part.body if isinstance(part, ast.ExceptHandler | ast.match_case) else [part]
                if isinstance(part, ast.stmt | ast.ExceptHandler | ast.match_case):
                    yield from _body(parts, folder, seen, certain=False)


def _imported(statement: ast.Import | ast.ImportFrom) -> list[str]:
    if isinstance(statement, ast.Import):
        return [alias.name for alias in statement.names]
    return [] if statement.level or not statement.module else [statement.module]


def _module(name: str, folder: Path, seen: set[Path]) -> Iterator[_Set | _Import]:
    top = name.partition(".")[0]
    whole = folder / Path(*name.split("."))
    for path in (folder / f"{top}.py", folder / top / "__init__.py", whole.with_suffix(".py")):
        if path.is_file():
            if path not in seen:
                seen.add(path)
                yield from _file(path, seen)
            if path.stem == top:
                return
    if top not in sys.stdlib_module_names and not (folder / top).is_dir():
        yield _Import()


def _sets(statement: ast.stmt, *, certain: bool) -> Iterator[_Set]:
    match statement:
        case ast.Assign(
            targets=[ast.Subscript(value=where, slice=ast.Constant(value=str(name)))], value=value
        ):
            if ast.unparse(where) in _ENVIRON:
                yield _Set(name, _constant(value) if certain else None)
        case ast.Delete(targets=[ast.Subscript(value=where, slice=ast.Constant(value=str(name)))]):
            if ast.unparse(where) in _ENVIRON:
                yield _Set(name, None)
        case ast.Expr(value=ast.Call(func=ast.Attribute(value=where, attr=method)) as call):
            if ast.unparse(where) in _ENVIRON:
                yield from _called(method, call, certain=certain)
            elif ast.unparse(call.func) == "os.putenv" and isinstance(call.args[0], ast.Constant):
                yield _Set(str(call.args[0].value), None)


def _called(method: str, call: ast.Call, *, certain: bool) -> Iterator[_Set]:
    match method, call.args:
        case "setdefault", [ast.Constant(value=str(name)), value]:
            yield _Set(name, _constant(value) if certain else None, default=True)
        case "pop", [ast.Constant(value=str(name)), *_]:
            yield _Set(name, None)
        case "update", _:
            for word in call.keywords:
                if word.arg:
                    yield _Set(word.arg, _constant(word.value) if certain else None)
            for given in call.args:
                if isinstance(given, ast.Dict):
                    for key, value in zip(given.keys, given.values, strict=True):
                        if isinstance(key, ast.Constant) and isinstance(key.value, str):
                            yield _Set(key.value, _constant(value) if certain else None)


def _constant(value: ast.expr) -> str | None:
    return value.value if isinstance(value, ast.Constant) and isinstance(value.value, str) else None
