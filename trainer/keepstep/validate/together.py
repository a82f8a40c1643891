"""What devices do together: add up over a group, and train a few steps of a Llama."""

import hashlib
import mmap
import os
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from keepstep.core.beacon import PAGE
from keepstep.core.errors import InputError
from keepstep.core.layout import Layout
from keepstep.core.validation import TRAINING
from keepstep.llama import parallel
from keepstep.llama.data import Batch
from keepstep.llama.initial import initialise
from keepstep.llama.job import TrainJob
from keepstep.llama.optimizer import OptimizerConfig
from keepstep.llama.shape import ModelShape
from keepstep.llama.trainer import Trainer
from keepstep.session import Session
from keepstep.validate.bench import Bench, Measured, checksum

_PRIME = 97  # values stay below it, so sums over 172,000 ranks are exact in float32
_REPEATS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Of the training: the failed job's, or a small one."""

    model: ModelShape
    tp: int = 1
    seq: int = 64
    steps: int = 3

    @property
    def workload(self) -> str:
        """Its name: what is called the same can be compared."""
        model = self.model
        of = f" {model.layers} x {model.dim}, seq {self.seq}, tp {self.tp}" if self != SMALL else ""
        return f"{TRAINING}{of}"


SMALL = Shape(
    model=ModelShape(layers=2, dim=64, ffn_dim=128, heads=4, kv_heads=2, vocabulary=256, max_seq=64)
)


def all_reduce(bench: Bench, world_size: int, rank: int) -> Measured:
    """Sums of whole numbers: each rank knows beforehand what must come out."""
    count = bench.sizes.reduce_elements
    index = torch.arange(count, device=bench.device)
    mine = (index * (rank + 1) % _PRIME).float()
    expected = sum(index * (k + 1) % _PRIME for k in range(world_size))
    assert isinstance(expected, torch.Tensor)
    took, sums, wrong = [], mine.clone(), ""
    for _ in range(_REPEATS):
        sums.copy_(mine)
        took.append(bench.seconds(lambda: dist.all_reduce(sums)))
        bad = int((sums != expected).sum())
        if bad:
            wrong = f"{bad} of {count} sums are not what they must be"
            break
    on_the_bus = 4.0 * count * 2.0 * (world_size - 1) / world_size
    return Measured(checksum=checksum(sums), figure=on_the_bus / min(took) / 1e9, unit="GB/s", wrong=wrong)


def training(bench: Bench, shape: Shape, *, timeout_s: float) -> Measured:
    """The same steps twice from the same beginning: losses, norms and weights must be the same to the bit.

    So must losses be on every node with as many devices of the same kind.
    """
    job = _job(shape, int(os.environ.get("WORLD_SIZE", "1")), timeout_s)
    groups = parallel.Groups(layout=job.layout, rank=0)
    if dist.is_initialized():
        groups = parallel.groups(job.layout, dist.get_rank(), timedelta(seconds=timeout_s))
    first, second = (_trained(bench, job, groups) for _ in range(2))
    step = next((k for k, loss in enumerate(first.losses) if loss != second.losses[k]), None)
    wrong = "" if first.weights == second.weights else "two runs of the same leave other weights"
    if step is not None:
        wrong = f"two runs of the same differ from step {step + 1} on"
    told = "\n".join(second.losses).encode()
    return Measured(
        checksum=hashlib.blake2b(told, digest_size=8).hexdigest(),
        figure=max(first.tokens_per_s, second.tokens_per_s), unit="tokens/s", wrong=wrong,
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class _Trained:
    losses: list[str]  # with gradient norms, to the bit; the same on all ranks
    weights: str  # of this rank's shard
    tokens_per_s: float


def _trained(bench: Bench, job: TrainJob, groups: parallel.Groups) -> _Trained:
    # What goes wrong is this workload's result, and no trouble of a job that would be begun again.
    silent = Session(mmap.mmap(-1, PAGE), rank=groups.rank, world_size=job.layout.world_size, attached=False)
    trainer = Trainer(job, groups, _Patterns(job), device=bench.device, session=silent)
    initialise(trainer.state, job.shape, job.seed)
    trainer.optimizer.publish()
    losses: list[str] = []

    def steps() -> None:
        for _ in range(job.steps):
            update = trainer.step()
            losses.append(f"{update.loss.hex()} {update.grad_norm.hex()}")

    took_s = bench.seconds(steps)
    return _Trained(
        losses=losses, weights=checksum(trainer.state.weights),
        tokens_per_s=job.steps * job.global_tokens / took_s,
    )  # fmt: skip


def _job(shape: Shape, world_size: int, timeout_s: float) -> TrainJob:
    """As many replicas as there is room for, one sequence each. Errors: InputError where it does not fit."""
    if world_size % shape.tp:
        raise InputError(
            f"{world_size} ranks cannot be cut into tensor groups of {shape.tp}", where="--tp",
            next="Choose a number that divides the slots of the node.",
        )  # fmt: skip
    layout = Layout(dp=world_size // shape.tp, tp=shape.tp)
    job = TrainJob(
        id="validation", attempt=1, layout=layout, replicas=layout.dp, shape=shape.model, data={},
        steps=shape.steps, global_tokens=layout.dp * shape.seq, seq=shape.seq, micro_batch=1,
        optimizer=OptimizerConfig(), seed=0, checkpoint=None, restore=None, memory=None, snapshot_every=0,
        branches=(), init_from=None, timeout_s=timeout_s,
    )  # fmt: skip
    job.check()
    return job


class _Patterns:
    """Made from (step, number) alone, so that nothing has to be on the node."""

    def __init__(self, job: TrainJob) -> None:
        self._seq, self._vocabulary = job.seq, job.shape.vocabulary

    def sequences(self, step: int, start: int, stop: int) -> Batch:
        tokens: NDArray[np.int64] = np.stack(
            [
                np.cumsum(np.random.default_rng([step, number]).integers(0, 3, self._seq + 1))
                % self._vocabulary
                for number in range(start, stop)
            ]
        )
        documents = np.zeros((stop - start, self._seq), np.int32)
        positions = np.tile(np.arange(self._seq, dtype=np.int64), (stop - start, 1))
        return Batch(tokens, documents, positions)
