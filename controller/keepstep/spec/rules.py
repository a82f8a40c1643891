"""Reads the policy on node health. Everything that is wrong is told at once, each with its line.

The shipped file (`triage.yaml`) is read by the same code as an operator's own, which is laid over it: rules
of the same name are replaced, others come first, settings are replaced one by one.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from importlib.resources import files
from pathlib import Path as File
from typing import Any, TypeVar

from pydantic_core import PydanticCustomError

from keepstep.core import rules as r
from keepstep.spec import scalars
from keepstep.spec.problems import Path, Problem, did_you_mean, refuse, shown
from keepstep.spec.source import Document, parse, read_file

T = TypeVar("T")

_SECTIONS: Mapping[str, type[Any]] = {
    "bounds": r.Bounds,
    "correlation": r.Correlation,
    "hysteresis": r.Hysteresis,
    "suspicion": r.Suspicion,
    "lemon": r.Lemon,
    "deadlines": r.Deadlines,
}
_KNOWN = ("rules", "hooks", *_SECTIONS)
_RULE = (
    "name",
    "xid",
    "sxid",
    "on",
    "level",
    "stands",
    "class",
    "actions",
    "within",
    "needs",
    "at_once",
    "obeys",
    "why",
)
_SHARES = {"share", "share_soon"}
_CLUSTERS = ("kubernetes", "ray")  # hooks that only need to be told what the node is called there
_PLACES = {"node", "action", "reason", "key"}  # what a hook's command may name in braces


def load_rules(file: File | None = None) -> r.TriagePolicy:
    """The policy in force: the shipped one, with the operator's file over it. Errors: InputError."""
    shipped = _shipped()
    return shipped if file is None else read_rules(read_file(file), str(file), shipped)


def read_rules(text: str, source: str, over: r.TriagePolicy | None = None) -> r.TriagePolicy:
    """The policy in `text`, laid over another one. Errors: InputError, with every line that is wrong."""
    document = parse(text, source, what="a policy")
    reader = _Reader(document, list(document.problems))
    policy = reader.policy(over or r.TriagePolicy(rules=()))
    refuse(reader.problems, document)
    return replace(policy, source=source)


@cache
def _shipped() -> r.TriagePolicy:
    text = files("keepstep.spec").joinpath("triage.yaml").read_text()
    return replace(read_rules(text, "triage.yaml"), source="keepstep's own")


@dataclass(slots=True)
class _Reader:
    document: Document
    problems: list[Problem]

    def policy(self, over: r.TriagePolicy) -> r.TriagePolicy:
        data = self.document.data
        self._unknown(data, _KNOWN, ())
        own = tuple(self._rules(data.get("rules") or []))
        names = {rule.name for rule in own}
        replaced = {rule.name: rule for rule in own}
        known = {rule.name for rule in over.rules}
        first = tuple(rule for rule in own if rule.name not in known)
        kept = tuple(replaced.get(rule.name, rule) if rule.name in names else rule for rule in over.rules)
        sections = {name: self._section(getattr(over, name), data.get(name), (name,)) for name in _SECTIONS}
        hooks = {**over.hooks, **self._hooks(data.get("hooks") or {})}
        return r.TriagePolicy(rules=(*first, *kept), hooks=hooks, **sections)

    # ------------------------------------------------------------ rules

    def _rules(self, value: Any) -> Iterable[r.Rule]:
        if not isinstance(value, list):
            self._wrong(("rules",), "must be a list", next="Each begins with   - name: ...")
            return
        seen: dict[str, int] = {}
        for index, each in enumerate(value):
            path: Path = ("rules", index)
            rule = self._rule(each, path)
            if rule is not None and rule.name in seen:
                self._wrong((*path, "name"), f"{shown(rule.name)} is also rule {seen[rule.name] + 1}")
            elif rule is not None:
                seen[rule.name] = index
                yield rule

    def _rule(self, value: Any, path: Path) -> r.Rule | None:
        if not isinstance(value, dict):
            self._wrong(path, "a rule is a mapping", next="It has name, xid or on, class and actions.")
            return None
        self._unknown(value, _RULE, path)
        before = len(self.problems)
        for field in ("name", "class", "actions"):
            if value.get(field) is None:
                self._wrong(path, f"the rule has no `{field}`")
        xids = self._each(value.get("xid"), (*path, "xid"), self._number)
        sxids = self._each(value.get("sxid"), (*path, "sxid"), self._number)
        signals = self._each(value.get("on"), (*path, "on"), self._signal)
        if not (xids or sxids or signals) and len(self.problems) == before:
            self._wrong(path, "the rule takes nothing", next="Give it `xid`, `sxid` or `on`.")
        actions = self._each(value.get("actions"), (*path, "actions"), self._action)
        rule: dict[str, Any] = {
            "name": self._check(scalars.some_text, value.get("name", "?"), (*path, "name")),
            "of": self._word(r.Class, value.get("class", "gpu"), (*path, "class")),
            "level": self._one_of(("warn", "bad"), value.get("level", "bad"), (*path, "level")),
            "at_once": self._check(scalars.truth, value.get("at_once", False), (*path, "at_once")),
            "why": self._check(scalars.text, value.get("why", ""), (*path, "why")),
            "needs": self._needs(value.get("needs"), (*path, "needs")),
            "obeys": self._obeys(value.get("obeys"), (*path, "obeys")),
        }
        if "stands" in value:
            rule["stands_s"] = self._seconds(value["stands"], (*path, "stands"))
        if "within" in value:
            rule["within_s"] = self._seconds(value["within"], (*path, "within"))
        if len(self.problems) > before:
            return None
        takes: dict[str, Any] = {
            "xids": frozenset(xids),
            "sxids": frozenset(sxids),
            "signals": frozenset(signals),
        }
        return r.Rule(**rule, **takes, actions=tuple(actions))

    def _needs(self, value: Any, path: Path) -> r.Needs | None:
        if value is None:
            return None
        if not isinstance(value, dict) or set(value) != {"times", "within"}:
            self._wrong(path, "must be {times: N, within: DURATION}")
            return None
        times = self._number(value["times"], (*path, "times"))
        within_s = self._seconds(value["within"], (*path, "within"))
        return None if times is None or within_s is None else r.Needs(times=times, within_s=within_s)

    def _obeys(self, value: Any, path: Path) -> dict[int, r.Action]:
        if value is None:
            return {}
        if not isinstance(value, dict):
            self._wrong(path, "must be a mapping of numbers to actions")
            return {}
        found: dict[int, r.Action] = {}
        for key, each in value.items():
            action = self._action(each, (*path, key))
            if not str(key).isdecimal():
                self._wrong((*path, key), f"{shown(key)} is no number", at_key=True)
            elif action is not None:
                found[int(key)] = action
        return found

    def _signal(self, value: Any, path: Path) -> str | None:
        if value in r.SIGNALS:
            return str(value)
        self._wrong(
            path, f"no check or event is called {shown(value)}", next=did_you_mean(str(value), r.SIGNALS)
        )
        return None

    def _action(self, value: Any, path: Path) -> r.Action | None:
        return self._word(r.Action, value, path)

    # ------------------------------------------------------------ settings and hooks

    def _section(self, over: Any, value: Any, path: Path) -> Any:
        """The dataclass's own fields, without their units: `drain` for `drain_s`."""
        if value is None:
            return over
        if not isinstance(value, dict):
            self._wrong(path, "must be a mapping")
            return over
        named = {field.name.removesuffix("_s"): field.name for field in fields(over)}
        self._unknown(value, named, path)
        changes: dict[str, Any] = {}
        for short, name in named.items():
            if value.get(short) is None:
                continue
            at, given = (*path, short), value[short]
            if name.endswith("_s"):
                changes[name] = self._seconds(given, at)
            elif isinstance(getattr(over, name), float):
                changes[name] = self._check(scalars.number, given, at)
                most = 1.0 if short in _SHARES else float("inf")
                if changes[name] is not None and not 0 < changes[name] <= most:
                    self._wrong(at, f"must be more than 0 and at most {most:g}")
            elif isinstance(getattr(over, name), int):
                changes[name] = self._number(given, at)
            else:
                changes[name] = self._check(scalars.some_text, given, at)
        return over if None in changes.values() else replace(over, **changes)

    def _hooks(self, value: Any) -> dict[str, r.Hook]:
        if not isinstance(value, dict):
            self._wrong(("hooks",), "must be a mapping")
            return {}
        self._unknown(value, r.HOOKS, ("hooks",))
        hooks = {name: self._hook(each, ("hooks", name)) for name, each in value.items() if name in r.HOOKS}
        return {name: hook for name, hook in hooks.items() if hook is not None}

    def _hook(self, value: Any, path: Path) -> r.Hook | None:
        if not isinstance(value, dict) or sum(way in value for way in r.WAYS) != 1:
            self._wrong(path, f"needs one of {', '.join(f'`{way}`' for way in r.WAYS)}")
            return None
        self._unknown(value, (*r.WAYS, "within", "tries"), path)
        command = tuple(self._each(value.get("command"), (*path, "command"), self._argument))
        named = {way: self._argument(value.get(way, ""), (*path, way)) or "" for way in _CLUSTERS}
        url = self._check(scalars.text, value.get("webhook", ""), (*path, "webhook")) or ""
        if "webhook" in value and not url.startswith(("http://", "https://")):
            self._wrong((*path, "webhook"), f"{shown(url)} is no URL", next="It begins with https://")
        hook = r.Hook(command=command, webhook=url, kubernetes=named["kubernetes"], ray=named["ray"])
        within_s = self._seconds(value["within"], (*path, "within")) if "within" in value else hook.within_s
        tries = self._number(value["tries"], (*path, "tries")) if "tries" in value else hook.tries
        return None if within_s is None or tries is None else replace(hook, within_s=within_s, tries=tries)

    def _argument(self, value: Any, path: Path) -> str | None:
        text = self._check(scalars.text, value, path)
        for place in [] if text is None else _braces(text):
            if place not in _PLACES:
                known = ", ".join(f"{{{name}}}" for name in sorted(_PLACES))
                self._wrong(path, f"{{{place}}} is not known here", next=f"There are {known}.")
        return text

    # ------------------------------------------------------------ values

    def _each(self, value: Any, path: Path, read: Callable[[Any, Path], T | None]) -> list[T]:
        if value is None:
            return []
        if not isinstance(value, list):
            self._wrong(path, "must be a list", next="Write it as [a, b].")
            return []
        if not value:
            self._wrong(path, "is empty")
        found = [read(each, (*path, index)) for index, each in enumerate(value)]
        return [each for each in found if each is not None]

    def _number(self, value: Any, path: Path) -> int | None:
        number = self._check(scalars.whole, value, path)
        if number is not None and number < 1:
            self._wrong(path, "must be at least 1")
        return number

    def _seconds(self, value: Any, path: Path) -> float | None:
        seconds = self._check(scalars.duration, value, path)
        if seconds is not None and seconds <= 0:
            self._wrong(path, "must be more than 0")
        return seconds

    def _word(self, kind: Callable[[str], T], value: Any, path: Path) -> T | None:
        try:
            return kind(str(value))
        except ValueError:
            known = [str(each) for each in kind]  # type: ignore[attr-defined]
            self._wrong(path, f"{shown(value)} is not known here", next=did_you_mean(str(value), known))
            return None

    def _one_of(self, words: tuple[str, ...], value: Any, path: Path) -> str:
        if value not in words:
            self._wrong(path, f"{shown(value)} is not known here", next=f"Known here: {', '.join(words)}.")
        return str(value)

    def _check(self, check: Callable[[Any], T], value: Any, path: Path) -> T | None:
        if isinstance(value, bool):
            return value  # type: ignore[return-value]  # a default of ours
        try:
            return check(value)
        except PydanticCustomError as error:
            told = error.context or {}
            self._wrong(path, str(told["what"]), why=str(told["why"]), next=str(told["next"]))
            return None

    def _unknown(self, value: Mapping[str, Any], known: Iterable[str], path: Path) -> None:
        known = list(known)
        for name in value:
            if name not in known:
                self._wrong((*path, name), "no such field", next=did_you_mean(str(name), known), at_key=True)

    def _wrong(
        self,
        path: Path,
        what: str,
        *,
        why: str = "",
        next: str = "",  # noqa: A002 - as everywhere
        at_key: bool = False,
    ) -> None:
        self.problems.append(Problem(path=path, what=what, why=why, next=next, at_key=at_key))


def _braces(text: str) -> list[str]:
    return [part.partition("}")[0] for part in text.split("{")[1:]]
