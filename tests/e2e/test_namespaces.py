"""Three hosts that share nothing but a folder for checkpoints, and a controller on a fourth.

A lost node sends nothing, not even FIN: hosts are cut off by dropping their packets (tests/hosts.py).
"""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from site_of_hosts import Site

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parent / "scripts" / "cube.py"


def submit(site: Site, steps: int) -> str:
    spec = site.folder / "job.yaml"
    (site.folder / "code").mkdir()
    (site.folder / "code" / "cube.py").write_bytes(SCRIPT.read_bytes())
    spec.write_text(f"""
name: cube
pool: static
resources: {{nodes: 2, gpus_per_node: 4, spares: 1}}
parallelism: {{tp: 2, pp: 2, dp: 2}}
run:
  command: [python, cube.py, "{steps}", {site.shared}]
  workdir: code
recovery: {{fenced: true}}
""")
    return str(site.keepstep("submit", str(spec), "-o", "name"))


@pytest.mark.timeout(900)
def test_a_shipped_job_outlives_a_host_that_falls_silent(site: Site) -> None:
    job = submit(site, 400)
    site.until_step(job, 10)
    assert site.job(job)["attempt"]["nodes"] == ["n1", "n2"]
    site.hosts.cut("n2")
    site.until_step(job, 15, attempt=2)
    told = site.job(job)
    assert set(told["attempt"]["nodes"]) == {"n1", "n3"}
    assert told["attempt"]["rung"] == "spare"
    site.hosts.mend("n2")
    site.until(lambda: len(site._connected()) == 3, "the host to come back")
    site.until(lambda: site.job(job)["state"] == "succeeded", "the job", 120)
    assert json.loads((site.shared / "result.json").read_text())["value"] == pytest.approx(expected(400))


@pytest.mark.timeout(900)
def test_cutting_only_the_way_to_the_controller_costs_no_step(site: Site) -> None:
    """Forty real seconds; ten minutes are played through in virtual time (tests/golden/decide)."""
    job = submit(site, 2000)
    site.until_step(job, 10)
    site.hosts.cut("n1", "management")
    site.hosts.cut("n2", "management")
    cut_at = time.monotonic()
    while time.monotonic() - cut_at < 40:
        assert site.job(job)["attempt"]["number"] == 1
        time.sleep(1)
    site.hosts.mend("n1", "management")
    site.hosts.mend("n2", "management")
    site.until(lambda: len(site._connected()) == 3, "the hosts to come back")
    site.until_step(job, site.job(job)["progress"]["step"] + 20)
    assert site.job(job)["attempt"]["number"] == 1
    site.keepstep("cancel", job, "--yes")


def submit_journal(site: Site, *, tell: bool, recovery: str) -> str:
    """A gang over two hosts whose ranks write checkpoints of their own."""
    spec = site.folder / "journal.yaml"
    (site.folder / "journal").mkdir()
    (site.folder / "journal" / "journal.py").write_bytes(SCRIPT.with_name("journal.py").read_bytes())
    spec.write_text(f"""
name: journal
pool: static
resources: {{nodes: 2, gpus_per_node: 1, spares: 1}}
parallelism: {{dp: 2}}
run:
  command: [python, journal.py, {site.shared}, {"tell" if tell else "silent"}, "100000"]
  workdir: journal
recovery: {{{recovery}}}
""")
    return str(site.keepstep("submit", str(spec), "-o", "name"))


def written(site: Site, attempt: int) -> list[float]:
    """When the ranks of an attempt wrote, by the one clock of this machine."""
    found = []
    for path in site.shared.glob(f"journal-{attempt}-*"):
        found += [float(line) for line in path.read_text().splitlines() if line]
    return sorted(found)


# whether the script's steps are known, its bounds, and what the controller says it has waited for
OVERLAPS = {
    "self-fence": (True, "self_fence: 4s, orphan_lease: 10m", "has ended its ranks by itself"),
    "lease": (False, "self_fence: 10m, orphan_lease: 12s", "has run out"),
}


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.long if case == "lease" else ()) for case in OVERLAPS]
)
def test_attempts_of_a_script_that_writes_by_itself_never_overlap(site: Site, case: str) -> None:
    """The host that holds rank 0, which writes the state, is cut off with everything that runs on it."""
    tell, recovery, waited_for = OVERLAPS[case]
    job = submit_journal(site, tell=tell, recovery=recovery)
    site.until(lambda: len(written(site, 1)) > 20, "attempt 1 to write")
    if tell:
        site.until_step(job, 5)
    first = site.job(job)["attempt"]["nodes"][0]
    ranks = {rank["rank"]: rank for rank in site.keepstep("describe", job, "-o", "json")["ranks"]}
    site.hosts.cut(first)
    if not tell:  # a silent host alone ends nothing that was never seen to step: a dead rank elsewhere does
        os.kill(ranks[1]["pid"], signal.SIGKILL)
    site.until(lambda: len(written(site, 2)) > 20, "attempt 2 to write", 240)
    assert first not in site.job(job)["attempt"]["nodes"]
    assert max(written(site, 1)) < min(written(site, 2)), "two attempts wrote at the same time"
    told = site.keepstep("events", job, "-o", "json")
    events = told["events"] if isinstance(told, dict) else told
    deaths = [event["text"] for event in events if event["kind"] == "dead"]
    assert any(waited_for in text for text in deaths), deaths
    site.hosts.mend(first)
    site.until(lambda: len(site._connected()) == 3, "the host to come back")
    assert max(written(site, 1)) < min(written(site, 2))
    assert site.job(job)["attempt"]["number"] == 2
    site.keepstep("cancel", job, "--yes")


def expected(steps: int) -> float:
    """What cube.py computes, on one rank."""
    values = [float(rank + 1) for rank in range(8)]
    for step in range(1, steps + 1):
        for axis in (1, 2, 4):
            values = [(values[r & ~axis] + values[r | axis]) / 2 for r in range(8)]
        values = [value + (rank + step) % 7 for rank, value in enumerate(values)]
    return values[0]
