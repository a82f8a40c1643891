"""Nothing of an old attempt may write into a new one, and nothing off the chain is restored."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from cluster import Cluster
from specs import TINY

Start = Callable[..., Cluster]
SCRIPTS = Path(__file__).parent / "scripts"


def test_a_grandchild_that_left_its_session_is_dead_before_the_next_attempt(
    start: Start, tmp_path: Path
) -> None:
    cluster = start(nodes=1, slots=2)
    spec = f"""
name: grandchild
resources: {{nodes: 1, gpus_per_node: 2}}
parallelism: {{dp: 2}}
run:
  command: [{sys.executable}, {SCRIPTS / "grandchild.py"}, {tmp_path}]
  workdir: {tmp_path}
  ship: none
"""
    job = cluster.submit(spec)
    cluster.wait_state(job, "succeeded")
    assert [(tmp_path / f"found-{rank}").read_text() for rank in (0, 1)] == ["alive=False wrote=False"] * 2


def test_a_late_commit_after_a_rollback_is_never_restored(start: Start) -> None:
    cluster = start(nodes=2, slots=2)
    changes = "run.llama.steps=200", "checkpoint.every=10 steps", "checkpoint.snapshot_every=never"
    job = cluster.submit(TINY, *changes)
    cluster.wait_step(job, 12)
    cluster.wait(job, lambda told: (told["progress"]["checkpoint_step"] or 0) >= 10)
    cluster.kill_rank(job, 1)
    told = cluster.wait_step(job, 11, attempt=2)
    parent = told["attempt"]["parent"]
    assert parent["attempt"] == 1
    folder = Path(told["checkpoint_dir"] if "checkpoint_dir" in told else cluster.job(job)["checkpoint_dir"])
    whole = folder / f"step-{parent['step']:08d}-attempt-0001"
    late = folder / f"step-{parent['step'] + 1000:08d}-attempt-0001"
    shutil.copytree(whole, late)
    manifest = json.loads((late / "manifest.json").read_text())
    manifest["step"] = parent["step"] + 1000
    (late / "manifest.json").write_text(json.dumps(manifest))
    cluster.kill_rank(job, 2)
    told = cluster.wait_step(job, 11, attempt=3)
    assert told["attempt"]["restore"]["step"] < 1000
    assert told["attempt"]["restore"]["attempt"] in {1, 2}
    cluster.client.post(f"/jobs/{job}/cancel")
    cluster.wait_state(job, "cancelled")
