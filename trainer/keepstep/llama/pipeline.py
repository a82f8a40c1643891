"""Running the micro-batches of one replica through the stages, in the order of a schedule.

One executor for every schedule, and for a single stage too. At the end of each tick of the timetable a rank
sends what it made and posts the receives of what its neighbours made in that tick, as one batch: both sides
list the same messages in the same order, as NCCL wants it, and data travels while the next pass computes.
"""

from collections import deque
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from keepstep.llama.backward import backward
from keepstep.llama.microbatch import MicroBatch
from keepstep.llama.model import Stage
from keepstep.llama.parallel import Groups
from keepstep.llama.schedule import Message, Pass, Pipeline, Tick, messages, timetable
from keepstep.session import Phase, Session


class Runner:
    """Forward and backward of micro-batches. All of a run have the same size."""

    def __init__(
        self,
        stages: Sequence[Stage],
        groups: Groups,
        session: Session,
        *,
        pipeline: Pipeline,
        dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """`stages`: one a chunk. Activations between them are [tokens / cp / tp, dim]."""
        self._stages, self._group, self._session, self._pipeline = stages, groups.pp, session, pipeline
        self._dim, self._dtype, self._device, self._layout = dim, dtype, device, groups.layout
        self._rank, self._ring = groups.at.pp, groups.layout.group("pp", groups.rank)
        self._timetables: dict[tuple[int, bool], list[Tick]] = {}
        self._phase, self._edge = Phase.FORWARD, (0, dim)  # of the present run
        self._sent: deque[tuple[dist.Work, Tensor]] = deque()
        self._coming: dict[Pass, tuple[dist.Work, Tensor, int]] = {}
        self._held: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # (micro-batch, chunk): input, output

    def run(self, batches: Sequence[MicroBatch], *, learns: bool = True) -> Tensor:
        """The loss of each; zero on all ranks but those of the last stage.

        Where nothing is learnt, there are forward passes alone.
        """
        losses = torch.zeros(len(batches), device=batches[0].tokens.device)
        self._edge = len(batches[0].tokens) // self._layout.tp, self._dim
        self._phase = Phase.FORWARD if learns else Phase.EVALUATION
        with torch.set_grad_enabled(learns):
            self._run(batches, self._timetable(len(batches), learns=learns), losses)
        return losses

    def _timetable(self, micro_batches: int, *, learns: bool) -> list[Tick]:
        key, pp = (micro_batches, learns), self._layout.pp
        if key not in self._timetables:
            orders = [self._pipeline.passes(pp, rank, micro_batches) for rank in range(pp)]
            if not learns:
                orders = [[one for one in order if not one.backward] for order in orders]
            self._timetables[key] = timetable(orders)
        return self._timetables[key]

    def _run(self, batches: Sequence[MicroBatch], ticks: Sequence[Tick], losses: Tensor) -> None:
        for tick in ticks:
            one, made = tick[self._rank], None
            if one is not None and one.backward:
                made = self._backward(one)
            elif one is not None:
                made = self._forward(one, batches[one.micro_batch])
                if self._stages[one.chunk].last:
                    losses[one.micro_batch] = made
            if len(tick) > 1:
                self._exchange(tick, made)
        while self._sent:
            self._sent.popleft()[0].wait()

    def _forward(self, one: Pass, batch: MicroBatch) -> Tensor:
        stage = self._stages[one.chunk]
        self._session.phase(self._phase, micro_batch=one.micro_batch)
        learns = self._phase is Phase.FORWARD
        x = batch.tokens if stage.first else self._received(one).requires_grad_(learns)
        y = stage(x, batch=batch)
        if learns:
            self._held[one.micro_batch, one.chunk] = x, y
        return y.detach()

    def _backward(self, one: Pass) -> Tensor | None:
        """The gradient of the stage's input; None where there is nobody to send it to."""
        self._session.phase(Phase.BACKWARD, micro_batch=one.micro_batch)
        dy = None if self._stages[one.chunk].last else self._received(one)
        x, y = self._held.pop((one.micro_batch, one.chunk))
        if dy is None:
            torch.autograd.backward(y)
        else:
            backward(y, dy)
        return x.grad

    def _received(self, one: Pass) -> Tensor:
        work, x, sender = self._coming.pop(one)
        self._session.wait("pp", one.micro_batch, self._ring[sender])
        work.wait()
        self._session.go_on()
        return x

    def _exchange(self, tick: Tick, made: Tensor | None) -> None:
        mine = [m for m in messages(tick, len(self._stages)) if self._rank in (m.sender, m.receiver)]
        if not mine:
            return
        buffers = [self._buffer(message, made) for message in mine]
        operations = [
            dist.P2POp(
                dist.isend if m.sender == self._rank else dist.irecv, buffer, group=self._group,
                group_peer=m.receiver if m.sender == self._rank else m.sender,
            )
            for m, buffer in zip(mine, buffers, strict=True)
        ]  # fmt: skip
        works = dist.batch_isend_irecv(operations)
        if len(works) < len(mine):  # NCCL: one for the whole batch
            works = works * len(mine)
        for message, work, buffer in zip(mine, works, buffers, strict=True):
            if message.sender == self._rank:
                self._sent.append((work, buffer))
            else:
                self._coming[message.to] = work, buffer, message.sender
        while len(self._sent) > 2 * len(tick):  # long received: its receiver was at this tick long ago
            self._sent.popleft()[0].wait()

    def _buffer(self, message: Message, made: Tensor | None) -> Tensor:
        if message.sender != self._rank:
            return torch.empty(self._edge, dtype=self._dtype, device=self._device)
        assert made is not None
        return made.contiguous()
