"""A piece of the weights to be read."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Part:
    """A rectangle of a parameter, and the memory that it goes to, of any type of numbers."""

    name: str  # canonical
    offset: tuple[int, ...]
    out: Tensor
