"""In which order the ranks of a pipeline run their passes: pure functions, one list of passes a rank.

A rank may hold several chunks of the model. Virtual stage s = chunk x pp + rank, so activations go round:

    rank 0   layers 0 1 | 8 9      chunk 0 | chunk 1
    rank 1   layers 2 3 | 10 11        and so on; the first and the last layer are on different ranks

- gpipe: all forward passes, then all backward passes (arXiv 1811.06965). All activations are held.
- 1f1b: a rank begins backward passes as soon as there are any (arXiv 2104.04473, figure 4), and so never
  holds more than `pp - rank` micro-batches. One chunk a rank.
- interleaved: the same with several chunks (ibid., section 2.2): the bubble shrinks by the number of chunks,
  messages and held activations grow. Any number of micro-batches will do: they go through the chunks in
  rounds of pp or a few more.

`timetable` puts the lists beside each other in ticks. What a pass needs was made in an earlier tick, and
every rank knows what all others send and receive at the end of each tick; so no order of messages can block.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

SCHEDULES = ("1f1b", "gpipe", "interleaved")


class Pass(NamedTuple):
    backward: bool
    micro_batch: int
    chunk: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """How a job's pipeline is cut and run."""

    schedule: str = "1f1b"
    chunks: int = 1  # of the model on each rank

    def passes(self, pp: int, rank: int, micro_batches: int) -> list[Pass]:
        match self.schedule:
            case "gpipe":
                return gpipe(micro_batches, self.chunks)
            case "1f1b":
                return one_forward_one_backward(pp, rank, micro_batches)
            case _:
                return interleaved(pp, rank, micro_batches, self.chunks)


ONE_CHUNK = Pipeline()


def gpipe(micro_batches: int, chunks: int = 1) -> list[Pass]:
    passes = _through([range(micro_batches)], chunks)
    return [Pass(False, *p) for p in passes] + [Pass(True, m, chunks - 1 - c) for m, c in passes]


def one_forward_one_backward(pp: int, rank: int, micro_batches: int) -> list[Pass]:
    return _woven(_through([range(micro_batches)], 1), 1, ahead=pp - rank - 1)


def interleaved(pp: int, rank: int, micro_batches: int, chunks: int) -> list[Pass]:
    rounds = max(1, micro_batches // pp)
    edges = [micro_batches * k // rounds for k in range(rounds + 1)]
    groups = [range(a, b) for a, b in pairwise(edges)]
    longest = max(map(len, groups))
    return _woven(_through(groups, chunks), chunks, ahead=2 * (pp - rank - 1) + (chunks - 1) * longest)


def _through(groups: Sequence[range], chunks: int) -> list[tuple[int, int]]:
    """(micro-batch, chunk): each group goes through all chunks before the next begins."""
    return [(m, chunk) for group in groups for chunk in range(chunks) for m in group]


def _woven(order: Sequence[tuple[int, int]], chunks: int, *, ahead: int) -> list[Pass]:
    """`ahead` forward passes, then one forward and one backward in turn, then the backward passes left."""
    forward = [Pass(False, *p) for p in order]
    backward = [Pass(True, m, chunks - 1 - c) for m, c in order]
    ahead = min(ahead, len(order))
    pairs = [p for pair in zip(forward[ahead:], backward, strict=False) for p in pair]
    return forward[:ahead] + pairs + backward[len(order) - ahead :]


def needs(one: Pass, stage: int, stages: int) -> tuple[Pass, int] | None:
    """The pass (its chunk left 0) and virtual stage whose result it needs; None: the batch alone."""
    if one.backward:
        return (one._replace(chunk=0), stage + 1) if stage < stages - 1 else None
    return (one._replace(chunk=0), stage - 1) if stage else None


Tick = tuple[Pass | None, ...]  # of each rank


def timetable(orders: Sequence[Sequence[Pass]]) -> list[Tick]:
    """One entry a tick. Errors: ValueError where ranks would wait for each other for ever."""
    pp, stages = len(orders), len(orders) * (1 + max((p.chunk for p in orders[0]), default=0))
    done: set[tuple[Pass, int]] = set()  # the pass, its chunk left 0, and the virtual stage
    at, ticks = [0] * pp, []
    while any(at[rank] < len(order) for rank, order in enumerate(orders)):
        row: list[Pass | None] = [None] * pp
        for rank, order in enumerate(orders):
            if at[rank] == len(order):
                continue
            one = order[at[rank]]
            stage = one.chunk * pp + rank
            need, own = needs(one, stage, stages), (Pass(False, one.micro_batch, 0), stage)
            if (need is None or need in done) and (not one.backward or own in done):
                row[rank] = one
        if not any(row):
            raise ValueError(
                f"every rank waits: {[order[k : k + 1] for k, order in zip(at, orders, strict=True)]}"
            )
        for rank, ran in enumerate(row):
            if ran is not None:
                at[rank] += 1
                done.add((ran._replace(chunk=0), ran.chunk * pp + rank))
        ticks.append(tuple(row))
    return ticks


class Message(NamedTuple):
    """What a pass made, on its way to the rank whose pass `to` needs it."""

    sender: int
    receiver: int
    to: Pass


def messages(tick: Tick, chunks: int) -> list[Message]:
    """All that is sent at the end of a tick, in an order that is the same on every rank."""
    pp, found = len(tick), []
    for sender, one in enumerate(tick):
        if one is None:
            continue
        stage = one.chunk * pp + sender + (-1 if one.backward else 1)
        if 0 <= stage < pp * chunks:
            found.append(Message(sender, stage % pp, one._replace(chunk=stage // pp)))
    return found
