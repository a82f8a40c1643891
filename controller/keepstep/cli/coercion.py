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


@dataclass(frozen=True, slots=True)
class Deferred:
    """For any other kind: Typer's own coercion, built only when a value was given."""

    descriptor: Any
    many: bool

    def coerce(self, value: Any, param: Any, ctx: Any) -> Any:
        if value is None:
            return () if self.many else None
        from typer._coercion import build_runtime_param

        return build_runtime_param(self.descriptor).coerce(value, param=param, ctx=ctx)


def lighten(command: Any, ctx: Any) -> None:
    """Give the parameters of a built command, its --help included, plain coercion."""
    for param in command.get_params(ctx):
        descriptor = getattr(param, "type_descriptor", None)
        if descriptor is None or not hasattr(param, "_runtime_param"):
            continue  # a Typer that coerces by itself, and lightly
        annotation = descriptor.annotation
        info = descriptor.parameter_info
        bounded = info.min is not None or info.max is not None or getattr(info, "parser", None) is not None
        many = get_origin(annotation) is list
        kind = get_args(annotation)[0] if many else annotation
        if kind in _PLAIN and not bounded:
            param._runtime_param = Plain(kind, many=many)
        else:
            param._runtime_param = Deferred(descriptor, many=many)


def _flag(value: Any, param: Any, ctx: Any) -> bool:
    match str(value).strip().lower():
        case "1" | "true" | "t" | "yes" | "y" | "on":
            return True
        case "" | "0" | "false" | "f" | "no" | "n" | "off":
            return False
        case _:
            raise typer.BadParameter(f"{value!r} is neither yes nor no.", ctx=ctx, param=param)
