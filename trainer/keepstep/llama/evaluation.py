"""The loss on text that is not trained on: forward passes alone, through the same pipeline.

Of each source the same first sequences are taken every time, so losses of two steps are comparable, and one
that is computed again after a restart is the same. They are shared out over replicas and micro-batches; what
is over is filled up with sequences without targets. No gradient is made, no buffer of them is touched.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from keepstep.llama.data import Batch, Corpus, Stream
from keepstep.llama.microbatch import Sequences, targets_of
from keepstep.llama.trainer import Trainer
from keepstep.session import Phase


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """What every rank knows after an evaluation."""

    step: int  # after which it was made
    loss: float  # the mean over sources, by their shares of the text
    by_source: Mapping[str, float]  # mean over the tokens of a source that have a target


class Evaluator:
    def __init__(self, trainer: Trainer, text: Corpus, *, sequences: int) -> None:
        """At most so many sequences of each source: where it has fewer, all of them once."""
        self._trainer, self._sequences, self._text = trainer, sequences, text
        self._streams: Mapping[int, Sequence[Stream]] = {}  # of the present stage, by the length of sequences
        shares = [1.0] if text.mixture is None else text.mixture.shares.tolist()
        self._shares = [share / sum(shares) for share in shares]

    def evaluate(self) -> Validation:
        """All ranks call it after the same step; sequences are those of that step's stage."""
        trainer = self._trainer
        trainer.session.phase(Phase.EVALUATION)
        trainer.enter(max(0, trainer.state.step - 1))
        streams = self._of(trainer.now.seq)
        found = torch.stack([self._source(stream) for stream in streams])
        if trainer.groups.world is not None:
            trainer.session.wait("world")
            dist.all_reduce(found, group=trainer.groups.world)
            trainer.session.go_on()
        losses = [loss / tokens if tokens else math.nan for loss, tokens in found.tolist()]
        return Validation(
            step=trainer.state.step,
            loss=sum(share * loss for share, loss in zip(self._shares, losses, strict=True)),
            by_source={s.text.source: loss for s, loss in zip(streams, losses, strict=True)},
        )

    def _of(self, seq: int) -> Sequence[Stream]:
        if seq not in self._streams:
            texts = [stream.text for stream in self._text.streams]
            self._streams = {
                seq: [Stream(text, seed=self._text.seed, stages=[(None, seq)]) for text in texts]
            }
        return self._streams[seq]

    def _source(self, stream: Stream) -> torch.Tensor:
        """Of this rank's share of a source: summed loss and number of targets, [2] fp64."""
        trainer = self._trainer
        job, dp = trainer.now, trainer.groups.at.dp
        whole = min(self._sequences, stream.samples_per_epoch)
        each = -(-whole // job.layout.dp)  # of a replica; as many of them at a time as in a step
        count = min(job.micro_batches, -(-each // job.micro_batch)) * job.micro_batch
        sums = torch.zeros(2, dtype=torch.float64, device=trainer.state.grads.device)
        for start in range(0, each, count):
            batch = _without_targets(count, job.seq)
            mine = range(dp * each + start, min((dp + 1) * each, dp * each + start + count, whole))
            for row, sample in enumerate(mine):
                stream.fill(batch, row, sample)
            sequences = Sequences.of(batch)
            targets = targets_of(sequences)
            targets[len(mine) :] = -100
            batches = trainer.cut(sequences, targets, scale=1.0)
            losses = trainer.runner.run(batches, learns=False)
            if trainer.counts_loss:
                for loss in losses.double():
                    sums[0] += loss
                sums[1] += sum((part.targets >= 0).sum() for part in batches if part.targets is not None)
        return sums


def _without_targets(count: int, seq: int) -> Batch:
    return Batch(
        tokens=np.zeros((count, seq + 1), np.int64),
        documents=np.zeros((count, seq), np.int32),
        positions=np.tile(np.arange(seq), (count, 1)),
    )
