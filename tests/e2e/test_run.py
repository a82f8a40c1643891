"""A user's DDP script under `keepstep run`, unchanged, with its own checkpoint."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from keepstep.cli import service
from keepstep.core.home import Home

SCRIPT = Path(__file__).parent / "scripts" / "ddp.py"


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    home = Home(path=tmp_path / "home")
    yield home
    service.stop(home, force=True)


def run(home: Home, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    folder.mkdir()
    command = [sys.executable, "-m", "keepstep.cli.main", "run", "--nproc", "2", str(SCRIPT)]
    return subprocess.run(
        [*command, "--checkpoint", str(folder / "model.pt"), *arguments],
        env={**os.environ, "KEEPSTEP_HOME": str(home.path)},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


@pytest.mark.timeout(900)
def test_a_kill_is_recovered_from_the_scripts_own_checkpoint(home: Home, tmp_path: Path) -> None:
    undisturbed = run(home, tmp_path / "undisturbed", "--steps", "30")
    assert undisturbed.returncode == 0, undisturbed.stderr
    killed = run(home, tmp_path / "killed", "--steps", "30", "--kill-at", "12")
    assert killed.returncode == 0, killed.stderr
    assert "started at 0, done at 30" in undisturbed.stdout
    assert "started at 10, done at 30" in killed.stdout
    weights = [re.search(r"weights (\S+)", done.stdout) for done in (undisturbed, killed)]
    assert weights[0] and weights[1]
    assert weights[0][1] == weights[1][1], "the killed run trained something else"
    assert "rank 1" in killed.stderr, "who was killed is said"


def test_a_script_that_fails_gives_its_own_code_at_once(home: Home, tmp_path: Path) -> None:
    done = run(home, tmp_path / "fails", "--steps", "nonsense")
    assert done.returncode == 2, done.stderr
    assert "invalid int value: 'nonsense'" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
