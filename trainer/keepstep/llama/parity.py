"""Whether a rank's state is still what the last update left: memory that lies names itself, without a vote.

Between two updates nothing may write to weights and moments. So their sums of bits, taken right after one
update and again just before the next, must agree; where they do not, it is this rank's memory that changed,
where a comparison after the next all-gather would find every replica equally wrong. And replicas, whose
gathered weights must be equal bit by bit, compare theirs just before the update. (Where parameters are
sharded no gathered weights outlive a pass: what a rank owns is all that could change.)

Done every `EVERY` steps. The sum is that of all words modulo 2^64: any single flipped bit changes it, it runs
at the speed of memory, and on a GPU it stays there.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from keepstep.core.beacon import Trouble
from keepstep.llama.flat import FlatState
from keepstep.llama.parallel import Groups
from keepstep.session import Session

EVERY = 50


class Parity:
    def __init__(self, state: FlatState, groups: Groups, session: Session) -> None:
        self._state, self._groups, self._session = state, groups, session
        self._sealed: tuple[int, Tensor] | None = None  # after how many steps, and the sums

    def seal(self) -> None:
        """Right after an update."""
        if self._state.step % EVERY == 0:
            self._sealed = self._state.step, self._sums()

    def check(self) -> None:
        """Just before the next one. Errors: RuntimeError where anything does not agree.

        It is told in the beacon first, and no update is made of it: what follows from memory that lies, and
        every checkpoint of it, would be worth nothing.
        """
        if self._sealed is None:
            return
        step, before = self._sealed
        self._sealed = None
        if step != self._state.step:
            return
        after = self._sums()
        owned, weights = (before == after).tolist()
        if not owned:
            self._stop(Trouble.STATE_CHANGED, step, "weights or moments changed since the update before")
        if not weights:
            self._stop(Trouble.WEIGHTS_CHANGED, step, "gathered weights changed since the update before")
        for along, group in (("cp", self._groups.cp), ("dp", self._groups.dp)):
            if group is not None:
                self._compare(after[1:], step, along, group)

    def _compare(self, mine: Tensor, step: int, along: str, group: dist.ProcessGroup) -> None:
        every = mine.new_empty(group.size())
        self._session.wait(along)
        dist.all_gather_into_tensor(every, mine, group=group)
        self._session.go_on()
        agreeing = int((every == mine).sum())
        if 2 * agreeing <= len(every) and agreeing < len(every):
            self._stop(Trouble.REPLICA_DIFFERS, step, "weights differ from those of other replicas")

    def _stop(self, what: Trouble, step: int, text: str) -> None:
        self._session.trouble(what, step)
        raise RuntimeError(f"after step {step}: this rank's {text}; its memory cannot be trusted")

    def _sums(self) -> Tensor:
        """Of the owned state, and of the weights that were gathered from all owners, where they are kept."""
        state = self._state
        parts = (state.state, state.weights[:0] if state.parameters_sharded else state.weights)
        return torch.stack([sum_of(part) for part in parts])


def sum_of(part: Tensor) -> Tensor:
    """Of all its bits, as 64-bit words; the number of bytes is a multiple of eight."""
    return part.view(torch.int64).sum()
