"""Habits that are checked, not hoped for. Each rule says what to do instead."""

import ast
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = tuple(ROOT / name / "keepstep" for name in ("controller", "agents", "trainer"))
MODULES = sorted(chain.from_iterable(source.rglob("*.py") for source in SOURCES))

LINES_MAX, FUNCTION_LINES_MAX = 400, 80
LONG_MODULES: set[str] = set()  # stays empty: split by noun

# What runs inside a rank, or owns ranks, has the standard library only and no clock passed in.
OWN_CLOCK = (
    "controller/keepstep/core/clock.py",
    "controller/keepstep/core/beacon.py",
    "agents/keepstep/agent/rank/",
    "agents/keepstep/agent/hook/",
    "agents/keepstep/agent/probes/storage/trial.py",
    "trainer/keepstep/",
)
CLOCKS = {
    "time": {"time", "time_ns", "monotonic", "monotonic_ns", "perf_counter", "perf_counter_ns"},
    "datetime": {"now", "utcnow", "today"},
    "date": {"today"},
    "uuid": {"uuid1", "uuid4"},
}


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def dotted(path: Path) -> str:
    """keepstep.store.rows for controller/keepstep/store/rows.py"""
    parts = path.relative_to(ROOT).with_suffix("").parts[1:]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def tracked() -> list[Path]:
    """The files of the repository, with those that are about to be added to it."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, check=False, timeout=60,
    )  # fmt: skip
    if listed.returncode != 0:
        pytest.skip("not a git work tree")
    files = [ROOT / file for file in listed.stdout.decode().split("\0") if file]
    return [file for file in files if file.is_file()]


def text_of(path: Path) -> str:
    try:
        return path.read_text()
    except UnicodeDecodeError:
        return ""


def aliases(module: ast.Module) -> dict[str, str]:
    """What the names of a module stand for: `from time import time as now` gives {"now": "time.time"}."""
    found: dict[str, str] = {}
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            found |= {(a.asname or a.name): a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {(a.asname or a.name): f"{node.module}.{a.name}" for a in node.names}
    return found


def referred(module: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that a module names, called or handed on."""
    known = aliases(module)
    for node in ast.walk(module):
        if isinstance(node, ast.Attribute | ast.Name):
            first, *rest = ast.unparse(node).split(".")
            if first in known:
                yield node.lineno, ".".join([known[first], *rest])


def test_there_is_something_to_check() -> None:
    assert len(MODULES) > 20


def test_the_namespace_stays_open() -> None:
    """A keepstep/__init__.py hides the other two roots at run time, while type checkers stay content."""
    assert [name(source) for source in SOURCES if (source / "__init__.py").exists()] == []


def test_every_package_is_typed_and_is_a_package() -> None:
    packages = [p for source in SOURCES for p in source.iterdir() if p.is_dir() and p.name != "__pycache__"]
    missing = [name(p) for p in packages if any(p.glob("*.py")) and not (p / "py.typed").exists()]
    assert missing == []
    assert [name(p) for p in packages if any(p.glob("*.py")) and not (p / "__init__.py").exists()] == []


def test_modules_are_named_after_what_they_are_about() -> None:
    vague = {"utils", "util", "common", "helpers", "helper", "misc", "stuff", "shared", "base"}
    assert [name(path) for path in MODULES if vague & set(dotted(path).split("."))] == []


def test_modules_say_what_they_are() -> None:
    silent = [
        name(path) for path in MODULES if path.read_text().strip() and not ast.get_docstring(tree(path))
    ]
    assert silent == []


def test_modules_are_short() -> None:
    lengths = {name(path): len(path.read_text().splitlines()) for path in MODULES}
    long = {path: lines for path, lines in lengths.items() if lines > LINES_MAX}
    assert {path: lines for path, lines in long.items() if path not in LONG_MODULES} == {}
    assert set(long) >= LONG_MODULES, "no longer long: take it off the list"


def test_functions_are_short() -> None:
    long = []
    for path in MODULES:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > FUNCTION_LINES_MAX:
                    long.append(f"{name(path)}:{node.lineno} {node.name}: {lines} lines")
    assert long == []


def test_time_chance_and_ids_are_passed_in() -> None:
    """Use the Clock or the random.Random that the caller has: keepstep.core.clock is where they come from."""
    found = []
    for path in MODULES:
        if name(path).startswith(OWN_CLOCK):
            continue
        for line, function in referred(tree(path)):
            *owner, last = function.split(".")
            of = owner[-1] if owner else ""
            chance = function.startswith("random.") and last not in {"Random", "SystemRandom"}
            if last in CLOCKS.get(of, set()) or chance:
                found.append(f"{name(path)}:{line} {function}")
    assert found == []


def test_exceptions_are_caught_whole_only_at_a_process_boundary() -> None:
    """Catch what can happen. A process's outermost boundary says `# outermost` (or why) in the same line.

    A handler that ends in a bare `raise` cleans up and lets everything pass: it needs no mark.
    """
    found = []
    for path in MODULES:
        lines = path.read_text().splitlines()
        for node in ast.walk(tree(path)):
            if not isinstance(node, ast.ExceptHandler):
                continue
            whole = node.type is None or ast.unparse(node.type) in {"Exception", "BaseException"}
            passes_on = isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None
            if whole and not passes_on and "outermost" not in lines[node.lineno - 1]:
                found.append(f"{name(path)}:{node.lineno} {lines[node.lineno - 1].strip()}")
    assert found == []


def test_nothing_is_left_for_later() -> None:
    later = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")
    found = [
        f"{name(path)}:{number}"
        for path in tracked()
        if path != Path(__file__) and path.parts[len(ROOT.parts)] != "LICENSE"
        for number, line in enumerate(text_of(path).splitlines(), start=1)
        if later.search(line)
    ]
    assert found == []


def test_no_registry_is_written_down() -> None:
    """Where packages come from is the machine's business; requirement files hold names and hashes only."""
    hosts = [
        r"pypi\.(org|python)", r"pythonhosted\.org", r"download\.pytorch\.org", r"npmjs\.org",
        r"conda\.anaconda\.org", r"proxy\.golang\.org", r"(index|extra-index|find-links)[-_]?url",
        r"--(index|find-links|trusted-host|default-index)\b",
    ]  # fmt: skip
    pattern = re.compile("|".join(hosts))
    allowed = {"Makefile": "--no-emit-index-url"}
    found = [
        f"{name(path)}:{number}: {match[0]}"
        for path in tracked()
        if path != Path(__file__)
        for number, line in enumerate(text_of(path).splitlines(), start=1)
        for match in pattern.finditer(line.replace(allowed.get(name(path), "\0"), ""))
    ]
    assert found == []


def test_requirements_are_hashed() -> None:
    for file in (ROOT / "requirements").glob("*.txt"):
        entries = re.split(r"\n(?=\S)", file.read_text().strip())
        assert [entry.splitlines()[0] for entry in entries if "--hash=sha256:" not in entry] == [], file.name


def test_every_module_is_used() -> None:
    """Imported by another module, begun by name (a script, `-m`, a lazy command) or by a tool."""
    sources = {path: tree(path) for path in MODULES}
    known = {dotted(path) for path in MODULES}
    used: set[str] = set(re.findall(r'"(keepstep[\w.]*)[:"]', (ROOT / "pyproject.toml").read_text()))
    for path, module in sources.items():
        own = dotted(path)
        package = own if path.stem == "__init__" else own.rpartition(".")[0]
        for node in ast.walk(module):
            if isinstance(node, ast.Import):
                used |= {alias.name for alias in node.names} - {own}
            elif isinstance(node, ast.ImportFrom):
                above = package.rsplit(".", node.level - 1)[0] if node.level else ""
                base = ".".join(filter(None, [above, node.module]))
                used |= {base, *(f"{base}.{alias.name}" for alias in node.names)} - {own}
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                used |= {word for word in re.findall(r"keepstep(?:\.\w+)+", node.value) if word != own}
                # The rank side is loaded under a private name, so that no script's module can be in its way.
                used |= {
                    f"keepstep.agent.rank.{word}" for word in re.findall(r"_keepstep_rank\.(\w+)", node.value)
                }
                used |= {f"{package}.{node.value}"} if node.value.isidentifier() else set()
    begun = {dotted(path) for path in MODULES if path.name in {"__init__.py", "__main__.py"}}
    begun |= {dotted(path) for path in MODULES if "migrations" in path.parts}  # by Alembic
    assert sorted(known - used - begun) == []
