"""The controller of a home: announced, recognised, and not mistaken for one that is dead."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from keepstep.core.errors import TimedOut
from keepstep.core.home import (
    Home,
    Running,
    announce,
    find_home,
    lives,
    running_controller,
    start_ticks,
    starting,
    withdraw,
)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(path=tmp_path / "home").make()


def myself(**changes: object) -> Running:
    ticks = start_ticks(os.getpid())
    assert ticks is not None
    values = {"url": "http://h", "pid": os.getpid(), "start_ticks": ticks, "token": "t", "term": 3, **changes}
    return Running(**values)  # type: ignore[arg-type]


def test_where() -> None:
    assert find_home({"KEEPSTEP_HOME": "/a/b"}).path == Path("/a/b")
    assert find_home({"XDG_STATE_HOME": "/s"}).path == Path("/s/keepstep")
    assert find_home({"XDG_STATE_HOME": "not/absolute"}).path == Path("~/.local/state/keepstep").expanduser()
    assert find_home({}).path == Path("~/.local/state/keepstep").expanduser()


def test_what_is_announced_is_found_until_it_is_withdrawn(home: Home) -> None:
    assert running_controller(home) is None
    announce(home, myself())
    assert running_controller(home) == myself()
    assert stat.S_IMODE(home.controller_file.stat().st_mode) == 0o600
    withdraw(home)
    assert running_controller(home) is None


def test_a_dead_one_is_recognised(home: Home) -> None:
    with subprocess.Popen([sys.executable, "-c", "pass"]) as child:
        ticks = start_ticks(child.pid)
    announce(home, myself(pid=child.pid, start_ticks=ticks or 1))
    assert running_controller(home) is None


def test_a_pid_that_was_used_again_is_another_process(home: Home) -> None:
    announce(home, myself(start_ticks=1))
    assert running_controller(home) is None


def test_somebody_elses_announcement_is_not_withdrawn(home: Home) -> None:
    announce(home, myself(pid=os.getppid(), start_ticks=start_ticks(os.getppid())))
    withdraw(home)
    assert running_controller(home) is not None


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", json.dumps({"url": "u", "pid": "x"})])
def test_a_broken_file_is_no_controller(home: Home, text: str) -> None:
    home.controller_file.write_text(text)
    assert running_controller(home) is None


def test_a_zombie_does_not_live() -> None:
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert start_ticks(child.pid) is None
    assert not lives(child.pid, 1)
    child.wait()


def test_only_one_starts_at_a_time(home: Home) -> None:
    refused = pytest.raises(TimedOut, match="starting or stopping")
    with starting(home, within_s=1.0), refused, starting(home, within_s=0.1):
        pass
    with starting(home, within_s=1.0):
        pass
