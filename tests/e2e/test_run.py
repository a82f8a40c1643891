"""A user's DDP script under `keepstep run`, unchanged, with its own checkpoint."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hosts import missing
from keepstep.cli import service
from keepstep.core.home import Home

SCRIPT = Path(__file__).parent / "scripts" / "ddp.py"


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    home = Home(path=tmp_path / "home")
    yield home
    service.stop(home, force=True)


def run(
    home: Home, folder: Path, *arguments: str, within: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    folder.mkdir()
    command = [sys.executable, "-m", "keepstep.cli.main", "run", "--nproc", "2", str(SCRIPT)]
    return subprocess.run(
        [*within, *command, "--checkpoint", str(folder / "model.pt"), *arguments],
        env={**os.environ, "KEEPSTEP_HOME": str(home.path)},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def little_shm() -> tuple[str, ...]:
    """Before a command: it has 64 kB of /dev/shm, if that can be had. Nothing of ours needs it."""
    if missing() and "CI" not in os.environ:
        return ()
    mount = "mount -t tmpfs -o size=64k little /dev/shm"
    return "unshare", "--mount", "sh", "-c", f'{mount} && exec "$0" "$@"'


@pytest.mark.timeout(900)
def test_a_kill_is_recovered_from_the_scripts_own_checkpoint(home: Home, tmp_path: Path) -> None:
    undisturbed = run(home, tmp_path / "undisturbed", "--steps", "30")
    assert undisturbed.returncode == 0, undisturbed.stderr
    killed = run(home, tmp_path / "killed", "--steps", "30", "--kill-at", "12", within=little_shm())
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


WAITS = """
import os, time
open(f"pid-{os.environ['RANK']}", "w").write(str(os.getpid()))
time.sleep(600)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGHUP])
def test_when_its_terminal_goes_its_ranks_go(home: Home, tmp_path: Path, how: signal.Signals) -> None:
    (tmp_path / "waits.py").write_text(WAITS)
    command = [sys.executable, "-m", "keepstep.cli.main", "run", "--nproc", "2", "--no-warm", "waits.py"]
    env = {**os.environ, "KEEPSTEP_HOME": str(home.path)}
    with (tmp_path / "said").open("wb") as said:
        shell = subprocess.Popen(command, env=env, cwd=tmp_path, stdout=said, stderr=said)
    try:
        files = [tmp_path / f"pid-{rank}" for rank in (0, 1)]
        until(lambda: all(file.exists() and file.read_text() for file in files), shell)
        pids = [int(file.read_text()) for file in files]
        shell.send_signal(how)
        shell.wait(60)
        until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))
    finally:
        shell.kill()
        shell.wait()


def until(condition: Callable[[], bool], running: subprocess.Popen[bytes] | None = None) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert running is None or running.poll() is None, "it ended before"
        assert time.monotonic() < deadline
        time.sleep(0.02)
