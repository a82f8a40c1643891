"""Running the micro-batches of one replica: in turn where there is one stage, else 1F1B.

1F1B (one forward, one backward; arXiv 2104.04473) is torch.distributed.pipelining's. It is imported only
where there are several stages: the import costs seconds.
"""

from typing import Any, Protocol

import torch
from torch import Tensor

from keepstep.llama.microbatch import MicroBatch
from keepstep.llama.model import Stage
from keepstep.llama.parallel import Groups
from keepstep.session import Phase, Session


class Runner(Protocol):
    def run(self, batches: list[MicroBatch]) -> Tensor:
        """Forward and backward of all; their summed loss, zero on all stages but the last."""
        ...


class InTurn:
    """One stage: forward and backward of each micro-batch."""

    def __init__(self, stage: Stage, session: Session) -> None:
        self._stage, self._session = stage, session

    def run(self, batches: list[MicroBatch]) -> Tensor:
        total = torch.zeros((), device=batches[0].tokens.device)
        for number, batch in enumerate(batches):
            self._session.phase(Phase.FORWARD, micro_batch=number)
            loss = self._stage(batch.tokens, batch=batch)
            self._session.phase(Phase.BACKWARD, micro_batch=number)
            loss.backward()
            total += loss.detach()
        return total


class OneForwardOneBackward:
    """Several stages. All stages run the same number of micro-batches of the same size."""

    def __init__(
        self, stage: Stage, groups: Groups, session: Session, *, micro_batches: int, edge: Tensor
    ) -> None:
        """`edge`: an empty tensor like the activations between stages, [tokens / tp, dim]."""
        from torch.distributed.pipelining import PipelineStage, Schedule1F1B

        layout, at = groups.layout, groups.at
        ring = layout.group("pp", groups.rank)
        previous = -1 if stage.first else ring[at.pp - 1]
        following = -1 if stage.last else ring[at.pp + 1]

        class MarkedStage(PipelineStage):
            """Marks each pass in the beacon: first whose data it waits for, then that it has it."""

            def get_fwd_recv_ops(self, fwd_chunk_id: int) -> Any:
                session.phase(Phase.FORWARD, micro_batch=fwd_chunk_id)
                session.wait("pp", fwd_chunk_id, previous)
                return super().get_fwd_recv_ops(fwd_chunk_id)

            def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
                session.go_on()
                return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)

            def get_bwd_recv_ops(self, bwd_chunk_id: int) -> Any:
                session.phase(Phase.BACKWARD, micro_batch=bwd_chunk_id)
                session.wait("pp", bwd_chunk_id, following)
                return super().get_bwd_recv_ops(bwd_chunk_id)

            def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
                session.go_on()
                super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)

        # Shapes are known, so they are given: nothing is inferred by trial runs and messages.
        activation = edge.detach().requires_grad_()
        self._first = stage.first
        inputs = torch.empty(edge.shape[0] * stage.tp.size, dtype=torch.int64, device=edge.device)
        self._schedule = Schedule1F1B(
            MarkedStage(
                stage, at.pp, layout.pp, edge.device,
                input_args=(inputs if stage.first else activation,),
                output_args=(edge.new_empty(()).requires_grad_() if stage.last else activation,),
                group=groups.pp,
            ),
            micro_batches, loss_fn=lambda loss, _target: loss, scale_grads=False,
        )  # fmt: skip

    def run(self, batches: list[MicroBatch]) -> Tensor:
        losses: list[Tensor] = []
        self._schedule.step(
            arg_mbs=[(batch.tokens,) if self._first else () for batch in batches],
            kwarg_mbs=[{"batch": batch} for batch in batches],
            target_mbs=[None] * len(batches),
            losses=losses,
            return_outputs=False,
        )
        total = torch.zeros((), device=batches[0].tokens.device)
        for loss in losses:
            total += loss.detach()
        return total
