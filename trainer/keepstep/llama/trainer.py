"""One rank's trainer: its share of the model, and a step from data to updated weights."""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.distributed as dist

from keepstep.core.beacon import Trouble
from keepstep.core.footprint import Footprint, footprint
from keepstep.llama.data import Batch
from keepstep.llama.flat import FlatIndex, FlatState
from keepstep.llama.float8 import check_device
from keepstep.llama.job import TrainJob
from keepstep.llama.kernels import Kernels
from keepstep.llama.microbatch import MicroBatch, Rotation, Sequences, Share, micro_batches, targets_of
from keepstep.llama.model import Means, Stage
from keepstep.llama.numerics import Numerics
from keepstep.llama.optimizer import ShardedAdamW, Update
from keepstep.llama.parallel import Groups
from keepstep.llama.parity import Parity
from keepstep.llama.pipeline import Runner
from keepstep.llama.sharding import sharded
from keepstep.llama.tensor_parallel import Peers
from keepstep.session import Phase, Session

# Dense BF16 peaks in FLOP/s, by a part of the device's name (NVIDIA's data sheets, SXM where there are two).
PEAKS = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}


class Source(Protocol):
    """Where batches come from: a pure function of the step."""

    def sequences(self, step: int, start: int, stop: int) -> Batch: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    tokens_per_s: float  # of the job
    tflops: float  # per GPU (slot), by ModelShape.flops_per_token
    mfu: float  # nan where no peak is known


class Trainer:
    def __init__(
        self,
        job: TrainJob,
        groups: Groups,
        source: Source,
        *,
        device: torch.device,
        session: Session,
        ahead: bool | None = None,
    ) -> None:
        """`ahead`: where parameters are sharded, a unit's weights travel while another computes; None: on
        CUDA."""
        self.job, self.groups, self.source, self.session = job, groups, source, session
        self.now = job  # with the batch of the present stage
        self.dtype = _dtype(job.numerics, device)
        ahead = device.type == "cuda" if ahead is None else ahead
        if job.numerics.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is used first
            torch.use_deterministic_algorithms(True)
            # Nothing here reads what it did not write.
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        at = groups.at
        shard = job.numerics.shard
        index = FlatIndex.of(
            job.shape, job.layout, at, replicas=job.replicas, chunks=job.pipeline.chunks, shard=shard
        )
        self.state = FlatState(index, at.dp, device=device, dtype=self.dtype, shard=shard, ahead=ahead)
        self.optimizer = ShardedAdamW(self.state, groups, job.optimizer, session)
        self.parity = Parity(self.state, groups, session)
        self.rotation = Rotation(job.shape, device)
        tp, cp = Peers(groups.tp, session), Peers(groups.cp, session, along="cp")
        kernels = Kernels.compiled() if job.numerics.compile else Kernels()
        if job.numerics.float8:
            check_device(device)
        means = Means(
            tp=tp, cp=cp, kernels=kernels, recompute=job.numerics.recompute, float8=job.numerics.float8,
            units=sharded(self.state, self.optimizer.weights, self.optimizer.gradients),
        )  # fmt: skip
        self.share = Share(job.layout.cp, at.cp)
        pp, chunks = job.layout.pp, job.pipeline.chunks
        stages = [
            Stage(job.shape, self.state, means, stages=pp * chunks, stage=chunk * pp + at.pp)
            for chunk in range(chunks)
        ]
        self.counts_loss = stages[-1].last and at.tp == 0
        # Replicas one after the other, or their micro-batches by turns: see sharding.py.
        self.turns = self.optimizer.gradients.mine if self.state.gradients_sharded else 1
        self.runner = Runner(
            stages, groups, session, pipeline=job.pipeline, dim=job.shape.dim, dtype=self.dtype, device=device
        )

    @property
    def reports(self) -> bool:
        """Whether this is the one rank that prints."""
        return self.counts_loss and self.groups.at.dp == self.groups.at.cp == 0

    def step(
        self,
        asks: Sequence[bool] = (),
        *,
        says: Callable[[], Sequence[float]] = tuple,
        gate: Callable[[], None] = lambda: None,
    ) -> Update:
        """Forward, backward and update on the global batch that follows the present step.

        `gate` is called before the first gradient collective: what must be complete by then. `says` is asked
        just before the update.
        """
        job, state = self.job, self.state
        self.enter(state.step)
        self.session.phase(Phase.DATA)
        mine = self.optimizer.gradients.mine
        shares = [self._share(replica) for replica in range(mine)]
        targets = [targets_of(share) for share in shares]
        scale = 1.0 / self._valid(targets)
        losses = torch.zeros(mine, device=state.grads.device)
        self.optimizer.gradients.begin(gate)
        for first in range(0, mine, self.turns):
            batches = [
                self.cut(shares[replica], targets[replica], scale=scale)
                for replica in range(first, first + self.turns)
            ]
            if not state.gradients_sharded:
                state.grads.zero_()
            of_batches = self.runner.run([batch for turn in zip(*batches, strict=True) for batch in turn])
            if self.counts_loss:
                for loss in of_batches.view(-1, self.turns):
                    losses[first : first + self.turns] += loss
            self.session.phase(Phase.OPTIMIZER)
            if not state.gradients_sharded:
                self.optimizer.gradients.collect(state.index.units[0])
        self.parity.check()
        lr = job.optimizer.lr_at(state.step, job.steps)
        left_out = state.step + 1 in job.skip_steps
        update = self.optimizer.update(losses, lr=lr, asks=asks, says=says(), left_out=left_out)
        self.parity.seal()
        return replace(update, skipped=True) if left_out else self._believed(update)

    def _believed(self, update: Update) -> Update:
        """What is not finite made no update, and is told.

        Errors: RuntimeError on all ranks alike where a controller can do something about it.
        """
        if math.isfinite(update.loss) and math.isfinite(update.grad_norm):
            return update
        step = self.state.step
        if not self.optimizer.gradients.finite_here():
            self.session.trouble(Trouble.NOT_FINITE_HERE, step)
        self.session.trouble(Trouble.NOT_FINITE, step)
        if self.session.attached:
            raise RuntimeError(f"step {step} gave a loss or gradient that is not finite; no update was made")
        return update

    def held(self) -> Footprint:
        """Bytes that this rank holds: its buffers exactly; activations where the device's allocator tells.

        On CUDA all that was allocated beside the buffers at the peak, the logits among it.
        """
        state, gradients = self.state, self.optimizer.gradients
        seen: set[int] = set()

        def apart(*buffers: torch.Tensor) -> int:
            """Bytes of those that share no memory with an earlier one."""
            count = 0
            for storage in (buffer.untyped_storage() for buffer in buffers):
                count += 0 if storage.data_ptr() in seen else storage.nbytes()
                seen.add(storage.data_ptr())
            return count

        owned, weights, grads = apart(state.state), apart(state.weights), apart(state.grads)
        exchanged = apart(gradients.owned, gradients.segment, gradients.received)
        peak_bytes = 0
        if state.state.is_cuda:
            peak_bytes = torch.cuda.max_memory_allocated() - owned - weights - grads - exchanged
        return Footprint(
            owned=owned, weights=weights, gradients=grads, exchanged=exchanged,
            activations=max(0, peak_bytes), edges=0, working=0, logits=0,
        )  # fmt: skip

    def expected(self) -> Footprint:
        """What it was to hold, at most, in the present stage: core.footprint."""
        job, cuda = self.job, self.state.state.is_cuda
        training = self.now.training(element=self.dtype.itemsize, cuda=cuda)
        return footprint(job.shape, job.layout, self.groups.rank, training)

    def enter(self, step: int) -> None:
        """The stage of the step that follows `step` completed ones."""
        self.now = self.job.at(step)

    def rates(self, elapsed_s: float) -> Rates:
        """Of one step of the present stage that took this long."""
        job = self.now
        tokens_per_s = job.global_tokens / elapsed_s
        flops = job.shape.flops_per_token(job.seq) * tokens_per_s / job.layout.world_size
        return Rates(
            tokens_per_s=tokens_per_s, tflops=flops / 1e12, mfu=flops / peak(self.state.grads.device)
        )

    def cut(self, sequences: Sequences, targets: torch.Tensor, *, scale: float) -> list[MicroBatch]:
        return micro_batches(
            sequences, targets, size=self.now.micro_batch, scale=scale, rotation=self.rotation,
            dtype=self.dtype, share=self.share,
        )  # fmt: skip

    def _share(self, replica: int) -> Sequences:
        """The sequences of one of this rank's replicas."""
        number = replica * self.job.layout.dp + self.groups.at.dp
        count = self.now.sequences_per_replica
        return Sequences.of(self.source.sequences(self.state.step, number * count, (number + 1) * count))

    def _valid(self, targets: list[torch.Tensor]) -> int:
        """Tokens of the global batch that have a target."""
        count = sum(((part >= 0).sum() for part in targets), torch.zeros((), dtype=torch.int64))
        if self.groups.dp is not None:
            count = count.to(self.state.grads.device)
            self.session.wait("dp")
            dist.all_reduce(count, group=self.groups.dp)
            self.session.go_on()
        return max(1, int(count))


def _dtype(numerics: Numerics, device: torch.device) -> torch.dtype:
    """Of weights and activations while computing."""
    match numerics.precision:
        case "bf16":
            return torch.bfloat16
        case "fp32":
            return torch.float32
        case _:
            return torch.bfloat16 if device.type == "cuda" else torch.float32


def peak(device: torch.device) -> float:
    """FLOP/s of the device in BF16, dense; nan where it is not known, a CPU among them."""
    if device.type != "cuda":
        return float("nan")
    name = torch.cuda.get_device_name(device)
    return next((flops for part, flops in PEAKS.items() if part in name), float("nan"))
