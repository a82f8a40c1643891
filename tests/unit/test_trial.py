"""The jobs that validate nodes."""

import json

import pytest

from keepstep.core.ids import Node
from keepstep.core.job import CommandRun, JobSpec
from keepstep.decide.trial import named, trial
from keepstep.spec import from_dict, load, to_dict

NODES = [Node("ip-10-0-0-1.ec2.Internal"), Node("ip-10-0-0-2.ec2.internal" * 3)]
JOB = """
name: big
resources: {nodes: 8, gpus_per_node: 8}
parallelism: {dp: 4, pp: 4, tp: 4}
run: {llama: {model: 8b, steps: 10, batch: {global_tokens: 262144, seq: 4096}}}
checkpoint: {dir: /tmp/checkpoints}
"""


def argv(spec: JobSpec) -> tuple[str, ...]:
    assert isinstance(spec.run, CommandRun)
    return spec.run.argv


@pytest.mark.parametrize("nodes", [NODES, NODES[:1], [Node("...")]])
def test_it_is_a_job_like_others_whatever_nodes_are_called(nodes: list[Node]) -> None:
    name = named("validate", nodes, "3")
    spec = trial(name, nodes, slots=2, pool="static", pair=len(nodes) > 1)
    assert from_dict(to_dict(spec)) == spec
    assert (spec.resources.ranks, spec.nodes_for(spec.parallelism.dp)) == (2 * len(nodes), len(nodes))
    assert spec.run.kind == "command" and spec.run.is_python
    assert name == named("validate", nodes, "3") != named("validate", nodes, "4")


def test_the_shape_of_the_job_that_failed() -> None:
    of = load(JOB, "job.yaml")
    words = argv(trial("t", [Node("a")], slots=8, pool="static", of=of))
    model = json.loads(words[words.index("--model") + 1])
    assert (model["dim"], model["layers"], model["vocabulary"]) == (4096, 2, 128256)
    assert words[words.index("--tp") + 1] == "4"
    assert words[words.index("--seq") + 1] == "2048"
    assert "--model" not in argv(trial("t", [Node("a")], slots=8, pool="static"))
