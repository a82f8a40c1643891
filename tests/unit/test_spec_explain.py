"""What the spec says of itself: explain, schema, rank map."""

import json

import pytest

from keepstep.core.errors import InputError
from keepstep.core.job import Recovery
from keepstep.spec import explain, load, paths, rank_map, schema
from keepstep.spec.scalars import duration, duration_text, size, size_text


@pytest.mark.parametrize("path", paths())
def test_every_field_has_a_meaning_and_a_default(path: str) -> None:
    told = explain(path)
    head, meaning = told.splitlines()[:2]
    assert head == path
    assert len(meaning.split()) >= 2, f"{path} has no meaning written beneath it"
    assert "default:" in told


def test_a_duration_with_its_unit_bound_and_default() -> None:
    told = explain("recovery.self_fence")
    assert "30s, 10m, 1h30m" in told
    assert "at least 1s" in told
    assert f"{duration_text(Recovery().self_fence_s)}" in told.split("default:")[1]


def test_auto_is_a_default_that_is_told() -> None:
    for path in ("recovery.hang_after", "checkpoint.every", "checkpoint.snapshot_every"):
        assert explain(path).split("default:")[1].split()[0] == "auto", path


def test_defaults_that_follow_from_others_are_told() -> None:
    assert "what tp, pp and cp leave" in explain("parallelism.dp")
    assert "none: it must be given" in explain("run")
    assert "{preset: debug}" in explain("run.llama.model")


def test_through_names_of_the_users_own() -> None:
    assert explain("run.secrets.HF_TOKEN.file").splitlines()[0] == "run.secrets.file"
    assert explain("run.env_from[0].env").splitlines()[0] == "run.env_from.env"


def test_the_top_lists_all_sections() -> None:
    assert {"name", "run", "recovery"} <= {line.split()[0] for line in explain().splitlines() if line.strip()}


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("recovery.hang_aftr", "hang_after"),
        ("hang_after", "recovery.hang_after"),
        ("recovery.hang_after.x", "no fields within"),
        ("..", ""),
        ("resorces", "resources"),
    ],
)
def test_misspelt_paths(path: str, hint: str) -> None:
    if not hint:
        assert explain(path) == explain()
        return
    with pytest.raises(InputError) as caught:
        explain(path)
    assert hint in str(caught.value)


def test_the_schema_is_json_with_meanings_and_written_defaults() -> None:
    data = json.loads(json.dumps(schema()))
    assert data["additionalProperties"] is False
    assert data["required"] == ["run"]
    recovery = data["$defs"]["RecoverySection"]["properties"]
    assert recovery["hang_after_unknown"]["default"] == "10m"
    assert recovery["hang_after"]["default"] == "auto"
    assert "phase" in recovery["hang_after_unknown"]["description"]
    logs = data["$defs"]["LogsSection"]["properties"]
    assert logs["size"]["default"] == "64MiB"
    dp = data["$defs"]["ParallelismSection"]["properties"]["dp"]
    assert "Default: what tp, pp and cp leave." in dp["description"]


def test_every_property_of_the_schema_has_a_description() -> None:
    data = schema()
    for name, section in [("job", data), *data["$defs"].items()]:
        for field, property_ in section.get("properties", {}).items():
            assert property_.get("description"), f"{name}.{field}"


@pytest.mark.parametrize("seconds", [0.001, 0.5, 1, 30, 90, 600, 5400, 86_400])
def test_durations_come_back(seconds: float) -> None:
    assert duration(duration_text(seconds)) == pytest.approx(seconds)


@pytest.mark.parametrize("count", [1, 4096, 64 * 2**20, 3 * 2**30, 10**9])
def test_sizes_come_back(count: int) -> None:
    assert size(size_text(count)) == count


JOB = """
resources: {nodes: 2, gpus_per_node: 4}
parallelism: {tp: 2, pp: 2}
elastic: {min_dp: 1}
run: {llama: {}}
"""


def test_the_rank_map() -> None:
    lines = rank_map(load(JOB), ["alpha", "beta"]).splitlines()
    assert lines[0] == "tp 2 x pp 2 x dp 2 = 8 ranks on 2 nodes, 4 on each"
    assert lines[1].split() == ["rank", "tp", "pp", "dp", "node", "slot"]
    assert [line.split() for line in lines[2:]] == [
        ["0", "0", "0", "0", "alpha", "0"],
        ["1", "1", "0", "0", "alpha", "1"],
        ["2", "0", "1", "0", "alpha", "2"],
        ["3", "1", "1", "0", "alpha", "3"],
        ["4", "0", "0", "1", "beta", "0"],
        ["5", "1", "0", "1", "beta", "1"],
        ["6", "0", "1", "1", "beta", "2"],
        ["7", "1", "1", "1", "beta", "3"],
    ]


def test_the_rank_map_of_a_shrunken_job() -> None:
    lines = rank_map(load(JOB), dp=1).splitlines()
    assert lines[0] == "tp 2 x pp 2 x dp 1 = 4 ranks on 1 node, 4 on each"
    assert len(lines) == 2 + 4


def test_the_rank_map_of_a_large_job_is_cut_in_the_middle() -> None:
    large = "{resources: {nodes: 2048, gpus_per_node: 8}, run: {command: [python, a.py]}}"
    lines = rank_map(load(large), most_rows=4).splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["0", "1", "...", "16382", "16383"]
    assert "16,380 more" in lines[4]
