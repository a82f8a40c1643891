"""Jobs as dictionaries: what comes back is what went in, and nothing is believed."""

import json
from typing import Any

import pytest

from keepstep.core.errors import InputError
from keepstep.spec import from_dict, load, to_dict

COMMAND = """
run: {command: [python, a.py], env: {A: x}, limits: {core: unlimited}, secrets: {B: {env: B}}}
notify: [x]
"""


def record(text: str = COMMAND) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(json.dumps(to_dict(load(text))))
    return data


EVALUATED = "run: {llama: {data: {holdout: 0.01}, evaluation: {every_steps: 9, data: stdlib}}}"


@pytest.mark.parametrize("text", [COMMAND, "run: {llama: {}}", EVALUATED, "run: {llama: {model: 8b-3.1}}"])
def test_there_and_back(text: str) -> None:
    assert from_dict(record(text)) == load(text)


def test_a_field_of_a_later_version_is_passed_over() -> None:
    data = record()
    data["cells"] = {"of": 8}
    data["run"]["cgroup"] = "x"
    assert from_dict(data) == load(COMMAND)


def put(data: dict[str, Any], path: str, value: Any) -> None:
    *way, last = path.split(".")
    for part in way:
        data = data[part]
    data[last] = value


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("name", "../../etc"),
        ("name", "a" * 60),
        ("name", 3),
        ("pool", "Pool"),
        ("resources.nodes", 0),
        ("resources.nodes", "1"),
        ("resources.nodes", True),
        ("resources.nodes", 2),  # no longer the product of the layout
        ("parallelism.tp", 0),
        ("recovery.self_fence_s", -1.0),
        ("recovery.self_fence_s", 1e300),
        ("recovery.restarts.per_s", 0),
        ("run", {"kind": "shell"}),
        ("run", None),
        ("run.kind", "llama"),
        ("run.command", []),
        ("run.command", ["a\0b"]),
        ("run.command", "python a.py"),
        ("run.env", {"A=B": "x"}),
        ("run.env", {"RANK": "0"}),
        ("run.env", {"HF_TOKEN": "hf_abcdefghijklmnopqrstuvwxyz"}),
        ("run.limits", {"nofiles": 3}),
        ("run.stop.signal", "NOSUCH"),
        ("run.bundle", "../x"),
        ("run.preload", ["os; x"]),
        ("run.secrets", {"B": "value"}),
        ("run.workdir", ""),
    ],
)
def test_what_no_document_could_have_given_is_refused(path: str, value: Any) -> None:
    data = record()
    put(data, path, value)
    with pytest.raises(InputError) as caught:
        from_dict(data)
    assert str(caught.value).startswith("spec: ")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("run.batch.global_tokens", 100),
        ("run.model.heads", 0),
        ("run.model.kv_heads", 3),
        ("run.data", {"source": "text", "path": None}),
        ("run.steps", 0),
    ],
)
def test_a_model_that_cannot_be_is_refused(path: str, value: Any) -> None:
    data = record("run: {llama: {}}")
    put(data, path, value)
    with pytest.raises(InputError):
        from_dict(data)


@pytest.mark.parametrize("data", [{}, {"name": float("nan")}, {"name": object()}, {"run": {}}])
def test_what_is_no_job_at_all(data: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        from_dict(data)


def test_values_of_env_are_in_no_refusal_of_others() -> None:
    data = record()
    put(data, "run.env", {"A": "hunter2"})
    put(data, "resources.nodes", 0)
    with pytest.raises(InputError) as caught:
        from_dict(data)
    assert "hunter2" not in str(caught.value)
