"""The README's plain DDP script: its steps are seen, and counted on after a kill, without a changed line."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from cluster import Cluster

EXAMPLES = Path(__file__).parents[2] / "deploy" / "examples"

SPEC = f"""
name: plain
resources: {{nodes: 1, gpus_per_node: 2}}
parallelism: {{dp: 2}}
run:
  command: [python, train.py, --steps, "1000000", --checkpoint, model.pt]
  workdir: {EXAMPLES}
  ship: none
"""


def test_a_plain_script_shows_its_steps(start: Callable[..., Cluster], tmp_path: Path) -> None:
    checkpoint = tmp_path / "model.pt"
    cluster = start(nodes=1, slots=2)
    job = cluster.submit(SPEC.replace("model.pt", str(checkpoint)))
    cluster.wait_step(job, 50)
    cluster.until(checkpoint.exists, "a checkpoint of the script's own")
    shown = subprocess.run(
        [sys.executable, "-m", "keepstep.cli.main", "status", job, "-o", "json"],
        env={"KEEPSTEP_HOME": str(cluster.home.path), "PATH": "/usr/bin:/bin"},
        capture_output=True, text=True, timeout=100, check=True,
    ).stdout  # fmt: skip
    assert json.loads(shown)["progress"]["step"] >= 50

    cluster.kill_rank(job, 1)
    cluster.wait(job, lambda told: told["attempt"]["number"] == 2 and told["attempt"]["first_step_at"])
    assert [incident["culprit"]["rank"] for incident in cluster.incidents(job)] == [1]
    assert {rank["pid"] > 0 for rank in cluster.ranks(job).values()} == {True}
