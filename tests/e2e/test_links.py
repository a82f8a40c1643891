"""The network between ranks alone: a link that becomes slow is told with its ends, one that is cut is left.

Agents reach the controller all the while, over a network of their own (tests/hosts.py).
"""

from typing import Any

import pytest

from e2e.test_hung import PAIR
from site_of_hosts import Site

pytestmark = pytest.mark.slow


def found(site: Site, job: str) -> list[Any]:
    """Verdicts that were told, oldest first."""
    events = site.keepstep("events", job, "-o", "json")["events"]
    return [one["data"]["verdict"] for one in events if one["kind"] == "found"]


def test_a_slow_link_is_told_and_a_cut_one_is_left(site: Site) -> None:
    spec = site.folder / "pair.yaml"
    spec.write_text(
        PAIR.replace("gpus_per_node: 1", "gpus_per_node: 1, spares: 1")
        .replace("steps: 60", "steps: 100000")
        .replace("./checkpoints, every: 5 steps", f"{site.shared}, every: 1000 steps")
        + "pool: static\nrecovery: {hang_after: 8s}\n"
    )
    job = str(site.keepstep("submit", str(spec), "-o", "name"))
    site.until_step(job, 80)  # long enough to know what is usual
    assert not any("link" in one["signature"] for one in found(site, job))
    site.hosts.slow("n2", "training", "8mbit")
    site.until(lambda: "slow: link n1 n2" in [one["signature"] for one in found(site, job)], "the slow link")
    site.hosts.quick("n2", "training")
    (told,) = [one for one in found(site, job) if one["signature"] == "slow: link n1 n2"]
    assert told["blame"] == "infrastructure" and told["confidence"] >= 0.7 and told["slowdown"] > 0.3, told
    assert site.job(job)["attempt"]["number"] == 1

    site.hosts.cut("n2", "training")
    site.until_step(job, 1, attempt=2)
    assert set(site.job(job)["attempt"]["nodes"]) == {"n1", "n3"}
    (incident,) = site.keepstep("describe", job, "-o", "json")["incidents"]
    assert (incident["verdict"], incident["culprit"]["node"]) == ("hung", "n2"), incident
    assert "the network is cut between n1 and n2" in incident["evidence"]["what"], incident
    site.keepstep("cancel", job, "--yes")
