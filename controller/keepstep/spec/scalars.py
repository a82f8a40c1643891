"""What may be written for one value: durations, sizes, names, numbers; what it becomes; how a refusal reads.

Each function takes what `source` yields (`Plain` words, quoted text) or a JSON value, and raises what
pydantic collects, with the parts of an error of ours in its context.
"""

import math
import re
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic_core import PydanticCustomError

from keepstep.core.job import UNLIMITED
from keepstep.spec.problems import did_you_mean, shown
from keepstep.spec.source import Plain

TRUTH_WORDS = frozenset({"true", "false", "yes", "no", "on", "off"})  # of YAML 1.1, in any case
LIMITS = ("as", "core", "cpu", "data", "fsize", "memlock", "msgqueue", "nice", "nofile", "nproc", "rss",
          "rtprio", "rttime", "sigpending", "stack")  # fmt: skip
LONGEST_S = 10 * 365 * 86_400.0

_UNIT_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
_UNIT_BYTES: dict[str, int] = {"B": 1} | {
    f"{letter}{tail}": base**power
    for power, letter in enumerate("KMGT", start=1)
    for tail, base in (("iB", 1024), ("i", 1024), ("B", 1000))
}
_DURATION_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_DURATION = re.compile(rf"(?:{_DURATION_PART.pattern})+")
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([A-Za-z]+)")
_STEPS = re.compile(r"(\d{1,9}) steps?")
_WHOLE = re.compile(r"[+-]?\d(?:_?\d){0,17}")
NAME = re.compile(r"[a-z](?:[-a-z0-9]{0,46}[a-z0-9])?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_T = TypeVar("_T")
_MODULE = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*")


def wrong(what: str, *, why: str = "", next: str = "") -> PydanticCustomError:  # noqa: A002
    """To raise from a validator."""
    return PydanticCustomError("spec", "{what}", {"what": what, "why": why, "next": next})


def text(value: Any) -> str:
    """Text as it was written; never a word that another YAML reader takes for true or false."""
    if isinstance(value, Plain) and value.casefold() in TRUTH_WORDS:
        why = f"YAML readers take an unquoted {value} for {_truth_of(value)}"
        raise wrong("must be text", why=why, next=f'Write "{value}", in quotes.')
    if not isinstance(value, str):
        hint = 'Write "" for an empty text.' if value is None else ""
        raise wrong(f"must be text, not {noun(value)}", next=hint)
    if "\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value):
        raise wrong("must be text", why="it has a NUL or half a character in it")
    return str(value)


def some_text(value: Any) -> str:
    result = text(value)
    if not result.strip():
        raise wrong("must not be empty")
    if any(ord(letter) < 32 for letter in result):
        raise wrong("must be one line of text")
    return result


def name(value: Any) -> str:
    result = text(value)
    if NAME.fullmatch(result) is None:
        better = re.sub(r"[^a-z0-9]+", "-", result.casefold()).lstrip("-0123456789")[:48].rstrip("-")
        why = "at most 48 lower-case letters, digits and -, a letter first and no - at the end"
        raise wrong(f"{shown(result)} is no name", why=why, next=f"Try {better}." if better else "")
    return result


def variable(value: Any) -> str:
    result = text(value)
    if _VARIABLE.fullmatch(result) is None:
        why = "letters, digits and _, beginning with no digit"
        raise wrong(f"{shown(result)} is no name of an environment variable", why=why)
    return result


def module(value: Any) -> str:
    result = text(value)
    if _MODULE.fullmatch(result) is None:
        next_ = "Give a file as   command: [python, path/to/it.py]" if "/" in result else ""
        raise wrong(f"{shown(result)} is no module", why="it is imported, as package.module", next=next_)
    return result


def whole(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if not isinstance(value, Plain):
        raise _not_a_number(value, "a whole number")
    digits = value.lstrip("+-")
    if len(digits) > 1 and digits.startswith("0") and digits.isdecimal():
        why = f"some YAML readers take {value} for an octal number"
        raise wrong(f"{value} begins with 0", why=why, next=f"Write {digits.lstrip('0') or 0}.")
    if _WHOLE.fullmatch(value) is None:
        raise _not_a_number(value, "a whole number")
    return int(value)


def number(value: Any) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool):
        result = float(value) if abs(value) < 1e300 else math.inf
    elif isinstance(value, Plain):
        try:
            result = float(value)
        except ValueError:
            raise _not_a_number(value, "a number") from None
    else:
        raise _not_a_number(value, "a number")
    if not math.isfinite(result):
        raise wrong(f"must be a finite number, not {value}")
    return result


def truth(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, Plain) and value in ("true", "false"):
        return value == "true"
    if isinstance(value, str) and value.casefold() in TRUTH_WORDS:
        next_ = f"Write {_truth_of(value)}, unquoted."
        raise wrong(f"must be true or false, not {noun(value)}", next=next_)
    raise wrong(f"must be true or false, not {noun(value)}")


def duration(value: Any) -> float:
    """Seconds."""
    if not isinstance(value, str):
        raise wrong(f"must be a duration, not {noun(value)}", next="As in 500ms, 30s, 10m, 1h30m, 2d.")
    if value == "0":
        return 0.0
    if _DURATION.fullmatch(value) is None:
        if re.fullmatch(r"\d+(\.\d+)?", value):
            raise wrong(f"{value} has no unit", next=f"Write {value}s for seconds, {value}m for minutes.")
        next_ = "As in 500ms, 30s, 10m, 1h30m, 2d."
        raise wrong(f"must be a duration, not {shown(value)}", next=next_)
    total = sum(float(count) * _UNIT_S[unit] for count, unit in _DURATION_PART.findall(value))
    if total > LONGEST_S:
        raise wrong(f"{shown(value)} is longer than 10 years")
    return total


def auto_duration(value: Any) -> float | None:
    return None if value == "auto" else _or("auto", value, duration, "a duration")


def interval(value: Any) -> "Interval":
    if value == "auto":
        return Interval()
    if isinstance(value, str) and (match := _STEPS.fullmatch(value)):
        steps = int(match[1])
        if steps == 0:
            raise wrong("must be at least 1 step")
        return Interval(steps=steps)
    if isinstance(value, Plain) and value.isdecimal():
        raise wrong(f"{value} has no unit", next=f"Write {value} steps, or a duration such as 30m.")
    seconds = _or(
        "auto, a number of steps", value, duration, "a duration", next_="As in auto, 30m, 500 steps."
    )
    if seconds <= 0:
        raise wrong("must be longer than nothing")
    return Interval(seconds=seconds)


def snapshot_interval(value: Any) -> int | None:
    """Steps; 0: never; None: auto."""
    if value == "auto":
        return None
    if value == "never":
        return 0
    if isinstance(value, str) and (match := _STEPS.fullmatch(value)) and int(match[1]):
        return int(match[1])
    raise wrong(
        f"must be auto, never or a number of steps, not {_seen(value)}", next="As in 1 step, 20 steps."
    )


def size(value: Any) -> int:
    """Bytes."""
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        if isinstance(value, Plain) and value.isdecimal():
            raise wrong(f"{value} has no unit", next=f"Write {value}MiB, or {value}B for bytes.")
        raise wrong(f"must be a size, not {_seen(value)}", next="As in 512KiB, 64MiB, 2GiB.")
    if match[2] not in _UNIT_BYTES:
        raise wrong(
            f"{match[2]} is no unit of size", next=did_you_mean(match[2], ("KiB", "MiB", "GiB", "TiB"))
        )
    result = float(match[1]) * _UNIT_BYTES[match[2]]
    if result >= 2**60:
        raise wrong(f"{shown(value)} is too large")
    return round(result)


def limit(value: Any) -> int:
    """As setrlimit(2) takes it: a count, bytes, or unlimited."""
    if value == "unlimited":
        return UNLIMITED
    if isinstance(value, str) and _SIZE.fullmatch(value):
        return size(value)
    result: int = _or("unlimited, a number", value, whole, "a size")
    if result < 0:
        raise wrong("must not be negative", next="Write unlimited for no limit.")
    return result


def limit_name(value: Any) -> str:
    if value in LIMITS:
        return str(value)
    raise wrong(f"{_seen(value)} is no limit", next=did_you_mean(str(value), LIMITS))


def umask(value: Any) -> int:
    """Three octal digits, whatever a YAML reader would make of them."""
    if isinstance(value, str) and re.fullmatch(r"0?[0-7]{3}", value):
        return int(value, 8)
    raise wrong(f"must be three octal digits, not {_seen(value)}", next='As in "027".')


def signal_name(value: Any) -> str:
    """TERM, of TERM or SIGTERM."""
    result = text(value).upper().removeprefix("SIG")
    known = {each.name.removeprefix("SIG") for each in signal.Signals}
    if result not in known:
        usual = ("TERM", "INT", "USR1", "USR2", "HUP", "QUIT", "KILL")
        raise wrong(f"{shown(value)} is no signal", next=did_you_mean(result, usual))
    return result


def one_of(*words: str) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        if isinstance(value, str) and value in words:
            return str(value)
        listed = ", ".join(words[:-1]) + f" or {words[-1]}"
        hint = did_you_mean(value, words) if isinstance(value, str) else ""
        raise wrong(f"must be {listed}, not {_seen(value)}", next=hint if hint.startswith("Did") else "")

    return check


def noun(value: Any) -> str:
    """What a value is, for a sentence about what it should be."""
    match value:
        case None:
            return "empty"
        case bool():
            return "a truth value"
        case Plain():
            return shown(value)
        case str():
            return f"text ({shown(value)})"
        case int() | float():
            return "a number"
        case Mapping():
            return "a mapping"
        case list() | tuple():
            return "a list"
        case _:
            return f"a {type(value).__name__}"


@dataclass(frozen=True, slots=True)
class Interval:
    """Between checkpoints; neither: auto."""

    seconds: float | None = None
    steps: int | None = None


def duration_text(seconds: float) -> str:
    """10m, of 600: what `duration` takes back."""
    for unit in ("d", "h", "m", "s"):
        count = seconds / _UNIT_S[unit]
        if count >= 1 and count == int(count):
            return f"{int(count)}{unit}"
    return f"{seconds:g}s"


def size_text(count: int) -> str:
    """64MiB, of 67108864."""
    for unit in ("GiB", "MiB", "KiB"):
        if count >= _UNIT_BYTES[unit] and count % _UNIT_BYTES[unit] == 0:
            return f"{count // _UNIT_BYTES[unit]}{unit}"
    return f"{count}B"


def _truth_of(word: str) -> str:
    return "true" if word.casefold() in ("true", "yes", "on") else "false"


def _seen(value: Any) -> str:
    return shown(str(value)) if isinstance(value, str) else noun(value)


def _not_a_number(value: Any, wanted: str) -> PydanticCustomError:
    if isinstance(value, str) and not isinstance(value, Plain):
        bare = value.strip()
        hint = f"Write {bare}, without quotes." if re.fullmatch(r"[-+.\deE]+", bare) else ""
        return wrong(f"must be {wanted}, not text ({shown(value)})", next=hint)
    return wrong(f"must be {wanted}, not {noun(value)}")


def _or(others: str, value: Any, check: Callable[[Any], _T], wanted: str, next_: str = "") -> _T:
    """`check`, with the other words that would have done in its refusal."""
    try:
        return check(value)
    except PydanticCustomError as error:
        context = error.context or {}
        if str(context.get("what", "")).startswith("must be"):
            raise wrong(
                f"must be {others} or {wanted}, not {_seen(value)}", next=next_ or context.get("next", "")
            ) from None
        raise
