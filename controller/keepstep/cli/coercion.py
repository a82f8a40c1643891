"""Turning option texts into values without pydantic.

Typer builds a pydantic adapter for each parameter of the command it runs. Importing pydantic costs a third of
a second, more than all else that `keepstep list` does, and our parameters are plain: text, numbers, flags and
lists of them. So commands get this instead. Where Typer has no such hook, nothing is changed.
"""

from dataclasses import dataclass
from typing import Any, get_args, get_origin

import typer

_PLAIN = (str, int, float, bool)


@dataclass(frozen=True, slots=True)
class Plain:
    """Stands where Typer keeps its `RuntimeParam`; `kind` is one of str, int, float, bool."""

    kind: type
    many: bool

    def coerce(self, value: Any, param: Any, ctx: Any) -> Any:
        if value is None:
            return () if self.many else None
        if self.many:
            return [self._one(item, param, ctx) for item in value]
        return self._one(value, param, ctx)

    def _one(self, value: Any, param: Any, ctx: Any) -> Any:
        if isinstance(value, self.kind):
            return value
        if self.kind is bool:
            return _flag(value, param, ctx)
        try:
            return self.kind(value)
        except ValueError:
            noun = {int: "a whole number", float: "a number"}.get(self.kind, "text")
            raise typer.BadParameter(f"{value!r} is not {noun}.", ctx=ctx, param=param) from None


def lighten(command: Any) -> None:
    """Give the plain parameters of a built command plain coercion."""
    for param in command.params:
        descriptor = getattr(param, "type_descriptor", None)
        if descriptor is None or not hasattr(param, "_runtime_param"):
            continue  # a Typer that coerces by itself, and lightly
        annotation = descriptor.annotation
        info = descriptor.parameter_info
        if info.min is not None or info.max is not None or getattr(info, "parser", None) is not None:
            continue
        if annotation in _PLAIN:
            param._runtime_param = Plain(annotation, many=False)
        elif get_origin(annotation) is list and get_args(annotation)[0] in _PLAIN:
            param._runtime_param = Plain(get_args(annotation)[0], many=True)


def _flag(value: Any, param: Any, ctx: Any) -> bool:
    match str(value).strip().lower():
        case "1" | "true" | "t" | "yes" | "y" | "on":
            return True
        case "" | "0" | "false" | "f" | "no" | "n" | "off":
            return False
        case _:
            raise typer.BadParameter(f"{value!r} is neither yes nor no.", ctx=ctx, param=param)
