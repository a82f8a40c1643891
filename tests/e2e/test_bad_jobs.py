"""Jobs that cannot work: they end, soon, and say why."""

import sys
from collections.abc import Callable
from pathlib import Path

from cluster import Cluster
from keepstep.core.errors import KeepstepError
from specs import TINY

Start = Callable[..., Cluster]


def script(folder: Path, text: str, *arguments: str) -> str:
    (folder / "job.py").write_text(text)
    words = ", ".join([sys.executable, str(folder / "job.py"), *arguments])
    return f"""
name: bad
resources: {{nodes: 1, gpus_per_node: 2}}
parallelism: {{dp: 2}}
run: {{command: [{words}], workdir: {folder}, ship: none}}
recovery: {{backoff: {{first: 0.1s, max: 0.2s}}}}
"""


def test_a_command_that_is_not_on_the_node(start: Start, tmp_path: Path) -> None:
    cluster = start(nodes=1, slots=2)
    spec = script(tmp_path, "").replace(sys.executable, "no-such-program")
    job = cluster.submit(spec)
    told = cluster.wait_state(job, "failed")
    assert "no-such-program" in told["reason"]
    assert cluster.incidents(job)[0]["culprit"]["node"] == "a"


def test_a_script_that_fails_at_once_is_not_started_for_ever(start: Start, tmp_path: Path) -> None:
    cluster = start(nodes=1, slots=2)
    job = cluster.submit(script(tmp_path, "raise ValueError('the learning rate is a colour')"))
    told = cluster.wait_state(job, "failed")
    assert "the learning rate is a colour" in told["reason"]
    assert told["attempt"]["number"] <= 4
    assert told["exit_code"] == 1
    page = cluster.client.get(f"/incidents/{cluster.incidents(job)[-1]['id']}")
    assert "ValueError" in str(page["evidence"])


def test_data_that_is_not_there(start: Start, tmp_path: Path) -> None:
    cluster = start(nodes=2, slots=2)
    missing = tmp_path / "nowhere"
    job = cluster.submit(TINY, f"run.llama.data={{source: text, path: {missing}}}")
    told = cluster.wait_state(job, "failed")
    assert str(missing) in told["reason"]


def test_a_checkpoint_that_was_torn_is_not_trained_on(start: Start) -> None:
    cluster = start(nodes=2, slots=2)
    job = cluster.submit(TINY, "run.llama.steps=100000")
    cluster.wait(job, lambda told: (told["progress"]["checkpoint_step"] or 0) >= 5)
    cluster.client.post(f"/jobs/{job}/suspend")
    cluster.wait_state(job, "suspended")
    folder = Path(cluster.job(job)["checkpoint_dir"])
    for whole in folder.glob("step-*"):
        for file in whole.glob("*.distcp"):
            file.write_bytes(file.read_bytes()[:-100])
    cluster.client.post(f"/jobs/{job}/resume")
    told = cluster.wait_state(job, "failed")
    assert ".distcp" in told["reason"]
    assert sorted(folder.glob("step-*")), "a torn checkpoint is evidence, not rubbish"


def test_a_role_that_is_too_small_changes_nothing(start: Start) -> None:
    cluster = start(nodes=0, slots=1)
    job = cluster.submit(TINY)
    made = cluster.client.post("/tokens", {"name": "looker", "role": "viewer"})
    viewer = type(cluster.client)(url=cluster.running.url, token=made["secret"])
    for verb in ("cancel", "suspend", "requeue"):
        try:
            viewer.post(f"/jobs/{job}/{verb}")
        except KeepstepError as refused:
            assert "needs submitter" in str(refused)
        else:
            raise AssertionError(f"a viewer may {verb}")
    assert cluster.job(job)["wanted"] == "run"
