"""Every layout trains like one process; a rerun, and a shrunk gang, train the same bit by bit.

Gangs are forked from a clean parent process that has torch loaded, because pytest itself has threads.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from keepstep.agent.evaluations import Evaluations

TESTS = Path(__file__).parents[1]
STEPS = 8  # it learns in these, and a rule left out is seen
LONG = 20  # of the layouts that the long suite adds
FEW = 4  # for what must be the same to the bit, or not: the first update shows it already


class Gangs:
    """A parent process that runs one gang after another; a line of JSON in, a line of JSON out."""

    def __init__(self, folder: Path) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS)}
        self._process = subprocess.Popen(
            [sys.executable, TESTS / "llama_gangs.py"], env=environment, cwd=folder, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def run(self, layout: str, **options: Any) -> dict[str, Any]:
        """layout: dp x pp x tp, or dp x pp x cp x tp.

        Gives losses, gradient norms and a digest of the final weights by name.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request: dict[str, Any] = {"layout": [int(n) for n in layout.split("x")], "steps": STEPS, **options}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        assert "error" not in answer, answer["error"]
        return answer

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()


@pytest.fixture(scope="module")
def gangs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    parent = Gangs(tmp_path_factory.mktemp("gangs"))
    yield parent
    parent.close()


@pytest.fixture(scope="module")
def once(gangs: Gangs) -> Callable[[str, int], dict[str, Any]]:
    """So many steps of a layout, trained once for all tests."""
    return cache(lambda layout, steps: gangs.run(layout, steps=steps))


@pytest.fixture(scope="module")
def alone(once: Callable[[str, int], dict[str, Any]]) -> dict[str, Any]:
    return once("1x1x1", STEPS)


@pytest.fixture(scope="module")
def few(once: Callable[[str, int], dict[str, Any]]) -> Callable[[str], dict[str, Any]]:
    return lambda layout: once(layout, FEW)


def distance(one: dict[str, Any], other: dict[str, Any], what: str) -> float:
    return max(abs(float(a) - float(b)) for a, b in zip(one[what], other[what], strict=True))


def laid_out(layout: str, *, long: bool = False, **options: Any) -> Any:
    name = "-".join([layout, *(str(v) for part in options.values() for v in part.values())])
    steps = LONG if long else STEPS
    return pytest.param(layout, steps, options, marks=pytest.mark.long if long else (), id=name)


def pipeline(schedule: str, chunks: int = 1) -> dict[str, Any]:
    return {"schedule": schedule, "chunks": chunks}


LAYOUTS = [
    laid_out("2x1x1"),
    laid_out("1x1x2"),
    laid_out("1x2x1"),
    laid_out("2x2x2"),
    laid_out("1x2x1", pipeline=pipeline("interleaved", 2)),
    laid_out("1x1x2x1"),
    laid_out("1x1x2", numerics={"recompute": "selective"}),
    laid_out("2x1x1", numerics={"shard": "parameters"}),
    laid_out("1x2x2", long=True),
    laid_out("4x1x2", long=True),
    laid_out("2x2x1", long=True),
    laid_out("1x4x1", long=True),
    laid_out("1x5x1", long=True),  # the first stage has only the embedding
    laid_out("1x2x2", long=True, pipeline=pipeline("gpipe", 3)),
    laid_out("2x2x2", long=True, pipeline=pipeline("interleaved", 3)),
    laid_out("2x1x2x2", long=True),
    laid_out("1x1x4x2", long=True),
    laid_out("1x2x2x2", long=True, pipeline=pipeline("interleaved", 2)),
    laid_out("2x2x2x1", long=True),
    laid_out("1x2x2x2", long=True, numerics={"recompute": "full"}, pipeline=pipeline("interleaved", 2)),
    laid_out("4x1x2", long=True, numerics={"shard": "gradients"}),
    laid_out("2x2x2", long=True, numerics={"shard": "gradients"}, pipeline=pipeline("interleaved", 3)),
    laid_out("2x2x2", long=True, numerics={"shard": "parameters"}),
    laid_out("1x5x1", long=True, numerics={"shard": "parameters"}),
    laid_out("1x1x4x2", long=True, numerics={"shard": "parameters", "recompute": "selective"}),
    laid_out("2x2x2x1", long=True, numerics={"shard": "parameters"}, pipeline=pipeline("gpipe", 3)),
    laid_out(
        "2x2x2x1", long=True, numerics={"shard": "parameters", "recompute": "full"},
        pipeline=pipeline("interleaved", 2),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("layout", "steps", "options"), LAYOUTS)
def test_every_layout_trains_like_one_process(
    gangs: Gangs,
    once: Callable[[str, int], dict[str, Any]],
    layout: str,
    steps: int,
    options: dict[str, Any],
) -> None:
    alone, found = once("1x1x1", steps), gangs.run(layout, steps=steps, **options)
    assert len(found["losses"]) == steps
    assert found["losses"][-1] < found["losses"][0] - 0.3, "it must learn, or equality shows nothing"
    assert distance(found, alone, "losses") < 1e-5
    assert distance(found, alone, "norms") < 1e-4
    for source, loss in alone["validation"].items():
        assert abs(found["validation"][source] - loss) < 1e-5
    assert len({round(loss, 3) for loss in alone["validation"].values()}) == 2, "sources differ"


@pytest.mark.parametrize("layout", ["1x1x1", pytest.param("2x2x1x2", marks=pytest.mark.long)])
def test_in_bf16_it_learns_as_much(gangs: Gangs, alone: dict[str, Any], layout: str) -> None:
    """Master weights and sums stay fp32, so losses differ by the rounding of activations alone."""
    found = gangs.run(layout, numerics={"precision": "bf16"})
    assert 0.0 < distance(found, alone, "losses") < 0.02


def test_without_the_sum_over_tensor_ranks_norm_gradients_would_differ(
    gangs: Gangs, alone: dict[str, Any]
) -> None:
    """The comparison above can fail: leave one collective out and it does."""
    found = gangs.run("1x1x2", sabotage="norm-gradients")
    assert distance(found, alone, "losses") > 1e-5


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(one[what] == other[what] for what in ("losses", "norms", "weights"))


def test_a_rerun_is_the_same_bit_by_bit(gangs: Gangs, few: Callable[[str], dict[str, Any]]) -> None:
    assert same(gangs.run("2x2x2", steps=FEW), few("2x2x2"))


def test_another_number_of_replicas_is_not_the_same_bit_by_bit(few: Callable[[str], dict[str, Any]]) -> None:
    """So the next test can fail: without the old replicas kept apart, sums are made in another order."""
    assert not same(few("4x1x1"), few("1x1x1"))


@pytest.mark.parametrize(
    ("asked", "left"), [("4x1x1", ("2x1x1", "1x1x1")), ("2x2x2", ("1x2x2",)), ("2x1x2x1", ("1x1x2x1",))]
)
def test_fewer_replicas_give_the_bits_of_the_number_asked_for(
    gangs: Gangs, few: Callable[[str], dict[str, Any]], asked: str, left: tuple[str, ...]
) -> None:
    whole = few(asked)
    for layout in left:
        assert same(gangs.run(layout, steps=FEW, replicas=int(asked[0])), whole), layout


STAGES = [
    {"after_steps": 2, "global_tokens": 512, "seq": 64, "micro_batch": 1},
    {"after_steps": 4, "global_tokens": 512, "seq": 32, "micro_batch": 2},
]


@pytest.mark.parametrize(
    ("asked", "left", "options"),
    [
        pytest.param("2x1x1", ["1x1x1"], {"numerics": {"shard": "parameters"}}, id="parameters"),
        *(
            pytest.param(
                asked, left, {"numerics": {"shard": shard}, **more}, marks=pytest.mark.long,
                id=f"{asked}-{shard}",
            )
            for shard in ("gradients", "parameters")
            for asked, left, more in (
                ("4x1x1", ["2x1x1", "1x1x1"], {"batch": {"global_tokens": 512, "seq": 32}}),
                ("2x2x2", ["1x2x2"], {"pipeline": pipeline("interleaved", 2)}),
                ("4x2x1", ["2x2x1", "1x2x1"], {"pipeline": pipeline("gpipe", 2)}),
                ("2x1x2x1", ["1x1x2x1"], {}),
            )
        ),
    ],
)  # fmt: skip
def test_fewer_replicas_give_the_same_bits_where_more_than_the_optimizer_is_sharded(
    gangs: Gangs, asked: str, left: list[str], options: dict[str, Any]
) -> None:
    whole = gangs.run(asked, steps=FEW, **options)
    for layout in left:
        assert same(gangs.run(layout, steps=FEW, replicas=int(asked[0]), **options), whole), layout


@pytest.mark.long
@pytest.mark.parametrize("layout", ["4x1x2", "2x2x1", "2x1x2x1"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_that_come_a_unit_at_a_time_or_ahead_are_the_same_bit_by_bit(
    gangs: Gangs, layout: str, precision: str
) -> None:
    whole = gangs.run(layout, steps=FEW, numerics={"shard": "gradients", "precision": precision})
    for ahead in (False, True):
        numerics = {"shard": "parameters", "precision": precision}
        assert same(gangs.run(layout, steps=FEW, numerics=numerics, ahead=ahead), whole), ahead


@pytest.mark.long
@pytest.mark.parametrize("shard", ["optimizer", "gradients", "parameters"])
def test_a_checkpoint_goes_on_however_its_state_is_sharded(gangs: Gangs, tmp_path: Path, shard: str) -> None:
    folder, options = str(tmp_path / "job"), {"numerics": {"shard": shard}}
    whole = gangs.run("2x2x1", steps=6, **options)
    gangs.run("2x2x1", steps=6, stop_at=3, checkpoint=folder, **options)
    for layout in ("2x2x1", "1x1x1", "2x1x2x2"):
        for other in ("optimizer", "gradients", "parameters"):
            rest = gangs.run(layout, steps=6, restore=3, checkpoint=folder, numerics={"shard": other})
            worst = max(abs(a - b) for a, b in zip(rest["losses"], whole["losses"][3:], strict=True))
            assert worst == 0.0 if (layout, other) == ("2x2x1", shard) else worst < 1e-5, (layout, other)


@pytest.mark.long
@pytest.mark.parametrize(
    ("layout", "options", "over"),
    [
        ("1x2x1", {}, 0.04),
        ("1x2x1", {"pipeline": pipeline("gpipe", 2)}, 0.04),
        ("1x2x1", {"pipeline": pipeline("interleaved", 2)}, 0.04),
        ("1x2x1x2", {"numerics": {"recompute": "full", "shard": "gradients"}}, 0.05),
        ("2x1x2", {"numerics": {"recompute": "selective", "shard": "parameters"}}, 0.1),  # gloo's copies
        ("1x1x2x1", {}, 0.15),  # and masks
    ],
)
def test_a_step_of_each_rank_takes_the_memory_that_was_foretold(
    gangs: Gangs, layout: str, options: dict[str, Any], over: float
) -> None:
    model = {"layers": 4, "dim": 256, "ffn_dim": 768, "vocabulary": 512, "max_seq": 512}
    batch = {"global_tokens": 8 * 512, "seq": 512}
    found = gangs.run(layout, memory=True, steps=2, timeout_s=120, model=model, batch=batch, **options)
    for rank in found["ranks"]:
        said, held = rank["expected"], rank["held"]
        for part in ("weights", "gradients", "exchanged", "owned"):
            assert held[part] == said[part], part
        beside = said["activations"] + said["edges"] + max(said["working"], said["logits"])
        assert 0.97 <= rank["live"] / beside <= 1.0 + over, said


LONGEST = 131_072


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_context_of_131072_tokens_is_the_same_over_four_ranks(gangs: Gangs) -> None:
    """A whole mask of one rank's tail would be 4 GB, and one that is kept for the backward pass 17."""
    options: dict[str, Any] = {
        "steps": 1, "timeout_s": 250, "batch": {"global_tokens": LONGEST, "seq": LONGEST},
        "model": {"layers": 1, "dim": 32, "ffn_dim": 64, "heads": 2, "kv_heads": 1, "max_seq": LONGEST},
    }  # fmt: skip
    alone, found = gangs.run("1x1x1", **options), gangs.run("1x1x4x1", **options)
    assert distance(found, alone, "losses") < 1e-5
    assert distance(found, alone, "norms") < 1e-5


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ("2x2x2", {"stages": STAGES}),
        ("1x2x2x1", {"pipeline": pipeline("interleaved", 2)}),
        pytest.param("2x2x1", {"pipeline": pipeline("gpipe", 3)}, marks=pytest.mark.long),
    ],
)
def test_a_checkpoint_of_one_layout_goes_on_in_others(
    gangs: Gangs, tmp_path: Path, layout: str, options: dict[str, Any]
) -> None:
    folder = str(tmp_path / "job")
    whole = gangs.run(layout, steps=6, **options)
    gangs.run(layout, steps=6, stop_at=3, checkpoint=folder, **options)
    stages = {name: value for name, value in options.items() if name == "stages"}
    others: list[tuple[str, dict[str, Any]]] = [
        ("1x1x1", {}),
        ("4x1x2", {}),
        ("2x1x2x1", {}),
        ("1x2x1", {"pipeline": pipeline("interleaved", 3)}),
    ]
    for other, changed in [(layout, options), *((other, stages | more) for other, more in others)]:
        rest = gangs.run(other, steps=6, restore=3, checkpoint=folder, replicas=0, **changed)
        assert len(rest["losses"]) == 3
        worst = max(abs(a - b) for a, b in zip(rest["losses"], whole["losses"][3:], strict=True))
        assert worst == 0.0 if other == layout else worst < 1e-5, other
        if other == layout:
            assert rest["validation"] == whole["validation"]


MODEL = {"layers": 2, "dim": 32, "ffn_dim": 64, "heads": 4, "kv_heads": 2, "vocabulary": 260, "max_seq": 64}


def write_job(folder: Path, sizes: str, **changes: Any) -> None:
    """job.json as an agent writes it, of a small model on a text of its own."""
    dp, pp, tp = (int(n) for n in sizes.split("x"))
    text = folder / "text.txt"
    text.write_text("".join(f"{n} bottles of beer on the wall, {n} bottles of beer.\n\n" for n in range(400)))
    job = {
        "job": "beer-x2y3", "attempt": 1, "layout": {"dp": dp, "pp": pp, "cp": 1, "tp": tp}, "virtual_dp": dp,
        "model": MODEL, "data": {"source": "text", "path": str(text), "seed": 5}, "steps": 6,
        "batch": {"global_tokens": 256, "seq": 32, "micro_batch": 1}, "optimizer": {"lr": 3e-3},
        "checkpoint": {"dir": str(folder / "checkpoints"), "every_steps": 4, "keep": 3},
        "lineage": [[1, None, None]], "timeout_s": 30,
    }  # fmt: skip
    (folder / "job.json").write_text(json.dumps(job | changes))


def programs(gangs: Gangs, folder: Path, layout: str, **options: Any) -> list[dict[str, Any]]:
    ranks: list[dict[str, Any]] = gangs.run(layout, main=str(folder), **options)["ranks"]
    return ranks


def complete(folder: Path) -> list[str]:
    return sorted(path.parent.name for path in (folder / "checkpoints").glob("step-*/manifest.json"))


def test_the_program_trains_and_reports_from_one_rank(gangs: Gangs, tmp_path: Path) -> None:
    write_job(tmp_path, "2x2x1")
    ranks = programs(gangs, tmp_path, "2x2x1")
    assert [rank["code"] for rank in ranks] == [0] * 4, ranks
    assert [bool(rank["out"]) for rank in ranks] == [False, True, False, False], "last stage, first replica"
    lines = ranks[1]["out"].splitlines()
    expected = r"step (\d)/6 loss \d\.\d{3} grad \d+\.\d\d [\d.]+ k? ?tokens/s [\d.]+ [kMG]FLOPs/slot"
    assert [re.fullmatch(expected, line)[1] for line in lines] == list("123456")  # type: ignore[index]
    assert complete(tmp_path) == ["step-00000004-attempt-0001", "step-00000006-attempt-0001"]
    assert {name for rank in ranks for name in rank["imported"]} == set(), (
        "a standby has them, or should nobody: see preload.py"
    )


def test_told_to_stop_all_ranks_save_the_same_step_and_the_job_goes_on_from_it(
    gangs: Gangs, tmp_path: Path
) -> None:
    """What it evaluates, too: the evaluation after the step that was restored is made again."""
    evaluated: dict[str, Any] = {
        "evaluation": {"every_steps": 4, "sequences": 6, "data": None}, "restore": None,
        "data": {"source": "text", "path": str(tmp_path / "text.txt"), "holdout": 0.2},
    }  # fmt: skip
    staged = {"after_steps": 1, "global_tokens": 256, "seq": 64, "micro_batch": 2}
    evaluated["batch"] = {"global_tokens": 128, "seq": 32, "stages": [staged]}
    write_job(tmp_path, "1x2x2", **evaluated)
    whole = programs(gangs, tmp_path, "1x2x2")[2]["out"].splitlines()
    told = Evaluations(tmp_path)
    assert [found["step"] for found in told.news()] == [4, 6] and told.news() == []
    assert [line.split()[2:4] for line in whole if " grad " not in line] == [["validation", "loss"]] * 2
    (tmp_path / "stopped").mkdir()
    write_job(tmp_path / "stopped", "1x2x2", **evaluated)
    ranks = programs(gangs, tmp_path / "stopped", "1x2x2", term_rank=1, term_step=2)
    assert [rank["code"] for rank in ranks] == [143] * 4, ranks
    (saved,) = complete(tmp_path / "stopped")
    step = int(saved[5:13])
    assert step == 4, "the signal comes in step 3, after its rank had nothing to ask"
    write_job(
        tmp_path / "stopped", "1x2x2",
        **evaluated | {"attempt": 2, "restore": {"attempt": 1, "step": step}},
        lineage=[[1, None, None], [2, 1, step]],
    )  # fmt: skip
    rest = programs(gangs, tmp_path / "stopped", "1x2x2")[2]["out"].splitlines()

    def losses(lines: list[str]) -> list[str]:
        return [line.split(" grad ")[0] for line in lines]

    assert losses(rest) == losses(whole)[step:]


@pytest.mark.parametrize(
    ("layout", "changes", "what"),
    [
        ("1x1x4", {}, "layout: tensor parallel 4 does not fit: it does not divide 2 KV heads"),
        ("1x5x1", {}, "layout: pipeline parallel 5 does not fit: the model has 2 layers"),
        ("1x2x1", {"pipeline": {"schedule": "1f1b", "chunks": 2}}, "pipeline.chunks: 2 chunks a rank"),
        ("1x1x1", {"batch": {"global_tokens": 250, "seq": 32}}, "batch: 250 tokens of a step cannot be cut"),
        ("1x1x1", {"layout": {"dp": 2}, "virtual_dp": 2}, "1 ranks were started"),
        ("1x1x1", {"restore": {"attempt": 1, "step": 9}}, "is no complete checkpoint"),
    ],
)
def test_what_cannot_be_trained_is_told_and_ends_with_2(
    gangs: Gangs, tmp_path: Path, layout: str, changes: dict[str, Any], what: str
) -> None:
    write_job(tmp_path, layout, **changes)
    for number, rank in enumerate(programs(gangs, tmp_path, layout)):
        assert rank["code"] == 2
        assert what in rank["errors"]
        assert "Traceback" not in rank["errors"]
        left = json.loads((tmp_path / f"error-{number}.json").read_text())
        assert what in left["message"]["message"]
