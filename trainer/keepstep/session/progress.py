"""What a rank tells about itself while it trains.

The agent judges a rank by its beacon, one page of shared memory. A session writes that page: which phase the
rank is in, which steps are done, what it waits for. A mark costs about a microsecond and no system call, so
it belongs into the innermost loop; nothing here blocks, raises for the world's reasons, or needs torch.

Any script can say more about itself than what keepstep finds out alone:

    from keepstep.session import Phase, current

    session = current()                   # silent when the script does not run under keepstep
    for step in range(first, last):
        session.phase(Phase.FORWARD)      # the time since the last phase is what a hang is judged by
        ...
        session.wait("dp")                # from here on it is the others that take the time
        all_reduce(...)
        session.go_on()
        session.step_done(step + 1, loss=loss, tokens_per_s=rate)
        if saved:
            session.checkpointed(step + 1)
"""

import functools
import logging
import math
import mmap
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from keepstep.core.beacon import PAGE, BeaconWriter, Phase, Point, Trouble, writer_of

if TYPE_CHECKING:
    from keepstep.session.snapshot import Snapshots

PIPELINE = b"pp"  # the group whose waits are a pipeline's bubble
_MEMFD = "keepstep-beacon"  # the name that the shim gives its pages
_NAN = math.nan
_log = logging.getLogger("keepstep.session")


class Session:
    """One rank's marks. `attached` is False outside of keepstep: then they go to a page that nobody reads.

    For one thread: the one that trains. A background thread hands its news over (see llama.checkpoint).
    """

    def __init__(self, page: mmap.mmap, *, rank: int, world_size: int, attached: bool) -> None:
        self.rank, self.world_size, self.attached = rank, world_size, attached
        self._writer = BeaconWriter(page, rank=rank, world_size=world_size)
        self._put, self._passed = self._writer.put, self._writer.passed
        now = self._writer.now
        self._step, self._step_ns = now.step, now.step_ns
        self._micro_batch, self._peer = 0, -1
        self._phase, self._phase_ns = int(Phase.STARTING), time.monotonic_ns()
        self._launched, self._completed = now.launched, now.completed
        self._checkpoint_step, self._stall_ns = now.checkpoint_step, now.stall_ns
        self._snapshot_step, self._wait_ns, self._batches = now.snapshot_step, now.wait_ns, now.batches
        self._group, self._group_sequence = b"", 0
        self._trouble = int(now.trouble | now.trouble_step << 8)
        self._begun: dict[str, int] = {}  # collectives by group, where nobody else counts them
        self._waiting_ns = self._waited_ns = 0  # since when; and how long in this phase
        self._publish()

    def phase(self, phase: Phase, micro_batch: int = 0) -> None:
        """Enter a phase: what the rank does from now on. The one before is complete."""
        now = time.monotonic_ns()
        self._leave_phase(now)
        self._phase, self._phase_ns, self._micro_batch = phase, now, micro_batch
        self._publish()

    def _leave_phase(self, now: int) -> None:
        if self._waiting_ns:
            self._end_wait(now)
        if self._phase:  # what lies between phases teaches nothing
            self._passed(self._phase, now - self._phase_ns, self._waited_ns)
        self._waited_ns = 0

    def wait(self, group: str = "", sequence: int = 0, peer: int = -1) -> None:
        """From now on this rank waits for others: for a group's collective, or for one peer's data.

        `group` is a name of up to 15 bytes ("dp", "tp.3") with the number of the collective in it (0: they
        are counted here), `peer` a global rank. Waiting is no phase of its own: it is a part of the present
        one.
        """
        self._waiting_ns = time.monotonic_ns()
        if not sequence and group:
            sequence = self._begun[group] = self._begun.get(group, 0) + 1
        self._peer, self._group_sequence = peer, sequence
        self._group = group.encode()[:15] if group else b""
        self._launched += 1
        self._publish()

    def go_on(self) -> None:
        """What this rank waited for has come."""
        if self._waiting_ns:
            self._end_wait(time.monotonic_ns())
        self._completed += 1
        self._publish()

    def _end_wait(self, now: int) -> None:
        waited = now - self._waiting_ns
        if self._group == PIPELINE:
            self._writer.bubble(waited)
        self._waiting_ns, self._peer = 0, -1
        self._waited_ns += waited
        self._wait_ns += waited

    def step_done(
        self,
        step: int,
        *,
        loss: float | None = None,
        grad_norm: float | None = None,
        tokens_per_s: float | None = None,
        tflops: float | None = None,
        mfu: float | None = None,
    ) -> None:
        """An optimizer step is complete; `step` counts the completed ones of the job, so the first is 1.

        Its last phase is over, too: what a rank does until the next mark is anybody's guess.

        What is None is not known to this rank; a NaN is a finding. Rates are the whole job's tokens and one
        GPU's (slot's) teraflops.
        """
        now = self._step_ns = time.monotonic_ns()
        self._step = step
        self._leave_phase(now)
        self._phase, self._phase_ns = int(Phase.NONE), now
        self._publish()
        if loss is None and grad_norm is None and tokens_per_s is None and tflops is None and mfu is None:
            return
        if not all(math.isfinite(figure) for figure in (loss, grad_norm) if figure is not None):
            self.trouble(Trouble.NOT_FINITE, step)
        self._writer.point(
            Point(
                step=step,
                at_ns=self._step_ns,
                loss=_NAN if loss is None else loss,
                grad_norm=_NAN if grad_norm is None else grad_norm,
                tokens_per_s=_NAN if tokens_per_s is None else tokens_per_s,
                tflops=_NAN if tflops is None else tflops,
                mfu=_NAN if mfu is None else mfu,
            )
        )

    def trouble(self, what: Trouble, step: int) -> None:
        """Numbers that cannot be true, seen after `step` steps. Less grave than what is known: not told."""
        if what > self._trouble & 0xFF:
            self._trouble = what | (step & 0xFFFFFF) << 8
            self._publish()

    def resumed(self, step: int) -> None:
        """The job goes on from a restored state after `step` completed steps; no step was done for it."""
        self._step = step
        self._publish()

    def checkpointed(self, step: int) -> None:
        """The checkpoint after `step` completed steps is whole."""
        self._checkpoint_step = step
        self._publish()

    def snapshotted(self, step: int) -> None:
        """The state after `step` completed steps is whole in memory."""
        self._snapshot_step = step
        self._publish()

    def snapshots(self) -> "Snapshots":
        """What keeps this script's state in memory; needs torch."""
        from keepstep.session.snapshot import Snapshots

        return Snapshots(self)

    def stalled(self, ns: int) -> None:
        """Training stood still for `ns` nanoseconds because of a checkpoint."""
        self._stall_ns += ns
        self._publish()

    def batch(self) -> None:
        """The data loader gave a batch."""
        self._batches += 1
        self._publish()

    def _publish(self) -> None:
        self._put(
            self._step, self._micro_batch, self._phase, self._phase_ns, self._step_ns, self._launched,
            self._completed, self._checkpoint_step, self._snapshot_step, self._peer, self._stall_ns,
            self._wait_ns, self._waiting_ns, self._batches, self._group, self._group_sequence, self._trouble,
        )  # fmt: skip


def current() -> Session:
    """This process's session: always the same one, and a silent one in whatever is not the rank itself."""
    return _opened(os.getpid())  # by process: a forked worker must not go on in its parent's name


@functools.cache
def _opened(pid: int) -> Session:
    page = _beacon(pid)
    hook = sys.modules.get("keepstep_hook")
    if page is not None and hook is not None:
        hook.hand_over()  # a page has one writer
    return Session(
        page if page is not None else mmap.mmap(-1, PAGE),
        rank=_number("RANK", 0),
        world_size=_number("WORLD_SIZE", 1),
        attached=page is not None,
    )


def _beacon(pid: int) -> mmap.mmap | None:
    """The rank's page, unless there is none or it is another living process's (this one is its child)."""
    descriptor = _number("KEEPSTEP_BEACON_FD", -1)
    if descriptor < 0:
        return None
    try:
        # A script may have closed all descriptors and opened a file under this number: never write to that.
        if _MEMFD not in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
            _log.warning("descriptor %d is not the beacon any more; progress is not reported", descriptor)
            return None
        page = mmap.mmap(descriptor, PAGE)
    except (OSError, ValueError) as error:
        _log.warning("the beacon cannot be opened, progress is not reported: %s", error)
        return None
    writer = writer_of(page)
    if writer not in {0, pid} and Path(f"/proc/{writer}").exists():
        return None
    return page


def _number(name: str, otherwise: int) -> int:
    try:
        return int(os.environ.get(name, ""))
    except ValueError:
        return otherwise
