"""What commands print, from answers as the controller gives them."""

import json
from typing import Any

import pytest
import yaml

from keepstep.cli import explain, goodput, jobs, logs, units, waiting
from keepstep.cli.options import duration_s
from keepstep.cli.render import Column, draw, emit
from keepstep.cli.waiting import failed
from keepstep.core.errors import InputError

Json = dict[str, Any]

JOB: Json = {
    "id": "llama3-k3f9", "name": "llama3", "state": "running", "reason": "all ranks step", "pool": "local",
    "layout": {"dp": 2, "pp": 2, "cp": 1, "tp": 2}, "world_size": 8, "created_at": 1_700_000_000.0,
    "started_at": 1_700_000_001.0, "finished_at": 1_700_000_090.0, "exit_code": None, "waiting_for": None,
    "attempt": {"number": 2, "rung": "in place", "nodes": ["a", "b"]},
    "progress": {"step": 60, "steps": 120, "loss": 2.9134, "tokens_per_s": 3812.0, "tflops": 0.21,
                 "mfu": None, "checkpoint_step": 50, "grad_norm": 1.0, "age_s": 0.1},
    "restarts": {"used": 1, "max": 20}, "incidents": [3],
    "rank_memory": {"weights": 6_100_000_000, "owned": 55_200_000_000, "logits": 0, "total": 61_300_000_000},
}  # fmt: skip

INCIDENT: Json = {
    "id": 17, "verdict": "crashed", "state": "recovered", "job": "llama3-k3f9", "attempt": 1,
    "culprit": {"rank": 3, "node": "a", "role": "tp=1 pp=1 dp=0"},
    "evidence": {"what": "rank 3 died of SIGKILL", "blame": "infrastructure", "step": 60, "began_s": 0.03,
                 "lines": ["signal 9", "last line: loss 2.9"]},
    "opened_at": 1_700_000_000.03, "began_at": 1_700_000_000.0, "same_before": [4, 9],
    "costs": {},
    "seconds": {"detected": 0.03, "decided": 0.05, "recovered": 0.47, "closed": None},
    "decision": {"reason": "in place from step 60",
                 "rejected": [{"option": "spare", "why": "a still works"}]},
    "timeline": [{"at": 1_700_000_000.03, "kind": "detected", "text": "rank 3"},
                 {"at": 1_700_000_000.47, "kind": "stepped", "text": "step 61"}],
}  # fmt: skip

LEDGER: Json = {
    "buckets": {"productive": 80.0, "starting": 16.0, "standby": 40.0, "idle": 0.0, "detecting": 4.0},
    "incidents": {"1": {"detecting": 4.0}}, "total": 140.0, "goodput": 0.8, "goodput_with_spares": 0.5714,
}  # fmt: skip


def test_a_table_in_a_pipe_is_plain_and_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    columns = (
        Column("NAME", lambda row: str(row["name"])),
        Column("N", lambda row: str(row["n"]), right=True),
        Column("MORE", lambda row: "x" * 300, wide=True),
    )
    draw([{"name": "a", "n": 1}, {"name": "long-name", "n": 100}], columns)
    assert capsys.readouterr().out == "NAME         N\na            1\nlong-name  100\n"
    draw([{"name": "a", "n": 1}], columns, wide=True)
    assert capsys.readouterr().out.splitlines()[1] == "a     1  " + "x" * 300


def test_nothing_to_show_is_said_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    draw([], jobs.COLUMNS, empty="no jobs")
    told = capsys.readouterr()
    assert (told.out, told.err) == ("", "no jobs\n")


@pytest.mark.parametrize("output", ["json", "yaml", "name", "table", "wide"])
def test_every_output(output: str, capsys: pytest.CaptureFixture[str]) -> None:
    emit(
        output,
        {"a": ["ü"]},
        name=lambda: ["one", "two"],
        table=lambda wide: print("wide" if wide else "narrow"),
    )
    shown = capsys.readouterr().out
    match output:
        case "json":
            assert json.loads(shown) == {"a": ["ü"]}
        case "yaml":
            assert yaml.safe_load(shown) == {"a": ["ü"]}
        case "name":
            assert shown == "one\ntwo\n"
        case _:
            assert shown.strip() == {"wide": "wide", "table": "narrow"}[output]


def test_a_job_as_a_row_and_in_short() -> None:
    cells = {column.title: column.cell(JOB) for column in jobs.COLUMNS}
    assert cells["STEP"] == "60/120"
    assert cells["LOSS"] == "2.913"
    assert cells["TOKENS/S"] == "3.81 k"
    assert cells["LAYOUT"] == "tp2 pp2 dp2"
    assert cells["AGE"] == "90s"
    pairs = dict(jobs.summary(JOB))
    assert pairs["attempt"] == "2 (in place) on a, b"
    assert pairs["restarts"] == "1 of 20 used"
    assert pairs["checkpoint"] == "step 50"
    assert pairs["of a rank"] == "at most 61.3 GB: weights 6.1, owned 55.2"
    assert cells["GB/RANK"] == "61.3"


def test_a_job_that_only_waits_has_dashes() -> None:
    job = {
        **JOB,
        "attempt": None,
        "progress": {"step": None, "steps": None},
        "waiting_for": "no node is free",
    }
    cells = {column.title: column.cell(job) for column in jobs.COLUMNS}
    assert (cells["STEP"], cells["LOSS"], cells["ATTEMPT"]) == ("-", "-", "-")
    assert cells["REASON"] == "no node is free"


def test_an_incident_on_one_screen() -> None:
    pairs = dict(explain.explained(INCIDENT))
    assert pairs["who"] == "rank 3 (tp=1 pp=1 dp=0) node a"
    assert pairs["decided"] == "in place from step 60"
    assert pairs["rejected"] == "spare: a still works"
    assert pairs["done"] == "+0.03 s  detected: rank 3\n+0.47 s  stepped: step 61"
    assert pairs["before"] == "the same in incident 4, 9"
    assert pairs["evidence"] == "signal 9\nlast line: loss 2.9"
    lines = sum(len(text.splitlines()) for text in pairs.values())
    assert lines <= 24, "one screen"


@pytest.mark.parametrize(
    ("change", "advice"),
    [
        ({"same_before": []}, "nothing"),
        ({"same_before": [4]}, "look at the node: it is not the first time"),
        ({"state": "open"}, "wait: recovery is under way"),
        ({"state": "closed", "evidence": {"blame": "job"}}, "logs llama3-k3f9 --first-error"),
    ],
)
def test_what_a_person_should_do(change: Json, advice: str) -> None:
    assert advice in explain.advice({**INCIDENT, **change})


def test_the_ledger_adds_up() -> None:
    rows = goodput.rows(LEDGER)
    *buckets, total = rows
    assert sum(row["slot_s"] for row in buckets) == total["slot_s"] == 140.0
    assert [row["bucket"] for row in rows] == ["productive", "standby", "starting", "detecting", "total"]
    assert goodput.one_line(LEDGER, 8) == "goodput 80.0 %: productive 10.0 s | starting 2.0 | detecting 0.5"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("90s", 90), ("1.5m", 90), ("2min", 120), ("2h", 7200), ("1d", 86_400), ("5ms", 0.005)],
)
def test_durations(text: str, seconds: float) -> None:
    assert duration_s(text, "--timeout") == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "soon", "-1s", "1x", "nan", "inf"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(InputError, match="no duration"):
        duration_s(text, "--timeout")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4712, "0.47 s"), (12.34, "12.3 s"), (99.96, "1 min 40 s"), (3600, "1 h"), (7380, "2 h 3 min"),
     (-1, "-1.00 s"), (270_000, "3 d 3 h"), (None, "-")],
)  # fmt: skip
def test_seconds_for_people(seconds: float | None, text: str) -> None:
    assert units.seconds(seconds) == text


@pytest.mark.parametrize(
    ("text", "ranks"), [("0,7", [0, 7]), ("0-3,9,2", [0, 1, 2, 3, 9]), ("5", [5]), ("", [])]
)
def test_ranks(text: str, ranks: list[int]) -> None:
    assert logs.ranks_of(text) == ranks


@pytest.mark.parametrize("text", ["x", "3-1", "1-", "-1"])
def test_what_names_no_rank(text: str) -> None:
    with pytest.raises(InputError, match="names no rank"):
        logs.ranks_of(text)


def test_lines_of_several_ranks_have_prefixes(capsys: pytest.CaptureFixture[str]) -> None:
    for several in (True, False):
        logs.Lines(several=several).show({"rank": 3, "node": "a", "attempt": 1, "line": "hello"})
    assert capsys.readouterr().out == "[rank 3] hello\nhello\n"


def test_a_node_that_cannot_be_asked_is_told_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    logs.Lines(several=True).show({"rank": None, "node": "a", "attempt": 1, "error": "it is gone"})
    told = capsys.readouterr()
    assert (told.out, told.err) == ("", "keepstep: node a: it is gone\n")


def test_a_failed_job_says_where_to_look() -> None:
    error = failed({**JOB, "state": "failed", "exit_code": 3, "reason": "rank 1 exited with 3"})
    assert error.exit_code == 7
    assert "failed with exit code 3: rank 1 exited with 3" in str(error)
    assert "--first-error" in str(error)
    assert "can no longer be suspended" in str(failed({**JOB, "state": "succeeded"}, "suspended"))


def test_every_state_can_be_waited_for() -> None:
    assert {"running", "recovered", "succeeded", "finished", "suspended"} <= set(waiting.GOALS)


def test_watch_prints_what_changed_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from keepstep.cli.watch import repeat

    shown = iter(["a", "a", "b"])

    def show() -> None:
        try:
            print(next(shown))
        except StopIteration:
            raise KeyboardInterrupt from None

    with pytest.raises(KeyboardInterrupt):
        repeat(show, watch=True, every_s=0.0)
    assert capsys.readouterr().out == "a\nb\n"
