"""A job as a plain dictionary: what the store keeps and `POST /jobs` carries.

Every default is filled in. Reading one back trusts nothing: it may come from a client that is not ours, so
types, ranges, names and the fit are looked at again. Fields that this version does not know are passed over.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError, PydanticSerializationError

from keepstep.core.errors import InputError
from keepstep.core.job import CommandRun, JobSpec, LlamaRun
from keepstep.spec import scalars
from keepstep.spec.conflicts import value_problems
from keepstep.spec.fit import misfits
from keepstep.spec.problems import Path, Place, Problem, refuse
from keepstep.spec.violations import problems_of

_MAY_BE_ZERO = frozenset(
    {"spares", "seed", "max", "clip", "min_lr", "warmup_steps", "anneal_steps", "weight_decay", "beta1",
     "beta2", "holdout", "umask", "grace_s", "before_s", "first_s", "max_s", "snapshot_every_steps"}
)  # fmt: skip
_SIGNED = frozenset({"priority", "limits"})
_LARGEST = 2.0**63


class _Record:
    """Stands for the text: a dictionary has no lines."""

    def place(self, path: Path, *, at_key: bool = False) -> Place:
        return Place(0, 0, 0, "spec")


def to_dict(spec: JobSpec) -> dict[str, Any]:
    data: dict[str, Any] = _adapter().dump_python(spec, mode="json")
    return data


def from_dict(data: Mapping[str, Any]) -> JobSpec:
    try:
        text = json.dumps(data, allow_nan=False)
        spec = _adapter().validate_json(text, strict=True)
    except ValidationError as error:
        refuse(problems_of(error), _Record())
        raise AssertionError("a refusal without a problem") from error
    except (TypeError, ValueError, RecursionError, PydanticSerializationError) as error:
        raise InputError("not a job", where="spec", why=str(error)[:200]) from None
    refuse([*_out_of_range(spec, ()), *_misnamed(spec)], _Record())
    refuse(misfits(spec), _Record())
    return spec


@cache
def _adapter() -> TypeAdapter[JobSpec]:
    return TypeAdapter(JobSpec)


def _out_of_range(value: Any, path: Path) -> Iterator[Problem]:
    """Numbers that no document could have given."""
    match value:
        case bool() | str() | None:
            return
        case int() | float():
            name = next((part for part in reversed(path) if isinstance(part, str)), "")
            if not math.isfinite(value) or abs(value) >= _LARGEST:
                yield Problem(path=path, what="is out of range")
            elif (value < 0 or (value == 0 and name not in _MAY_BE_ZERO)) and not _SIGNED.intersection(path):
                least = "at least 0" if name in _MAY_BE_ZERO else "more than 0"
                yield Problem(path=path, what=f"must be {least}, not {value}")
        case Mapping():
            for key, each in value.items():
                yield from _out_of_range(each, (*path, str(key)))
        case Sequence():
            for index, each in enumerate(value):
                yield from _out_of_range(each, (*path, index))
        case _ if is_dataclass(value):
            for field in fields(value):
                yield from _out_of_range(getattr(value, field.name), (*path, field.name))


def _misnamed(spec: JobSpec) -> Iterator[Problem]:
    """Words that end up in paths, environments and calls of the system."""
    for field in ("name", "project", "queue", "pool"):
        yield from _checked(scalars.name, getattr(spec, field), (field,))
    run = spec.run
    for variable in (*run.env, *run.secrets):
        yield from _checked(scalars.variable, variable, ("run", "env", variable))
    for variable, value in run.env.items():
        yield from _checked(scalars.text, value, ("run", "env", variable))
    for limit in run.limits:
        yield from _checked(scalars.limit_name, limit, ("run", "limits", limit))
    for module in run.preload:
        yield from _checked(scalars.module, module, ("run", "preload"))
    for at, signal in (("stop", run.stop.signal), ("warn", run.warn.signal if run.warn else "TERM")):
        yield from _checked(scalars.signal_name, signal, ("run", at, "signal"))
    words: Sequence[str] = ()
    match run:
        case CommandRun():
            words = run.command
            yield from _checked(scalars.some_text, run.workdir, ("run", "workdir"))
            if not words or not words[0].strip():
                yield Problem(path=("run", "command"), what="is empty")
            if run.bundle is not None and (
                len(run.bundle) != 64 or set(run.bundle) - set("0123456789abcdef")
            ):
                yield Problem(path=("run", "bundle"), what="is no sha256")
            for index, word in enumerate(words):
                yield from _checked(scalars.text, word, ("run", "command", index))
        case LlamaRun():
            if run.data.source != "stdlib" and run.data.path is None:
                yield Problem(path=("run", "data"), what=f"source {run.data.source} needs a path")
    yield from value_problems(run.env, run.secrets, words)


def _checked(check: Any, value: str, path: Path) -> Iterator[Problem]:
    try:
        check(value)
    except PydanticCustomError as error:
        context = error.context or {}
        yield Problem(
            path=path, what=str(context["what"]), why=str(context["why"]), next=str(context["next"])
        )
