"""What of a working folder is not shipped: .keepstepignore, in the way of .gitignore.

One pattern a line; `#` begins a comment, `!` takes back, a `/` at the end means folders only, a `/` anywhere
else ties the pattern to the top, `**` spans folders. The last match decides; what is in a folder that is left
out stays out. Only the file at the top is read.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

DEFAULTS = (
    ".git", ".hg", ".svn", "__pycache__/", "*.pyc", ".venv/", "venv/", "node_modules/", ".mypy_cache/",
    ".ruff_cache/", ".pytest_cache/", ".hypothesis/", ".ipynb_checkpoints/", ".DS_Store", "*.egg-info/",
    ".keepstepignore",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Rule:
    pattern: re.Pattern[str]
    negated: bool
    folders_only: bool
    given: bool  # by the user, not by default


@dataclass(frozen=True, slots=True)
class Ignore:
    rules: tuple[Rule, ...]

    @classmethod
    def of(cls, text: str, *, also: Iterable[str] = ()) -> "Ignore":
        """The user's lines after the defaults; `also`: more defaults."""
        rules = [_rule(line, given=False) for line in (*DEFAULTS, *also)]
        rules += [_rule(line, given=True) for line in text.splitlines()]
        return cls(tuple(rule for rule in rules if rule is not None))

    def leaves_out(self, name: str, *, folder: bool) -> bool:
        """`name` is relative to the top, with /."""
        rule = self._last(name, folder)
        return rule is not None and not rule.negated

    def wants(self, name: str) -> bool:
        """Whether the user takes this very file back in by a line of his own."""
        rule = self._last(name, folder=False)
        return rule is not None and rule.negated and rule.given

    def _last(self, name: str, folder: bool) -> Rule | None:
        for rule in reversed(self.rules):
            if (folder or not rule.folders_only) and rule.pattern.fullmatch(name):
                return rule
        return None


def _rule(line: str, *, given: bool) -> Rule | None:
    line = line.rstrip("\r\n")
    line = line[:-1] + " " if line.endswith("\\ ") else line.rstrip()
    if not line or line.startswith("#"):
        return None
    negated = line.startswith("!")
    line = line[1:] if negated else line
    folders_only = line.endswith("/")
    body = line.rstrip("/")
    if not body:
        return None
    anchored = "/" in body
    return Rule(_regex(body.lstrip("/"), anchored=anchored), negated, folders_only, given)


def _regex(body: str, *, anchored: bool) -> re.Pattern[str]:
    pieces: Sequence[str] = body.split("/")
    regex = "" if anchored else "(?:.*/)?"
    for index, piece in enumerate(pieces):
        last = index == len(pieces) - 1
        if piece == "**":
            regex += ".*" if last else "(?:.*/)?"
        else:
            regex += _piece(piece) + ("" if last else "/")
    return re.compile(regex, re.DOTALL)


def _piece(piece: str) -> str:
    """One name of a path: *, ? and [...] never match a slash."""
    regex, index = "", 0
    while index < len(piece):
        letter = piece[index]
        index += 1
        if letter == "*":
            regex += "[^/]*"
        elif letter == "?":
            regex += "[^/]"
        elif letter == "\\" and index < len(piece):
            regex += re.escape(piece[index])
            index += 1
        elif letter == "[" and (end := piece.find("]", index + 1)) > 0:
            inside = piece[index:end]
            negated = inside[:1] in ("!", "^")
            inside = (inside[1:] if negated else inside).replace("\\", "\\\\").replace("[", "\\[")
            group = f"(?!/)[{'^' if negated else ''}{inside}]"
            regex += group if _compiles(group) else re.escape(piece[index - 1 : end + 1])
            index = end + 1
        else:
            regex += re.escape(letter)
    return regex


def _compiles(regex: str) -> bool:
    try:
        re.compile(regex)
    except re.error:
        return False
    return True
