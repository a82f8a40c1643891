"""What a rank owns of the model, in the coordinates of the whole model.

A rank owns one contiguous range of each unit of its flat index. The part of a matrix that such a range cuts
out is at most three rectangles: the rest of a row, whole rows, the beginning of a row. Each is contiguous in
memory and a chunk of the global tensor, so neither saving nor loading needs to know which layout wrote the
other's file.

      . . . x x x      rest of a row
      x x x x x x      whole rows
      x x x x x x
      x x . . . .      beginning of a row
"""

from collections.abc import Iterator
from dataclasses import dataclass

from keepstep.llama.flat import FlatIndex, FlatParameter


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A rectangle of one parameter that lies contiguously in the owned state."""

    name: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]  # in the global tensor
    size: tuple[int, ...]
    start: int  # of its first element, from the start of the owned state
    replicated: bool  # every tensor parallel rank has it

    @property
    def numel(self) -> int:
        count = 1
        for length in self.size:
            count *= length
        return count


def owned_pieces(index: FlatIndex, dp_rank: int) -> list[Piece]:
    """Everything that a rank owns; padding belongs to no piece."""
    return [
        piece
        for unit, owned in zip(index.units, index.owned(dp_rank), strict=True)
        for parameter in unit.parameters
        for piece in _cut(parameter, owned, index.local(unit).start)
    ]


def _cut(parameter: FlatParameter, owned: range, at: int) -> Iterator[Piece]:
    """`at`: where the range starts in the rank's state."""
    first = max(parameter.offset, owned.start)
    last = min(parameter.offset + parameter.numel, owned.stop)
    if first >= last:
        return
    for local, size in _rectangles(parameter.shape, first - parameter.offset, last - parameter.offset):
        offset = list(local)
        if parameter.tp_dim is not None:
            offset[parameter.tp_dim] += parameter.tp_offset
        piece = Piece(
            name=parameter.name,
            global_shape=parameter.global_shape,
            offset=tuple(offset),
            size=size,
            start=at + first - owned.start,
            replicated=parameter.tp_dim is None,
        )
        yield piece
        first += piece.numel


def _rectangles(
    shape: tuple[int, ...], start: int, stop: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Offset and size of each rectangle of elements [start, stop) of a vector or matrix."""
    if len(shape) == 1:
        yield (start,), (stop - start,)
        return
    assert len(shape) == 2, shape
    width = shape[1]
    row, column = divmod(start, width)
    last_row, last_column = divmod(stop, width)
    if row == last_row:
        yield (row, column), (1, last_column - column)
        return
    if column:
        yield (row, column), (1, width - column)
        row += 1
    if last_row > row:
        yield (row, 0), (last_row - row, width)
    if last_column:
        yield (last_row, 0), (1, last_column)
