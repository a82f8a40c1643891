"""A rank's progress as the calls of PyTorch show it: what the hook writes into the beacon.

A rank has a phase only inside of calls that are known to end soon: a fetch from a data loader whose batches
are trained on, the forward of a DDP module, backward, an optimizer's step. Between them it is UNKNOWN, which
nobody judges by a learnt bound: whatever a script does there (an evaluation, a checkpoint, a barrier) may
take its time. A mark is neither a system call nor a lock (tests/bench/watching.py has what it costs).

Loaded by path, from beside the hook. Standard library only, for every Python that has a PyTorch.
"""

import functools
import gc
import mmap
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any

_TRAINED_ON = "_keepstep_trained_on"  # set on iterators of data loaders
_RIVAL_FIRES = 8


class Steps:
    """Which firing of an optimizer completes a step.

    A step is what lies between two firings of the same optimizer, the anchor: the first one that was seen.
    How many others fire in between (a second optimizer, one for each parameter) is learnt from the step
    before, so that from the second step on the last of them completes it at once. Where they are fewer this
    time (a gradient scaler left some out) the anchor's next firing does. An anchor that is gone, or that
    another optimizer has outlasted, is replaced.
    """

    def __init__(self) -> None:
        self._anchor: weakref.ref[Any] | None = None
        self._rival: weakref.ref[Any] | None = None
        self._rival_fires = 0
        self._fires = 0  # since the anchor's, that one included
        self._usual = 0  # in the step before; 0: not known
        self._counted, self._ended = True, False  # the step that runs: nothing has, so far

    def fired(self, optimizer: object) -> bool:
        """An optimizer begins its step. True: the step before ended unseen, and is complete."""
        anchor = self._anchor and self._anchor()
        if anchor is optimizer:
            return self._begin(self._fires)
        if anchor is None or self._outlasted(optimizer):
            self._anchor = weakref.ref(optimizer)
            return self._begin(0)
        self._fires += 1
        return False

    def ended(self) -> bool:
        """It has ended its step. True: the job's step is complete with it."""
        self._ended = True
        if self._counted or self._fires != self._usual:
            return False
        self._counted = True
        return True

    def _begin(self, usual: int) -> bool:
        unseen = self._ended and not self._counted  # one whose optimizer has failed is none
        self._usual, self._fires, self._counted, self._ended = usual, 1, False, False
        self._rival, self._rival_fires = None, 0
        return unseen

    def _outlasted(self, optimizer: object) -> bool:
        if self._rival is None:
            self._rival = weakref.ref(optimizer)
        if self._rival() is optimizer:
            self._rival_fires += 1
        return self._rival_fires > max(_RIVAL_FIRES, 4 * self._usual)


class Marks:
    """The beacon's writer, for the thread that trains."""

    def __init__(
        self, writer: Any, phases: Any, is_compiling: Callable[[], bool], say: Callable[[str], None]
    ) -> None:
        self.data, self.forward, self.backward = int(phases.DATA), int(phases.FORWARD), int(phases.BACKWARD)
        self.optimizer, self.unknown = int(phases.OPTIMIZER), int(phases.UNKNOWN)
        self.is_compiling = is_compiling  # while dynamo traces a script it must not trace us
        self.active, self._say = True, say
        self._put, self._passed = writer.put, writer.passed
        self._phase, self._phase_ns = int(phases.STARTING), time.monotonic_ns()
        self._step, self._step_ns, self._batches, self._backwards = -1, 0, 0, 0
        self._thread = threading.main_thread().ident
        self._inside = False  # of a region
        self._depth = 0  # of optimizers that call each other
        self._steps = Steps()
        # Steps of the job that were done before this process; None: no optimizer was seen so far.
        self._before: int | None = None
        # The iterator whose batch came last, as long as nothing is known of it.
        self._fetched: weakref.ref[Any] | None = None
        self._publish()

    # ---------------------------------------------------------------- regions

    def enter(self, phase: int) -> bool:
        """Begin a region. False: not now (within another one, in another thread, no longer wanted)."""
        if self._inside or not self.active or threading.get_ident() != self._thread:
            return False
        try:
            self._inside = True
            self._phase, self._phase_ns = phase, time.monotonic_ns()
            if phase == self.backward:
                self._backwards += 1
                if self._fetched is not None:
                    self._train_on(self._fetched())
            self._publish()
        except Exception as error:  # noqa: BLE001 - outermost: a script must not fail for what we do
            self.fail(error)
        return True

    def leave(self) -> None:
        """End it. What comes now is the script's."""
        self._inside = False
        if not self.active:
            return
        try:
            self._close(time.monotonic_ns())
            self._publish()
        except Exception as error:  # noqa: BLE001 - outermost: as above
            self.fail(error)

    def fetched(self, iterator: Any, *, trained_on: bool) -> None:
        """A data loader has a batch; `leave` follows."""
        self._batches += 1
        self._fetched = None if trained_on else weakref.ref(iterator)

    def _train_on(self, iterator: Any) -> None:
        self._fetched = None
        if iterator is not None:
            setattr(iterator, _TRAINED_ON, True)

    def _close(self, now: int) -> None:
        self._passed(self._phase, now - self._phase_ns)
        self._phase, self._phase_ns = self.unknown, now

    # ---------------------------------------------------------------- optimizers

    def before_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """An optimizer's step begins: a hook of all optimizers. `args` begin with the optimizer."""
        if self.is_compiling() or not self.active:
            return
        try:
            if self._nested(sys._getframe(1)):
                self._depth += 1
                return
            self._depth = 1
            if self._before is None:
                self._before = _updates(optimizer)
            if self._steps.fired(optimizer):
                self._step_done(time.monotonic_ns())
            if not self._inside:
                self._thread = threading.get_ident()
                # A closure runs forward and backward within the step, and whatever else it likes.
                if not (kwargs.get("closure") or any(args[1:2])):
                    self._phase, self._phase_ns = self.optimizer, time.monotonic_ns()
            self._publish()
        except Exception as error:  # noqa: BLE001 - outermost: as above
            self.fail(error)

    def after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if self.is_compiling() or not self.active:
            return
        try:
            self._depth -= 1
            if self._depth > 0:
                return
            now = time.monotonic_ns()
            if self._phase == self.optimizer:
                self._close(now)
            if self._steps.ended():
                self._step_done(now)
            self._publish()
        except Exception as error:  # noqa: BLE001 - outermost: as above
            self.fail(error)

    def _nested(self, caller: FrameType) -> bool:
        """Whether another optimizer's step called this one. A step that raised has left its depth behind."""
        if self._depth <= 0:
            return False
        frame = caller.f_back
        while frame is not None and frame.f_code is not caller.f_code:
            frame = frame.f_back
        return frame is not None

    def _step_done(self, now: int) -> None:
        done = self._before or 0 if self._step < 0 else self._step
        self._step, self._step_ns, self._backwards = done + 1, now, 0

    # ---------------------------------------------------------------- the page

    def _publish(self) -> None:
        self._put(
            self._step, self._backwards, self._phase, self._phase_ns, self._step_ns, 0, 0, -1, -1, -1, 0, 0,
            0, self._batches, b"", 0,
        )  # fmt: skip

    def end(self) -> None:
        """Another one marks from now on, or this is a forked child."""
        self.active = False

    def fail(self, error: Exception) -> None:
        self.active = False
        self._say(f"progress is not reported any more: {error!r}")


def _updates(optimizer: Any) -> int:
    """How many updates an optimizer remembers: the steps before a script went on from its own checkpoint."""
    step = next((state.get("step") for state in optimizer.state.values()), None)
    on_device = getattr(getattr(step, "device", None), "type", "cpu") != "cpu"  # to ask it would wait for it
    return 0 if step is None or on_device else int(step)


def _region(marks: Marks, phase: int, inner: Callable[..., Any]) -> Callable[..., Any]:
    is_compiling = marks.is_compiling

    @functools.wraps(inner)
    def region(*args: Any, **kwargs: Any) -> Any:
        if is_compiling() or not marks.enter(phase):
            return inner(*args, **kwargs)
        try:
            return inner(*args, **kwargs)
        finally:
            marks.leave()

    return region


def _forward(marks: Marks, inner: Callable[..., Any], grad_is_on: Callable[[], bool]) -> Callable[..., Any]:
    """Of a module that is being trained; in an evaluation nobody knows how long it may take."""
    trained = _region(marks, marks.forward, inner)

    @functools.wraps(inner)
    def forward(module: Any, *args: Any, **kwargs: Any) -> Any:
        return (trained if module.training and grad_is_on() else inner)(module, *args, **kwargs)

    return forward


def _batch(marks: Marks, inner: Callable[[Any], Any]) -> Callable[[Any], Any]:
    @functools.wraps(inner)
    def batch(iterator: Any) -> Any:
        # A first fetch starts workers and fills queues; and only batches that are trained on come regularly.
        trained_on = getattr(iterator, _TRAINED_ON, False)
        if marks.is_compiling() or not marks.enter(marks.data if trained_on else marks.unknown):
            return inner(iterator)
        try:
            found = inner(iterator)
            marks.fetched(iterator, trained_on=trained_on)
            return found
        finally:
            marks.leave()

    return batch


def attach(torch: Any, code: Any, page: mmap.mmap, say: Callable[[str], None]) -> Marks:
    """Begin to write the beacon. `code`: the module keepstep.core.beacon, however it was loaded."""
    is_compiling = getattr(getattr(torch, "compiler", None), "is_compiling", lambda: False)
    writer = code.BeaconWriter(page, rank=_number("RANK", 0), world_size=_number("WORLD_SIZE", 1))
    marks = Marks(writer, code.Phase, is_compiling, say)
    _count_collections(writer.passed, int(code.Phase.COLLECTING))
    os.register_at_fork(after_in_child=marks.end)
    optimizer: Any = sys.modules["torch.optim.optimizer"]
    optimizer.register_optimizer_step_pre_hook(marks.before_step)
    optimizer.register_optimizer_step_post_hook(marks.after_step)
    autograd: Any = sys.modules["torch.autograd"]
    engine = "_engine_run_backward" if hasattr(autograd, "_engine_run_backward") else "backward"
    setattr(autograd, engine, _region(marks, marks.backward, getattr(autograd, engine)))
    loader: Any = sys.modules.get("torch.utils.data.dataloader")
    if loader is not None:
        loader._BaseDataLoaderIter.__next__ = _batch(marks, loader._BaseDataLoaderIter.__next__)
    parallel: Any = sys.modules.get("torch.nn.parallel.distributed")
    if parallel is not None:
        module = parallel.DistributedDataParallel
        module.forward = _forward(marks, module.forward, torch.is_grad_enabled)
    return marks


def _count_collections(passed: Callable[[int, int], None], row: int) -> None:
    """From now on each run of Python's garbage collector is a completion of this row of the beacon's table.

    Also when another one marks the phases: nobody else writes this row, and the collector does not run twice
    at a time, in whatever thread.
    """
    clock, began = time.monotonic_ns, 0

    def collected(when: str, _: Any) -> None:
        nonlocal began
        if when == "start":
            began = clock()
        elif began:
            passed(row, clock() - began)

    def forget() -> None:
        """A child that the rank forks shares its page, and has no business there."""
        if collected in gc.callbacks:
            gc.callbacks.remove(collected)

    gc.callbacks.append(collected)
    os.register_at_fork(after_in_child=forget)


def _number(name: str, otherwise: int) -> int:
    try:
        return int(os.environ.get(name, ""))
    except ValueError:
        return otherwise
