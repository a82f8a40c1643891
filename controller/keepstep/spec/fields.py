"""The types of a spec's fields: a scalar's parser, its JSON Schema, and how to tell people of it."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import BeforeValidator, WithJsonSchema

from keepstep.spec import scalars


@dataclass(frozen=True, slots=True)
class Kind:
    """How a type is written, for people."""

    written: str
    example: str


_WHEN = Kind("a duration: a number and ms, s, m, h or d", "30s, 10m, 1h30m")
_STEPS_SCHEMA = {"type": "string", "pattern": "^[0-9]+ steps?$"}
_DURATION_SCHEMA = {"type": "string", "pattern": r"^(0|([0-9]+(\.[0-9]+)?(ms|s|m|h|d))+)$"}

Text = Annotated[str, BeforeValidator(scalars.text), Kind("text", "")]
SomeText = Annotated[str, BeforeValidator(scalars.some_text), Kind("text, not empty", "")]
Name = Annotated[
    str,
    BeforeValidator(scalars.name),
    WithJsonSchema({"type": "string", "pattern": f"^{scalars.NAME.pattern}$"}),
    Kind("a name: lower-case letters, digits and -", "llama3-8b"),
]
Module = Annotated[
    str, BeforeValidator(scalars.module), Kind("a module that can be imported", "package.train")
]
Variable = Annotated[
    str, BeforeValidator(scalars.variable), Kind("the name of an environment variable", "WANDB_MODE")
]
Whole = Annotated[int, BeforeValidator(scalars.whole), Kind("a whole number", "4")]
Number = Annotated[float, BeforeValidator(scalars.number), Kind("a number", "3e-4")]
Truth = Annotated[bool, BeforeValidator(scalars.truth), Kind("true or false", "true")]
Seconds = Annotated[float, BeforeValidator(scalars.duration), WithJsonSchema(_DURATION_SCHEMA), _WHEN]
AutoSeconds = Annotated[
    float | None,
    BeforeValidator(scalars.auto_duration),
    WithJsonSchema({"anyOf": [{"const": "auto"}, _DURATION_SCHEMA]}),
    Kind("auto, or a duration", "auto, 90s"),
]
Every = Annotated[
    scalars.Interval,
    BeforeValidator(scalars.interval),
    WithJsonSchema({"anyOf": [{"const": "auto"}, _STEPS_SCHEMA, _DURATION_SCHEMA]}),
    Kind("auto, a duration, or a number of steps", "auto, 30m, 500 steps"),
]
SnapshotEvery = Annotated[
    int | None,
    BeforeValidator(scalars.snapshot_interval),
    WithJsonSchema(
        {"anyOf": [{"enum": ["auto", "never"]}, {"type": "string", "pattern": "^[0-9]+ steps?$"}]}
    ),
    Kind("auto, never, or a number of steps", "auto, 20 steps"),
]
Bytes = Annotated[
    int,
    BeforeValidator(scalars.size),
    WithJsonSchema({"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)? ?([KMGT]i?B?|B)$"}),
    Kind("a size: a number and B, KiB, MiB or GiB", "64MiB"),
]
Limit = Annotated[
    int,
    BeforeValidator(scalars.limit),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string"}]}),
    Kind("a number, a size, or unlimited", "65536, unlimited"),
]
Signal = Annotated[str, BeforeValidator(scalars.signal_name), Kind("the name of a signal", "TERM, USR1")]
