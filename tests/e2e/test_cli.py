"""The command line as a user has it: the installed program, a controller of its own, signals from outside."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from keepstep.agent.rank import processes
from keepstep.cli import service
from keepstep.core.home import Home, running_controller

KEEPSTEP = str(Path(sys.executable).with_name("keepstep"))
WITHIN_S = 100.0

EXITS = """
import os, sys
env = os.environ
print("rank", env["RANK"], "of", env["WORLD_SIZE"], "in", os.getcwd(), env["OF_THE_SHELL"])
sys.exit(int(sys.argv[1]) if os.environ["RANK"] == "1" else 0)
"""

LASTS = """
import os, signal, sys, time
def told(number, frame):
    print("told", number, flush=True)
    sys.exit(0)
signal.signal(signal.SIGINT, told)
print("pid", os.getpid(), flush=True)
time.sleep(600)
"""


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    home = Home(path=tmp_path / "home")
    yield home
    service.stop(home, force=True)
    left = [pid for pid in processes.table() if str(tmp_path).encode() in command_line(pid)]
    assert not left


@pytest.fixture
def environ(home: Home, tmp_path: Path) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("KEEPSTEP_")}
    return {
        **clean, "KEEPSTEP_HOME": str(home.path), "XDG_CONFIG_HOME": str(tmp_path / "config"),
        "OF_THE_SHELL": "yes",
    }  # fmt: skip


def command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def keepstep(*arguments: str, env: dict[str, str], cwd: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [KEEPSTEP, *arguments],
        env=env,
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        timeout=WITHIN_S,
    )


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WITHIN_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def test_two_ups_at_once_come_to_one_controller(home: Home, environ: dict[str, str], tmp_path: Path) -> None:
    command = [KEEPSTEP, "up", "--nodes", "0", "-o", "json"]
    both = [
        subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        for _ in "ab"
    ]
    told = [json.loads(process.communicate(timeout=WITHIN_S)[0]) for process in both]
    assert told[0]["pid"] == told[1]["pid"]
    assert sorted(answer["fresh"] for answer in told) == [False, True]
    listed = keepstep("list", env=environ, cwd=tmp_path)
    assert (listed.returncode, listed.stdout) == (0, "")
    assert keepstep("status", "nobody", env=environ, cwd=tmp_path).returncode == 3
    assert keepstep("down", env=environ, cwd=tmp_path).returncode == 0
    assert running_controller(home) is None
    assert not home.controller_file.exists()


def test_a_controller_that_was_killed_is_recognised(
    home: Home, environ: dict[str, str], tmp_path: Path
) -> None:
    assert keepstep("up", "--nodes", "0", env=environ, cwd=tmp_path).returncode == 0
    before = running_controller(home)
    assert before is not None
    os.kill(before.pid, signal.SIGKILL)
    until(lambda: running_controller(home) is None, "killed, and still taken for alive")
    again = keepstep("list", env=environ, cwd=tmp_path)
    assert again.returncode == 0
    assert "started a controller on this machine" in again.stderr
    after = running_controller(home)
    assert after is not None
    assert after.term > before.term


def test_run_gives_the_scripts_own_exit_code(home: Home, environ: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "exits.py").write_text(EXITS)
    good = keepstep("run", "--nproc_per_node=2", "--standalone", "exits.py", "0", env=environ, cwd=tmp_path)
    assert good.returncode == 0, good.stderr
    lines = [f"[rank {rank}] rank {rank} of 2 in {tmp_path} yes" for rank in (0, 1)]
    assert sorted(good.stdout.splitlines()) == lines
    bad = keepstep("run", "--nproc", "2", "exits.py", "3", env=environ, cwd=tmp_path)
    assert bad.returncode == 3
    assert "rank 1" in bad.stderr
    assert not list(home.runs.iterdir())


def test_run_of_a_program_that_a_signal_ends(home: Home, environ: dict[str, str], tmp_path: Path) -> None:
    ended = keepstep("run", "--no-python", "sh", "-c", "kill -9 $$", env=environ, cwd=tmp_path)
    assert ended.returncode == 137, ended.stderr
    assert ended.stderr.count("SIGKILL") >= 3, "it was tried again, and given up"


def started(environ: dict[str, str], folder: Path) -> tuple["subprocess.Popen[str]", int]:
    """A run whose rank has begun, and the rank's pid."""
    (folder / "lasts.py").write_text(LASTS)
    running = subprocess.Popen(
        [KEEPSTEP, "run", "--no-warm", "lasts.py"], env=environ, cwd=folder, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert running.stdout is not None
    return running, int(running.stdout.readline().split()[1])


def test_ctrl_c_goes_to_the_ranks(home: Home, environ: dict[str, str], tmp_path: Path) -> None:
    running, rank = started(environ, tmp_path)
    running.send_signal(signal.SIGINT)
    out, _ = running.communicate(timeout=WITHIN_S)
    assert out == "told 2\n"
    assert running.returncode == 130
    assert not Path(f"/proc/{rank}").exists()
    assert not list(home.runs.iterdir())


def test_killing_the_run_ends_its_ranks(home: Home, environ: dict[str, str], tmp_path: Path) -> None:
    running, rank = started(environ, tmp_path)
    running.kill()
    running.communicate(timeout=WITHIN_S)
    until(lambda: not Path(f"/proc/{rank}").exists(), "the rank outlived its terminal")
