"""Long and new is not hung: one rank works alone for far longer than any step, the others wait for it."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster import Cluster

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
