"""Text into shards by Ray Data, on the nodes of a real cluster."""

import contextlib
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from keepstep.agent.rank import processes
from keepstep.llama.data.shards import Manifest, verify
from ray_cluster import RayCluster

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]


def command_of(out: Path, source: Path, *more: str) -> list[str]:
    return [
        sys.executable, "-W", "ignore", "-m", "keepstep.llama.data", "tokenize", str(out),
        "--source", f"lines={source}", "--shard-mb", "0.01", *more,
    ]  # fmt: skip


def tokenised(out: Path, source: Path, *more: str) -> "subprocess.CompletedProcess[str]":
    command = command_of(out, source, *more)
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture
def ray(tmp_path: Path) -> Iterator[RayCluster]:
    """Not the one that others share: their last test takes its head away."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed: make .venv/.ray")
    found = RayCluster(tmp_path / "cluster")
    yield found
    found.close()


def test_every_node_makes_shards_and_they_are_those_of_one_machine(ray: RayCluster, tmp_path: Path) -> None:
    source = tmp_path / "lines.jsonl"
    source.write_text("".join(json.dumps({"text": f"{k} " + "word " * (k % 500)}) + "\n" for k in range(400)))
    ray.add("other")
    done = tokenised(tmp_path / "ray", source, "--ray", ray.address)
    assert done.returncode == 0, done.stderr
    assert tokenised(tmp_path / "here", source).returncode == 0
    by_ray, here = Manifest.read(tmp_path / "ray"), Manifest.read(tmp_path / "here")
    assert by_ray == here and len(here.sources["lines"]) > 20
    assert list(verify(tmp_path / "ray")) == []
    lost = tmp_path / "ray" / here.sources["lines"][3].file
    lost.unlink()
    again = tokenised(tmp_path / "ray", source, "--ray", ray.address)
    assert again.returncode == 0 and "1 of" not in again.stdout, again.stderr
    assert lost.read_bytes() == (tmp_path / "here" / here.sources["lines"][3].file).read_bytes()


def makes(raylet: int) -> bool:
    """Whether an actor of Ray Data's works on that node."""
    for worker in processes.descendants(raylet, processes.table()):
        with contextlib.suppress(OSError):  # it has just ended
            if b"MapWorker" in Path(f"/proc/{worker.pid}/cmdline").read_bytes():
                return True
    return False


def test_units_of_a_node_that_is_lost_are_made_by_others(ray: RayCluster, tmp_path: Path) -> None:
    source = tmp_path / "lines.jsonl"
    source.write_text(
        "".join(json.dumps({"text": f"{k} " + "word " * (k % 500)}) + "\n" for k in range(4000))
    )
    ray.add("other")
    command = command_of(tmp_path / "ray", source, "--ray", ray.address)
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        assert process.stderr is not None
        raylet = ray.raylet("other")
        done = next((line for line in process.stderr if " shards, " in line and makes(raylet)), "")
        ray.kill("other")
        rest = process.stderr.read()
    assert process.returncode == 0, rest
    assert done and "shards, " in rest, "killed while it made some, in the midst of it"
    assert tokenised(tmp_path / "here", source).returncode == 0
    assert Manifest.read(tmp_path / "ray") == Manifest.read(tmp_path / "here")
    assert list(verify(tmp_path / "ray")) == []


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    source = tmp_path / "lines.jsonl"
    source.write_text('{"text": "a"}\n')
    nowhere = tokenised(tmp_path / "out", source, "--ray", "127.0.0.1:1")
    assert nowhere.returncode == 2 and "there is no Ray cluster at 127.0.0.1:1" in nowhere.stderr
    source.write_text("")
    empty = tokenised(tmp_path / "other", source, "--ray", "127.0.0.1:1")
    assert empty.returncode == 2 and "there is no text" in empty.stderr
