"""Each verdict, by a validation's real workloads on real ranks, one of which may be sick.

Gangs are forked from a clean parent process that has torch loaded, because pytest itself has threads.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from keepstep.core.validation import Result, results
from keepstep.decide.validation import Judged, Kept, Verdict, judge

TESTS = Path(__file__).parents[1]


class Gangs:
    """A parent process that runs one gang after another; a line of JSON in, a line of JSON out."""

    def __init__(self, folder: Path) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS)}
        self._process = subprocess.Popen(
            [sys.executable, TESTS / "validation_gangs.py"], env=environment, cwd=folder, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def validate(self, *arguments: str, ranks: int = 2, **options: Any) -> list[Result]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {"arguments": arguments, "ranks": ranks, **options}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        assert "error" not in answer, answer["error"]
        return list(results(answer["lines"]))

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()


@pytest.fixture(scope="module")
def gangs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gangs]:
    parent = Gangs(tmp_path_factory.mktemp("gangs"))
    yield parent
    parent.close()


def judged(said: list[Result], *, ranks: int = 2, history: tuple[Kept, ...] = ()) -> Judged:
    return judge(said, nodes=("a",), ranks=ranks, history=history)


@pytest.fixture(scope="module")
def well(gangs: Gangs) -> list[Result]:
    return gangs.validate()


def test_a_good_node(well: list[Result]) -> None:
    found = judged(well)
    assert found.verdict is Verdict.OK, found.reason
    mine = [result for result in well if result.rank == 0]
    assert [result.workload for result in mine] == [
        "matmul", "rounding", "memory", "copying", "meeting", "all-reduce", "training",
    ]  # fmt: skip
    measured = {result.workload: result.unit for result in mine if result.figure}
    assert measured == {
        "matmul": "GFLOP/s", "memory": "GB/s", "copying": "GB/s", "all-reduce": "GB/s",
        "training": "tokens/s",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("sickness", "reason"),
    [
        ("1:wrong:aten.mm", "matmul on rank 1: torch.bfloat16 gives"),  # always
        ("1:wrong:aten.mm:6", "values differ between repetitions"),  # when it is warm
        ("1:wrong:aten.fill_", "memory on rank 1: 4 words were not 0x0"),
        ("1:wrong:aten.copy_", "copying on rank 1: what came back is not what was sent"),
        ("1:wrong:c10d.allreduce_", "all-reduce on ranks 0, 1: 1 of 1048576 sums are not"),
        ("1:wrong:aten.silu", "training on ranks 0, 1: two runs of the same differ from step 1 on"),
        ("1:fails:aten.fill_", "memory on rank 1: RuntimeError: the device has fallen off the bus"),
        ("1:dies:aten.fill_", "validation on rank 1: it said nothing after rounding"),
        ("1:hangs:c10d.allreduce_", "not done after 8 s"),
    ],
)
def test_each_sickness_is_named(gangs: Gangs, sickness: str, reason: str) -> None:
    how = sickness.split(":")[1]
    found = judged(gangs.validate("--deadline", "8" if how in ("hangs", "dies") else "60", sickness=sickness))
    verdicts = {"fails": Verdict.FAILED, "dies": Verdict.HUNG, "hangs": Verdict.HUNG}
    assert found.verdict is verdicts.get(how, Verdict.WRONG), found.reason
    assert reason in found.reason


def test_what_pytorch_refuses_is_no_fault_of_the_device(gangs: Gangs) -> None:
    found = judged(gangs.validate(sickness="1:refuses:aten.fill_"))
    assert found.verdict is Verdict.OK, found.reason
    assert "5 workloads on 2 ranks; memory could not be tested: RuntimeError: put_" in found.reason


def test_slow_is_told_against_others(gangs: Gangs) -> None:
    """Others are as fast as the good rank beside it: before, the machine may have been five times busier."""
    said = gangs.validate(sickness="1:slow:aten.mm")
    kept = judged([result for result in said if result.rank == 0], ranks=1).kept
    assert kept is not None
    others = tuple(replace(kept, nodes=(name,), ranks=2) for name in "bcd")
    found = judged(said, history=others)
    assert found.verdict is Verdict.SLOW, found.reason
    assert " times slower than the median of 3 others" in found.reason


def test_a_pair_in_the_shape_of_a_job(gangs: Gangs) -> None:
    model = {
        "layers": 1, "dim": 128, "ffn_dim": 256, "heads": 4, "kv_heads": 2, "vocabulary": 512, "max_seq": 512
    }  # fmt: skip
    said = gangs.validate("--pair", "--model", json.dumps(model), "--tp", "2", "--seq", "128")
    found = judged(said)
    assert found.verdict is Verdict.OK, found.reason
    assert {result.workload for result in said} == {
        "meeting",
        "all-reduce",
        "training 1 x 128, seq 128, tp 2",
    }
