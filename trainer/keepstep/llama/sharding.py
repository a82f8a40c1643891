"""ZeRO over DP x CP: what is gathered from its owners, and what is added for them.

Which rank owns what is flat.py's. Here a unit's whole weights are gathered from the owners' master weights,
and this rank's gradient of a unit is added, with that of all others, to the sum that its owner keeps:

    shard         gathered                         added
    optimizer     all, after the update            all, once a replica
    gradients     all, after the update            a unit at a time, after each of its backward passes
    parameters    a unit at a time, before its     the same
                  forward and its backward pass

Replica r of those that the job asked for is computed by rank r modulo dp along DP. So each rank's first
replica, then each one's second, and so on, are added to the sum as they come, and the order of additions is
that of replicas however many ranks there are. Where a unit's gradient is added pass by pass, the order is
that of (micro-batch, replica), and a rank that computes several replicas takes their micro-batches by turns.
So each mode gives the same bits at every dp, and the last two modes the same as each other.

The price of taking turns: with gpipe, a rank that computes several replicas holds the activations of all.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from keepstep.llama.flat import FlatState, Unit, unit_of
from keepstep.llama.parallel import Groups
from keepstep.llama.tensor_parallel import reduce_scatter
from keepstep.session import Session


class Weights:
    """The whole weights of a unit, from the owners' master weights."""

    def __init__(self, state: FlatState, groups: Groups, session: Session) -> None:
        self._state, self._groups, self._session = state, groups, session
        # One that is on its way, and its part in the type that is computed with.
        self._coming: tuple[Unit, dist.Work, Tensor] | None = None

    def gather(self, unit: Unit) -> None:
        state, index = self._state, self._state.index
        if state.shared:
            return
        if self._coming is not None and self._coming[0] is unit:
            (_, work, _), self._coming = self._coming, None
            self._session.wait("dp")
            work.wait()
            self._session.go_on()
            return
        whole, own = state.weights_of(unit), self._own(unit)
        segment = self._segment(unit)
        if index.dp == 1:
            segment.copy_(own)
        else:
            self._session.wait("dp")
            dist.all_gather_into_tensor(segment, own, group=self._groups.dp)
            self._session.go_on()
        if index.cp > 1:
            own = segment.clone()
            self._session.wait("cp")
            dist.all_gather_into_tensor(whole, own, group=self._groups.cp)
            self._session.go_on()

    def begin(self, unit: Unit) -> None:
        """Have it gathered while something else is computed; where that takes one collective."""
        assert self._coming is None, "gathered one after the other"
        index = self._state.index
        if index.dp > 1 and index.cp == 1:
            own = self._own(unit)
            work = dist.all_gather_into_tensor(self._segment(unit), own, group=self._groups.dp, async_op=True)
            assert work is not None
            self._coming = unit, work, own

    def _own(self, unit: Unit) -> Tensor:
        return self._state.master[self._state.index.local(unit)].to(self._state.weights.dtype)

    def _segment(self, unit: Unit) -> Tensor:
        segment = self._state.index.segment(unit)
        return self._state.weights_of(unit)[segment.start - unit.start : segment.stop - unit.start]


class Gradients:
    """The sum over all replicas of the gradient of the ranges that this rank owns."""

    def __init__(self, state: FlatState, groups: Groups, session: Session) -> None:
        index, device = state.index, state.grads.device
        self.state, self.groups, self._session = state, groups, session
        self.mine = index.replicas // index.dp  # replicas that this rank computes
        # NCCL adds while it reduces; elsewhere blocks are exchanged and added here: [dp, of a unit's range].
        self._direct = state.grads.is_cuda
        exchanging = index.dp > 1 and not self._direct
        self.received = torch.empty(index.largest // index.cp if exchanging else 0, device=device)
        # What is left to share out among the replicas, once context parallel ranks have added theirs.
        self.segment = torch.empty(index.largest // index.cp if index.cp > 1 else 0, device=device)
        # The whole gradient of the only replica is its own sum.
        self._alone = index.replicas == 1 and not state.gradients_sharded
        if self._alone:
            self.owned = self.segment if index.cp > 1 else state.grads
        else:
            self.owned = torch.empty(index.shard, device=device)
        self._begun: set[int] = set()
        self._gate: Callable[[], None] = lambda: None
        self._seen = torch.zeros((), device=device)

    def begin(self, gate: Callable[[], None] = lambda: None) -> None:
        """A new sum; `gate` is called before its first collective."""
        self._begun.clear()
        self._gate = gate
        self._seen.zero_()

    def collect(self, unit: Unit) -> None:
        """Adds the gradients of the unit of all ranks: state.grads_of(unit) here."""
        index, grads = self.state.index, self.state.grads_of(unit)
        if not self._begun:
            self._gate()
        first = unit.number not in self._begun
        self._begun.add(unit.number)
        if self.state.gradients_sharded:  # a NaN or infinity stays one in a sum
            self._seen += grads.sum()
        if self.groups.tp is not None:  # each tensor rank saw a share of the tokens only
            self._session.wait("tp")
            norms = grads[unit.matrices - unit.start : unit.used - unit.start]
            dist.all_reduce(norms, group=self.groups.tp)
            self._session.go_on()
        segment = grads
        if index.cp > 1:
            segment = self.segment[: len(unit) // index.cp]
            self._session.wait("cp")
            reduce_scatter(segment, grads, self.groups.cp)
            self._session.go_on()
        if self._alone:
            return
        owned = self.owned[index.local(unit)]
        if index.dp == 1:
            _add(owned, segment.view(1, -1), first=first)
            return
        self._session.wait("dp")
        if self._direct:
            part = owned if first else torch.empty_like(owned)
            dist.reduce_scatter_tensor(part, segment, group=self.groups.dp)
        else:
            received = self.received[: len(segment)]
            dist.all_to_all_single(received, segment, group=self.groups.dp)
        self._session.go_on()
        if not self._direct:
            _add(owned, received.view(index.dp, -1), first=first)
        elif not first:
            owned.add_(part)

    def sum(self) -> Tensor:
        """[shard]; what was collected since the beginning."""
        return self.owned

    def finite_here(self) -> bool:
        """Whether what this rank itself added was."""
        part = self._seen if self.state.gradients_sharded else self.state.grads
        return bool(torch.isfinite(part).all())


def _add(owned: Tensor, blocks: Tensor, *, first: bool) -> None:
    """One block after the other, in their order."""
    if first and len(blocks) == 1:
        owned.copy_(blocks[0])
        return
    if first:
        torch.add(blocks[0], blocks[1], out=owned)
    for block in blocks[2 * first :]:
        owned.add_(block)


class Sharded:
    """A unit in a forward and a backward pass: whole while it computes, and not for longer."""

    def __init__(self, unit: Unit, weights: Weights, gradients: Gradients, state: FlatState) -> None:
        self.unit, self._weights, self._gradients, self._state = unit, weights, gradients, state
        # The embedding's backward pass needs no weights, and the output's is made in its forward pass.
        self.again = unit_of(unit.parameters[0].name) not in ("embedding", "output")
        # The neighbours of its stage whose weights are needed next, in the backward and the forward pass.
        self.before: Unit | None = None
        self.after: Unit | None = None

    def gather(self, ahead: Unit | None = None) -> None:
        """Its weights are here; those of the unit to come are on their way."""
        if self._state.parameters_sharded:
            self._weights.gather(self.unit)
            if ahead is not None and self._state.ahead:
                self._weights.begin(ahead)

    def expect(self) -> None:
        """Its gradient is to be added from nothing."""
        self._state.grads_of(self.unit).zero_()

    def collect(self) -> None:
        self._gradients.collect(self.unit)


def sharded(state: FlatState, weights: Weights, gradients: Gradients) -> dict[str, Sharded]:
    """Each unit by its name; none where all of them are one."""
    if not state.gradients_sharded:
        return {}
    return {
        unit_of(unit.parameters[0].name): Sharded(unit, weights, gradients, state)
        for unit in state.index.units
    }


def linked(units: Sequence[Sharded | None]) -> None:
    """Those of a stage, in the order of its forward pass, know what comes next in either pass."""
    for one, other in itertools.pairwise(units):
        if one is not None and other is not None:
            one.after = other.unit
            other.before = one.unit if one.again else None


def within(unit: Sharded | None, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """run(x), with the unit's weights there in both passes, its gradients in the backward pass."""
    if unit is None:
        return run(x)
    return _Leave.apply(run(_Enter.apply(x, unit)), unit)  # type: ignore[no-any-return]


class _Enter(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, unit: Sharded) -> Tensor:
        ctx.unit = unit
        unit.gather(unit.after)
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        ctx.unit.collect()
        return dy, None


class _Leave(Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, unit: Sharded) -> Tensor:
        ctx.unit = unit
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        unit = ctx.unit
        if unit.again:
            unit.gather(unit.before)
        unit.expect()
        return dy, None
