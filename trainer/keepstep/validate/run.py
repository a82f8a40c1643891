"""One rank of a validation: workload after workload, each within its deadline, each with a line that says it.

A workload that does not end cannot be told to: then a thread says so and ends the process. The exit code is 0
whenever everything was said: what it means is decided where all results are together.
"""

import argparse
import functools
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta

import torch.distributed as dist

from keepstep.core.errors import KeepstepError
from keepstep.core.validation import Outcome, Result
from keepstep.llama import parallel
from keepstep.llama.shape import ModelShape
from keepstep.session import Phase, current
from keepstep.validate import together, workloads
from keepstep.validate.bench import Bench, Measured

_OUT = 1
_REFUSAL = "use_deterministic_algorithms"  # PyTorch's, of what it cannot compute the same way each time
Work = Callable[[], Measured]


class Rank:
    """Runs workloads and says what they came to."""

    def __init__(self, bench: Bench, deadline_s: float) -> None:
        self._bench, self._deadline_s = bench, deadline_s
        self._session = current()
        self._done = 0

    def run(self, workload: str, work: Work) -> bool:
        """Whether it came to an end, with whatever result."""
        started = time.perf_counter()
        watch = threading.Timer(self._deadline_s, self._hung, (workload,))
        watch.daemon = True
        self._session.phase(Phase.EVALUATION)
        watch.start()
        try:
            measured = work()
        except (RuntimeError, ValueError, OSError, MemoryError, KeepstepError) as error:
            first = str(error).strip().partition("\n")[0]
            outcome = Outcome.UNTESTED if _REFUSAL in str(error) else Outcome.FAILED
            self._say(workload, outcome, text=f"{type(error).__name__}: {first}"[:500])
            return False
        finally:
            watch.cancel()
        self._say(
            workload, Outcome.WRONG if measured.wrong else Outcome.OK, text=measured.wrong,
            checksum=measured.checksum, figure=round(measured.figure, 3), unit=measured.unit,
            took_s=round(time.perf_counter() - started, 3),
        )  # fmt: skip
        self._done += 1
        self._session.step_done(self._done)
        return True

    def _hung(self, workload: str) -> None:
        self._say(workload, Outcome.HUNG, text=f"not done after {self._deadline_s:g} s")
        os._exit(0)

    def _say(
        self, workload: str, outcome: Outcome, *, text: str = "", checksum: str = "", figure: float = 0.0,
        unit: str = "", took_s: float = 0.0,
    ) -> None:  # fmt: skip
        result = Result(
            rank=int(os.environ.get("RANK", "0")),
            workload=workload, outcome=outcome, device=self._bench.kind, checksum=checksum, figure=figure,
            unit=unit, took_s=took_s, text=text,
        )  # fmt: skip
        os.write(
            _OUT, f"{result.line}\n".encode()
        )  # at once and whole: the process may end with the next line


def main(arguments: Sequence[str]) -> int:
    asked = _parser().parse_args(arguments)
    bench = Bench(parallel.device_of(os.environ))
    rank = Rank(bench, asked.deadline)
    for workload, work in _alone(bench) if not asked.pair else ():
        rank.run(workload, work)
    for workload, work in _together(bench, asked):
        if not rank.run(workload, work):
            os._exit(0)  # others may be in the middle of it: leaving in order would wait for them
    parallel.leave()
    return 0


def _alone(bench: Bench) -> Iterator[tuple[str, Work]]:
    for workload, work in (
        ("matmul", workloads.matmul),
        ("rounding", workloads.rounding),
        ("memory", workloads.memory),
        ("copying", workloads.copying),
    ):
        yield workload, functools.partial(work, bench)


def _together(bench: Bench, asked: argparse.Namespace) -> Iterator[tuple[str, Work]]:
    world_size, number = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if world_size > 1:
        yield "meeting", lambda: _meet(bench, asked.deadline)
        yield "all-reduce", lambda: together.all_reduce(bench, world_size, number)
    shape = _shape(asked)
    yield shape.workload, lambda: together.training(bench, shape, timeout_s=2 * asked.deadline)


def _meet(bench: Bench, deadline_s: float) -> Measured:
    cuda = bench.cuda
    dist.init_process_group(
        "nccl" if cuda else "gloo", timeout=timedelta(seconds=2 * deadline_s),  # ours comes first
        device_id=bench.device if cuda else None,
    )  # fmt: skip
    return Measured()


def _shape(asked: argparse.Namespace) -> together.Shape:
    if not asked.model:
        return together.SMALL
    model = ModelShape.of(json.loads(asked.model))
    return together.Shape(model=model, tp=asked.tp, seq=min(asked.seq, model.max_seq))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m keepstep.validate", description=__doc__)
    parser.add_argument("--pair", action="store_true", help="only what two nodes do together")
    parser.add_argument("--deadline", type=float, default=60.0, help="of each workload, in seconds")
    parser.add_argument("--model", help="shape of the model to train, as JSON (default: a small one)")
    parser.add_argument("--tp", type=int, default=1, help="tensor parallel ranks of that model")
    parser.add_argument("--seq", type=int, default=64, help="tokens of a sequence")
    return parser
