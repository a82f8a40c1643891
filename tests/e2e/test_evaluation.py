"""Evaluations: a script's, long and new, is not hung; the built-in trainer's is the same with kills."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster import Cluster
from keepstep.cli.jobs import summary
from keepstep.core.beacon import Phase
from specs import TINY

SCRIPT = Path(__file__).parent / "scripts" / "evaluating.py"
EVALUATION_S = os.environ.get("KEEPSTEP_TEST_EVALUATION_S", "20")  # 400 steps; by hand also 120


@pytest.mark.slow
def test_a_first_evaluation_on_one_rank_is_not_killed(start: Callable[..., Cluster], tmp_path: Path) -> None:
    cluster = start(nodes=1, slots=2)
    job = cluster.submit(f"""
name: evaluating
resources: {{nodes: 1, gpus_per_node: 2}}
parallelism: {{dp: 2}}
run:
  command: [{sys.executable}, {SCRIPT}, --evaluate-s, "{EVALUATION_S}"]
  workdir: {tmp_path}
  ship: none
""")
    told = cluster.wait_state(job, "succeeded", "failed", within_s=600)
    assert told["state"] == "succeeded", cluster.story(job)
    assert told["attempt"]["number"] == 1, cluster.story(job)
    assert cluster.incidents(job) == []


EVALUATED = TINY.replace(
    "data: {source: stdlib}",
    "data: {source: stdlib, holdout: 0.1}\n    evaluation: {every_steps: 15, sequences: 64}",
).replace("pp: 1", "pp: 2").replace("dp: 2", "dp: 1")  # fmt: skip


def test_a_rank_killed_while_it_evaluates(start: Callable[..., Cluster]) -> None:
    """Losses and evaluations are those of a job that was left alone, and `status` shows them."""
    cluster = start(nodes=2, slots=2)
    alone, disturbed = cluster.submit(EVALUATED), cluster.submit(EVALUATED)

    def evaluations(job: str) -> dict[int, float]:
        found = cluster.client.get(f"/jobs/{job}/evaluations")["evaluations"]
        return {each["step"]: each["loss"] for each in found if each["source"] == ""}

    cluster.wait_step(disturbed, 3)
    assert cluster.kill_in_phase(disturbed, 2, Phase.EVALUATION, after_step=15) >= 15
    told = cluster.wait_state(disturbed, "succeeded")
    cluster.wait_state(alone, "succeeded")
    assert told["attempt"]["number"] == 2, cluster.story(disturbed)
    assert sorted(evaluations(alone)) == [15, 30, 45, 60]
    assert evaluations(disturbed) == evaluations(alone)
    assert cluster.losses(disturbed) == cluster.losses(alone)
    newest = {"step": 60, "loss": evaluations(alone)[60]}
    assert told["progress"]["validation"] == newest | {"by_source": {"stdlib": newest["loss"]}}
    assert f"loss {newest['loss']:.3f} at step 60" in dict(summary(told))["validation"]
