"""A part of the document: a mapping with known fields, each with a meaning written beneath it.

A field that is there but empty (`checkpoint:` with nothing beneath) counts as left out.
"""

import shlex
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator

from keepstep.spec.fields import Kind, SomeText, Text
from keepstep.spec.scalars import noun, some_text, wrong


class Section(BaseModel):
    present_when_empty: ClassVar[frozenset[str]] = frozenset()
    """Sections that are meant even with nothing beneath them."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, arbitrary_types_allowed=True
    )

    @model_validator(mode="before")
    @classmethod
    def _mapping(cls, value: Any) -> Any:
        if isinstance(value, cls):
            return value
        if value is None:
            return {}
        if not isinstance(value, dict):
            return cls.short(value)
        empty: dict[str, Any] = {name: {} for name in cls.present_when_empty if name in value}
        kept = {k: v for k, v in value.items() if v is not None or k not in cls.model_fields}
        return {**empty, **kept}

    @classmethod
    def short(cls, value: Any) -> Any:
        """What stands for a mapping in this place, if anything but one does."""
        raise wrong(f"must be a mapping, not {noun(value)}", next=cls.hint())

    @classmethod
    def hint(cls) -> str:
        return f"Its fields are {', '.join(cls.model_fields)}."


def _words(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        words = shlex.split(some_text(value))
    except ValueError as error:
        raise wrong(
            "cannot be split into words", why=str(error).lower(), next="Write it as a list."
        ) from None
    return words


def _alone(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Words = Annotated[
    tuple[Text, ...],
    BeforeValidator(_words, json_schema_input_type=str | list[str | int | float]),
    Kind("a list of words, or one line that is split as a shell would", "[python, train.py, --lr, 0.1]"),
]
Several = Annotated[
    tuple[SomeText, ...],
    BeforeValidator(_alone, json_schema_input_type=str | list[str]),
    Kind("a text or a list of them", ""),
]
