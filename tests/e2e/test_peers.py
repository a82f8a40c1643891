"""Scripts for other people's trainers run as they are, and go on from their own checkpoints after a kill."""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster import Cluster

pytest.importorskip("lightning", reason="make .venv/.peers installs them")
pytestmark = pytest.mark.slow
SCRIPTS = Path(__file__).parent / "scripts"
# steps, what its script is told, a checkpoint to wait for, and what is learnt to load ahead
PEERS = {
    "hf_trainer": (150, "--out", "checkpoint-20/trainer_state.json", "transformers.trainer"),
    "lightning_trainer": (800, "--out", "last.ckpt", "torchmetrics"),
    "accelerate_loop": (1000, "--out", "step-000020", "accelerate"),
    "ddp": (4000, "--checkpoint", "", ""),
}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("peers") / "home", nodes=1, slots=2)
    yield cluster
    cluster.close()


def with_long(*peers: str) -> list[Any]:
    """Those of Lightning are left out of CI: it has Hugging Face's."""
    return [pytest.param(peer, marks=pytest.mark.long if "lightning" in peer else ()) for peer in peers]


@pytest.mark.parametrize("peer", with_long(*PEERS))
def test_a_script_goes_on_from_its_own_checkpoint(cluster: Cluster, tmp_path: Path, peer: str) -> None:
    steps, option, checkpoint, ahead = PEERS[peer]
    saved = tmp_path / "saved"
    job = cluster.submit(f"""
name: {peer.replace("_", "-")}
resources: {{nodes: 1, gpus_per_node: 2}}
parallelism: {{dp: 2}}
run:
  command: [{sys.executable}, {SCRIPTS / peer}.py, --steps, "{steps}", {option}, {saved}]
  workdir: {tmp_path}
  ship: none
""")
    cluster.wait(job, lambda _: (saved / checkpoint).exists())
    cluster.kill_rank(job, 1)
    told = cluster.wait_state(job, "succeeded", "failed")
    assert told["state"] == "succeeded", cluster.story(job)
    assert told["attempt"]["number"] == 2
    [node] = cluster.home.nodes.iterdir()
    log = (node / "jobs" / job / "2" / "rank-0.log").read_text()
    began, done = re.findall(r"(?:began|started) at (\d+), done at (\d+)", log)[-1]
    assert 0 < int(began) < steps
    assert int(done) == steps
    assert all(rank["warm"] for rank in cluster.ranks(job).values()), cluster.story(job)
    known = [json.loads(path.read_bytes()) for path in node.glob("learnt/*.json")]
    assert not ahead or any(ahead in record["modules"] for record in known)


def test_a_plain_script_that_hangs_is_found_by_its_counters(cluster: Cluster, tmp_path: Path) -> None:
    """Rank 1 loops for ever in a step; rank 0 waits at the barrier after it. Its owner is impatient."""
    saved = tmp_path / "saved"
    job = cluster.submit(f"""
name: ddp
resources: {{nodes: 1, gpus_per_node: 2}}
parallelism: {{dp: 2}}
run:
  command: [{sys.executable}, {SCRIPTS}/ddp.py, --steps, "900", --hang-at, "800", --checkpoint, {saved}]
  workdir: {tmp_path}
  ship: none
recovery: {{hang_after: 8s}}
""")
    told = cluster.wait_state(job, "succeeded", "failed")
    assert told["state"] == "succeeded", cluster.story(job)
    [incident] = cluster.incidents(job)
    assert (incident["verdict"], incident["culprit"]["rank"]) == ("hung", 1), incident
    assert any("ddp.py" in line for line in incident["evidence"]["lines"]), incident
    [log] = cluster.home.nodes.glob(f"*/jobs/{job}/2/rank-0.log")
    assert "started at 800, done at 900" in log.read_text(), cluster.story(job)


@pytest.mark.parametrize("peer", with_long("hf_snapshots", "lightning_snapshots"))
def test_a_library_goes_on_from_memory(cluster: Cluster, tmp_path: Path, peer: str) -> None:
    """One rank is killed in the middle of an epoch: weights and loss scale are as if nothing had been."""
    job = cluster.submit(f"""
name: {peer.replace("_", "-")}
resources: {{nodes: 1, gpus_per_node: 2}}
run:
  command: [{sys.executable}, {SCRIPTS / peer}.py, "40", "21", {tmp_path}]
  workdir: {tmp_path}
  ship: none
checkpoint: {{snapshot_every: 1 step}}
""")
    told = cluster.wait_state(job, "succeeded", "failed")
    assert told["state"] == "succeeded", cluster.story(job)
    assert told["attempt"]["number"] == 2
    [log] = cluster.home.nodes.glob(f"*/jobs/{job}/2/rank-0.log")
    began, done, total, undisturbed = re.findall(
        r"began at (\d+), done at (\d+): (.+), undisturbed (.+)", log.read_text()
    )[0]
    assert (began, done) == ("20", "40")
    assert total == undisturbed
    assert total.endswith(" x64"), "the scale doubles every seven steps, whoever makes them"
