"""A rank is killed in each way to lay out a model; its loss curve must not know."""

from collections.abc import Callable

import pytest

from cluster import Cluster
from keepstep.core.beacon import Phase
from specs import TINY

Start = Callable[..., Cluster]
Curve = Callable[[str], dict[int, float]]


def laid_out(parallelism: str, pipeline: str = "", *, numerics: str = "") -> str:
    """A TINY of 12 steps; four micro-batches a replica where there are two replicas."""
    text = TINY.replace("{tp: 2, pp: 1, dp: 2}", f"{{{parallelism}}}").replace("steps: 60", "steps: 12")
    for name, fields in (("pipeline", pipeline), ("numerics", numerics)):
        text = text.replace("    data:", f"    {name}: {{{fields}}}\n    data:") if fields else text
    return text


# Two layers, embedding and output are cut into four virtual stages: each has one of them.
LAYOUTS = {
    "interleaved": laid_out("tp: 1, pp: 2, dp: 2", "schedule: interleaved, chunks: 2"),
    "gpipe": laid_out("tp: 1, pp: 2, dp: 2", "schedule: gpipe, chunks: 2"),
    "context": laid_out("tp: 1, cp: 2, pp: 1, dp: 2"),
    "interleaved-context": laid_out("tp: 1, cp: 2, pp: 2, dp: 1", "schedule: interleaved, chunks: 2"),
    "parameters": laid_out("tp: 1, pp: 2, dp: 2", numerics="shard: parameters"),
}
KILLED = {
    "interleaved": (Phase.BACKWARD, 0),
    "gpipe": (Phase.FORWARD, 3),
    "context": (Phase.BACKWARD, 1),
    "interleaved-context": (Phase.FORWARD, 2),
    "parameters": (Phase.BACKWARD, 3),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_killed_rank_costs_no_layout_its_curve(name: str, start: Start, undisturbed: Curve) -> None:
    spec, (phase, rank) = LAYOUTS[name], KILLED[name]
    curve = undisturbed(spec)  # trained first, so that its cluster is ours
    cluster = start(nodes=2, slots=2)
    job = cluster.submit(spec)
    cluster.wait(job, lambda _: cluster.ranks(job).get(rank, {}).get("pid"))
    cluster.kill_in_phase(job, rank, phase, after_step=6)
    told = cluster.wait(job, lambda told: told["attempt"]["number"] == 2)
    assert "memory" in (told["attempt"]["restore"] or {}), cluster.story(job)
    told = cluster.wait_state(job, "succeeded")
    assert told["attempt"]["number"] == 2, cluster.story(job)
    assert [incident["culprit"]["rank"] for incident in cluster.incidents(job)] == [rank]
    assert cluster.losses(job) == curve
