"""The demo keeps what it promises, and leaves nothing behind, not even when it is interrupted."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from keepstep.agent.rank import processes

KEEPSTEP = str(Path(sys.executable).with_name("keepstep"))


def begin(folder: Path, *options: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [KEEPSTEP, "demo", "--steps", "40", *options], env={**os.environ, "TMPDIR": str(folder)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def left_behind(folder: Path) -> list[str]:
    """What still names the demo's folder, and what is still in it."""
    found = []
    for pid in processes.table():
        try:
            line = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        found += [f"{pid}: {line!r}"] if str(folder).encode() in line else []
    return found + [str(path) for path in folder.glob("keepstep-demo-*")]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_fault_is_recovered_from_and_the_curve_is_the_same(tmp_path: Path) -> None:
    demo = begin(tmp_path, "--json")
    out, err = demo.communicate(timeout=380)
    assert demo.returncode == 0, out + err
    told = json.loads(out.splitlines()[-1])
    figures = told["figures"]
    assert told["bench"] == "demo"
    assert (figures["injected"], figures["recovered"]) == (3, 3)
    assert figures["loss_max_abs_difference"] == 0.0
    assert figures["ranks_pss_max_bytes"] > 0
    assert left_behind(tmp_path) == []


@pytest.mark.timeout(200)
def test_an_interrupted_demo_cleans_up(tmp_path: Path) -> None:
    demo = begin(tmp_path)
    assert demo.stdout is not None
    assert demo.stdout.readline().startswith("✓ controller up")
    demo.send_signal(signal.SIGINT)
    demo.communicate(timeout=120)
    assert demo.returncode == 130
    assert left_behind(tmp_path) == []
