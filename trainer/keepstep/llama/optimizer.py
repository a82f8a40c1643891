"""AdamW over flat buffers, each rank updating the ranges it owns (ZeRO, over DP x CP).

One update: the owner has the sum of the gradient of its ranges (sharding.py); a few numbers are gathered from
every rank (loss, squared norm); the owner clips and updates; the new weights are gathered, at once or, where
parameters are sharded, when they are needed.

Sums are made in a fixed order that does not depend on the present number of replicas. A job that asked for
four replicas and has two left lets each compute the gradients of two, adds them in the old order, and so gets
the old result bit by bit (on CPU; NCCL adds in an order of its own).

Norm weights do not decay, matrices do. Gradients are fp32, whatever the weights are.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from keepstep.core.errors import InputError
from keepstep.llama.flat import FlatState
from keepstep.llama.parallel import Groups
from keepstep.llama.sharding import Gradients, Weights
from keepstep.session import Session, current

ROW = 1024  # elements of the gradient whose squares are added in fp32


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig:
    """Llama 3's recipe, scaled to small runs: warm-up to the peak, cosine to min_lr, annealing to nothing."""

    lr: float = 1e-3  # peak
    min_lr: float = 1e-4  # where the cosine ends
    warmup_steps: int = 10
    decay_steps: int | None = None  # at which the cosine ends; None: where annealing begins
    anneal_steps: int = 0  # the last ones, over which the rate goes to nothing in a line
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # matrices only
    clip: float = 1.0  # global norm of the gradient; 0: never

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> "OptimizerConfig":
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise InputError(
                f"unknown: {', '.join(unknown)}",
                where="optimizer",
                next=f"Known: {', '.join(sorted(known))}.",
            )
        return cls(**values)

    def lr_at(self, step: int, steps: int) -> float:
        """Of the update that follows `step` completed ones."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        annealing = steps - self.anneal_steps
        end = annealing if self.decay_steps is None else self.decay_steps
        part = min(1.0, (min(step, annealing) - self.warmup_steps) / max(1, end - self.warmup_steps))
        lr = self.min_lr + (self.lr - self.min_lr) * 0.5 * (1.0 + math.cos(math.pi * part))
        if step < annealing or not self.anneal_steps:
            return lr
        return lr * max(0, steps - step) / self.anneal_steps


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """What everybody knows after an update."""

    loss: float  # mean over the valid tokens of the global batch, before the update
    grad_norm: float  # global, before clipping
    asks: tuple[bool, ...]  # each question: whether any rank asked it
    least: tuple[float, ...] = ()  # the MIN over all ranks of what each of them said
    skipped: bool = False  # its batch is left out: it was known to do harm


class ShardedAdamW:
    def __init__(
        self, state: FlatState, groups: Groups, config: OptimizerConfig, session: Session | None = None
    ) -> None:
        self.state, self.groups, self.config = state, groups, config
        self._session = session or current()
        self.gradients = Gradients(state, groups, self._session)
        self.weights = Weights(state, groups, self._session)
        index = state.index
        # Squared norms per replica-sized piece of each unit: the same pieces whatever dp is now.
        self._pieces: list[list[slice]] = [[] for _ in range(self.gradients.mine)]
        self._matrices: list[slice] = []  # of the owned state
        self._norms: list[slice] = []
        for unit, owned in zip(index.units, index.owned(state.dp_rank), strict=True):
            at = index.local(unit).start - owned.start
            piece = len(owned) // len(self._pieces)
            stop = unit.used if groups.at.tp == 0 else unit.matrices  # norms count once
            for pieces, k in zip(self._pieces, range(owned.start, owned.stop, piece), strict=True):
                pieces.append(slice(at + min(k, stop), at + min(k + piece, stop)))
            edge = max(owned.start, min(unit.matrices, owned.stop))
            self._matrices += [slice(at + owned.start, at + edge)] if edge > owned.start else []
            self._norms += [slice(at + edge, at + owned.stop)] if edge < owned.stop else []
        self._count = torch.zeros((), device=state.state.device)

    def update(
        self,
        losses: Tensor,
        *,
        lr: float,
        asks: Sequence[bool] = (),
        says: Sequence[float] = (),
        left_out: bool = False,
    ) -> Update:
        """One step. `losses` [replicas of this rank], zero but on the ranks that count.

        `asks` are this rank's wishes (to stop, to save): all ranks learn of them in the same step. Of each
        number that it `says` all learn the least.

        The gradient is finite or the update does not happen: a NaN would reach every weight. Nor does it for
        a batch that is left out.
        """
        grads = self.gradients.sum()
        squares = torch.stack([_added([squared_norm(grads[p]) for p in pieces]) for pieces in self._pieces])
        others = [losses.new_full(losses.shape, value, dtype=torch.float64) for value in (*asks, *says)]
        rows = self._gathered(torch.stack((losses.double(), squares, *others), dim=1))
        summed = 2 + len(asks)
        loss, square, *wished = _totals(rows, summed)
        least = tuple(min(column) for column in zip(*(row[summed:] for row in rows), strict=True))
        norm = math.sqrt(square)
        if math.isfinite(norm) and not left_out:
            too_long = self.config.clip and norm > self.config.clip
            self._adamw(grads, lr, norm / self.config.clip if too_long else 1.0)
        self.publish()
        self.state.step += 1
        return Update(loss=loss, grad_norm=norm, asks=tuple(wish > 0 for wish in wished), least=least)

    def publish(self) -> None:
        """Every rank's weights from the owners' master weights: after an update and after a restore.

        Where parameters are sharded nobody has them between two updates.
        """
        if not self.state.parameters_sharded:
            for unit in self.state.index.units:
                self.weights.gather(unit)

    def _gathered(self, mine: Tensor) -> list[list[float]]:
        """[replicas of this rank, n] of all ranks, in the order of replica, stage, shard.

        Of replicas a rank has every dp-th, but of the squares (the second column) those of neighbouring
        pieces.
        """
        layout, rows = self.groups.layout, mine
        if self.groups.world is not None:
            every = mine.new_empty(layout.world_size * mine.shape[0], mine.shape[1])
            self._session.wait("world")
            dist.all_gather_into_tensor(every, mine, group=self.groups.world)
            self._session.go_on()
            by_rank = every.view(layout.dp, layout.replica_size, *mine.shape)
            rows = by_rank.permute(2, 0, 1, 3).reshape(-1, mine.shape[1])
            rows[:, 1] = by_rank[..., 1].transpose(1, 2).reshape(-1)
        found: list[list[float]] = rows.tolist()
        return found

    def _adamw(self, grads: Tensor, lr: float, too_long: float) -> None:
        state, config = self.state, self.config
        self._count.fill_(state.step + 1)
        scale = None if too_long == 1.0 else torch.tensor(too_long, device=grads.device)
        for parts, decay in ((self._matrices, config.weight_decay), (self._norms, 0.0)):
            if not parts:
                continue
            masters, gradients, firsts, seconds = (
                [buffer[part] for part in parts]
                for buffer in (state.master, grads, state.exp_avg, state.exp_avg_sq)
            )
            torch._fused_adamw_(
                masters, gradients, firsts, seconds, [], [self._count] * len(parts), lr=lr,
                beta1=config.beta1, beta2=config.beta2, weight_decay=decay, eps=config.eps,
                amsgrad=False, maximize=False, grad_scale=scale, found_inf=None,
            )  # fmt: skip


def _added(parts: list[Tensor]) -> Tensor:
    return functools.reduce(torch.add, parts)


def squared_norm(part: Tensor) -> Tensor:
    """Of a flat vector, in fp64.

    PyTorch adds one after the other on CPU: in fp32 the sum soon hides what is added to it. The norm of 3
    million elements came out 5e-4 too small, that of 50 million 4e-3, and clipping scaled every gradient so.
    """
    whole = len(part) // ROW * ROW
    rows: Tensor = torch.linalg.vector_norm(part[:whole].view(-1, ROW), dim=1)
    rest: Tensor = torch.linalg.vector_norm(part[whole:])
    return rows.double().square().sum() + rest.double().square()


def _totals(rows: list[list[float]], columns: int) -> list[float]:
    """Added one after the other: `sum` rounds in another way in newer Pythons."""
    totals = [0.0] * columns
    for row in rows:
        totals = [a + b for a, b in zip(totals, row[:columns], strict=True)]
    return totals
