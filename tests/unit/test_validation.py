"""What the results of a validation say of a node."""

import json
from dataclasses import replace

import pytest

from keepstep.core.validation import MARK, Outcome, Result, results
from keepstep.decide.validation import Judged, Kept, Verdict, judge

GPU = "cuda H100, torch 2.15"


def good(rank: int, **changed: object) -> list[Result]:
    """Of one rank; `changed` in its matmul."""
    matmul = Result(rank=rank, workload="matmul", outcome=Outcome.OK, device=GPU, checksum="aa", figure=800.0)
    training = replace(matmul, workload="training", checksum="bb", figure=5000.0)
    return [replace(matmul, **changed), training]  # type: ignore[arg-type]


def judged(*parts: list[Result], history: list[Kept] | None = None) -> Judged:
    said = [result for part in parts for result in part]
    return judge(said, nodes=("a",), ranks=len(parts), history=history or [])


def fleet(*figures: float, checksum: str = "aa") -> list[Kept]:
    return [
        Kept(
            nodes=(f"n{k}",), ranks=2, device=GPU, figures={"matmul": figure}, checksums={"matmul": checksum}
        )
        for k, figure in enumerate(figures)
    ]


def test_a_good_node_is_kept_as_history() -> None:
    found = judged(good(0), good(1, figure=790.0))
    assert found.verdict is Verdict.OK
    assert found.kept == Kept(
        nodes=("a",), ranks=2, device=GPU, figures={"matmul": 790.0, "training": 5000.0},
        checksums={"matmul": "aa", "training": "bb"},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("outcome", "verdict"),
    [(Outcome.WRONG, Verdict.WRONG), (Outcome.HUNG, Verdict.HUNG), (Outcome.FAILED, Verdict.FAILED)],
)
def test_what_a_rank_says_of_itself(outcome: Outcome, verdict: Verdict) -> None:
    found = judged(good(0), good(1, outcome=outcome, text="because"))
    assert (found.verdict, found.reason) == (verdict, "matmul on rank 1: because")
    assert found.kept is None


def test_wrong_says_more_than_hung() -> None:
    assert judged(good(0, outcome=Outcome.HUNG), good(1, outcome=Outcome.WRONG)).verdict is Verdict.WRONG


def test_the_one_device_of_three_that_gives_something_else() -> None:
    found = judged(good(0), good(1, checksum="xx"), good(2))
    assert found == Judged(verdict=Verdict.WRONG, reason="matmul: rank 1 gave another checksum than 2 others")


def test_devices_of_two_kinds_need_not_agree() -> None:
    assert judged(good(0), good(1, checksum="xx", device="cuda A100")).verdict is Verdict.OK


def test_another_checksum_than_the_fleet() -> None:
    found = judged(good(0), good(1), history=fleet(800, 800, 800, checksum="zz"))
    assert found.verdict is Verdict.WRONG
    assert judged(good(0), good(1), history=fleet(800, 800, checksum="zz")).verdict is Verdict.OK


def test_slow_is_below_the_fleets_median_and_says_how_much() -> None:
    found = judged(good(0, figure=400.0), good(1), history=fleet(790, 800, 810, 100))
    assert found.verdict is Verdict.SLOW
    assert found.reason == "matmul is 2 times slower than the median of 4 others, where 1.3 is usual"
    assert judged(good(0, figure=700.0), good(1), history=fleet(790, 800, 810)).verdict is Verdict.OK
    assert judged(good(0, figure=1.0), good(1)).verdict is Verdict.OK  # nothing to compare it with


@pytest.mark.parametrize(
    ("others", "slow", "usual"),
    [  # eight and more say themselves what is usual
        (
            [800, 801, 799, 802, 798, 800, 801, 799],
            700.0,
            "1.1",
        ),  # alike to a per mille: still no less than this
        ([800, 820, 780, 840, 760, 810, 790, 805], 640.0, "1.2"),
        ([800, 900, 700, 1000, 600, 850, 750, 800], 250.0, "2.2"),
    ],
)
def test_what_is_usual_follows_from_how_far_the_fleet_lies_apart(
    others: list[float], slow: float, usual: str
) -> None:
    found = judged(good(0, figure=slow), good(1), history=fleet(*others))
    assert found.verdict is Verdict.SLOW and found.reason.endswith(f"where {usual} is usual"), found
    assert judged(good(0, figure=min(others)), good(1), history=fleet(*others)).verdict is Verdict.OK


def test_what_could_not_be_tested_is_said_and_is_no_fault() -> None:
    refusal = {"outcome": Outcome.UNTESTED, "checksum": "", "figure": 0.0, "text": "not deterministic"}
    found = judged(good(0), good(1, **refusal))
    assert found.verdict is Verdict.OK
    assert found.reason == "1 workloads on 2 ranks; matmul could not be tested: not deterministic"
    nothing = [replace(result, **refusal) for result in (*good(0), *good(1))]  # type: ignore[arg-type]
    assert judged(nothing[:2], nothing[2:]).verdict is Verdict.UNTESTED


def test_a_rank_that_says_nothing_hangs() -> None:
    found = judged(good(0), good(1)[:1])
    assert (found.verdict, found.reason) == (
        Verdict.HUNG,
        "validation on rank 1: it said nothing after matmul",
    )
    assert judged([], []).reason == "validation on ranks 0, 1: it said nothing at all"


def test_who_waits_for_a_failed_one_is_not_the_reason() -> None:
    lost = good(1, outcome=Outcome.FAILED, text="fell off the bus")[:1]
    waited = [good(0)[0], replace(good(0)[1], workload="all-reduce", outcome=Outcome.HUNG)]
    found = judged(waited, lost)
    assert (found.verdict, found.reason) == (Verdict.FAILED, "matmul on rank 1: fell off the bus")


def test_who_lost_its_connection_to_one_that_hangs_is_not_the_reason() -> None:
    left = replace(good(0)[0], workload="all-reduce", outcome=Outcome.FAILED, text="connection closed")
    hung = replace(good(1)[0], workload="all-reduce", outcome=Outcome.HUNG, text="not done after 60 s")
    found = judged([good(0)[0], left], [good(1)[0], hung])
    assert (found.verdict, found.reason) == (Verdict.HUNG, "all-reduce on rank 1: not done after 60 s")


def test_results_are_found_among_other_lines() -> None:
    one = good(0)[0]
    newer = json.dumps({**json.loads(one.line.removeprefix(MARK)), "from_a_later_version": 1})
    lines = [
        "hello",
        one.line,
        f"[rank 0] {one.line}",
        MARK + newer,
        one.line[:-5],
        f"{MARK}[]",
        f"{MARK}{{}}",
    ]
    assert list(results(lines)) == [one, one, one]
