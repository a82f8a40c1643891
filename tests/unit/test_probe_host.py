"""Host, network and storage: from what /proc and /sys say to what is not well."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from keepstep.agent.probes.host import source as host
from keepstep.agent.probes.host.evolution import Evolution as Host
from keepstep.agent.probes.host.source import Mount, Observed, Space
from keepstep.agent.probes.network import source as network
from keepstep.agent.probes.network.evolution import Evolution as Network
from keepstep.agent.probes.network.source import Interface, Port
from keepstep.agent.probes.rates import Rate
from keepstep.agent.probes.standing import Standing, check
from keepstep.agent.probes.storage import evolution as storage
from keepstep.agent.probes.storage.evolution import Answer
from keepstep.agent.probes.storage.source import Trials
from keepstep.agent.probes.storage.thresholds import Thresholds
from keepstep.core.clock import ManualClock, SystemClock
from keepstep.core.health import CHECKS, Level
from keepstep.wire.health import Check

GIB = 1 << 30
WELL = Observed(
    at=0.0, memory_total=1000 * GIB, memory_available=500 * GIB, load_15=10.0, cpus=100, descriptors=1000,
    descriptors_max=1 << 20, space={"/": Space(total=500 * GIB, free=100 * GIB)},
    shm=Space(total=500 * GIB, free=400 * GIB),
    mounts=(Mount(point="/", kind="ext4", device="/dev/sda1", writable=True),),
)  # fmt: skip


def levels(checks: tuple[Check, ...]) -> dict[str, str]:
    assert all(each.name in CHECKS for each in checks)
    return {each.name: each.level for each in checks}


# ---------------------------------------------------------------- host


@pytest.mark.parametrize(
    ("change", "name", "level"),
    [
        ({}, "", ""),
        ({"memory_available": 20 * GIB}, "host.memory", Level.WARN),
        ({"memory_available": 5 * GIB}, "host.memory", Level.BAD),
        ({"space": {"/": Space(total=500 * GIB, free=4 * GIB)}}, "host.disk_space", Level.WARN),
        ({"space": {"/": Space(total=500 * GIB, free=GIB // 2)}}, "host.disk_space", Level.BAD),
        ({"space": {"/boot": Space(total=GIB, free=GIB // 2)}}, "", ""),
        ({"shm": Space(total=64 * GIB, free=GIB)}, "host.shm", Level.WARN),
        ({"load_15": 900.0}, "host.load", Level.WARN),
        ({"descriptors": 1 << 20}, "host.file_descriptors", Level.BAD),
    ],
)
def test_what_a_host_may_lack(change: dict[str, object], name: str, level: str) -> None:
    assert levels(Host().take(replace(WELL, **change))) == ({name: level} if name else {})  # type: ignore[arg-type]


def test_only_what_was_writable_can_have_become_read_only() -> None:
    image = Mount(point="/opt/image", kind="ext4", device="/dev/loop0", writable=False)
    evolution = Host()
    assert evolution.take(replace(WELL, mounts=(*WELL.mounts, image))) == ()
    broken = tuple(replace(mount, writable=False) for mount in (*WELL.mounts, image))
    (found,) = evolution.take(replace(WELL, at=10.0, mounts=broken))
    assert (found.name, found.component, found.level) == ("host.read_only", "/", Level.BAD)


def test_tasks_are_blocked_for_long_when_every_look_finds_them() -> None:
    evolution = Host()
    for k in range(13):
        found = evolution.take(replace(WELL, at=10.0 * k, blocked=40 if k != 3 else 0))
        assert found == ()
    for k in range(13, 17):
        found = evolution.take(replace(WELL, at=10.0 * k, blocked=40))
    assert levels(found) == {"host.blocked_tasks": Level.WARN}


def test_this_machine_can_be_observed(tmp_path: Path) -> None:
    seen = host.observe((tmp_path, tmp_path / "nowhere"), 5.0)
    assert 0 < seen.memory_available < seen.memory_total and seen.cpus > 0 and seen.descriptors_max > 0
    assert list(seen.space) == [str(tmp_path)] and seen.space[str(tmp_path)].total > 0


def test_mounts_by_the_options_of_the_file_system_itself() -> None:
    text = (
        "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw,errors=remount-ro\n"
        "23 22 8:1 /data /srv ro,relatime - ext4 /dev/sda1 rw\n"  # somebody's read-only bind
        "24 22 8:2 / /home rw,relatime - xfs /dev/sda2 ro,attr2\n"  # the kernel has given it up
        "25 22 0:4 / /proc rw - proc proc rw\n"
        "26 22 0:50 / /nfs rw - nfs4 filer:/x rw\n"
    )
    found = {mount.point: mount.writable for mount in host._mounts(text)}
    assert found == {"/": True, "/home": False}


# ---------------------------------------------------------------- network

UP = Interface(name="eth0", state="up", errors=5, carrier_changes=2, physical=True)
PORT = Port(name="mlx5_0/1", active=True, errors=3, downed=1)


def test_links_go_down_flap_and_err() -> None:
    evolution = Network()
    assert evolution.take([UP], [PORT], "eth0", 0.0) == ()
    found = evolution.take([replace(UP, state="down")], [replace(PORT, active=False)], "eth0", 10.0)
    assert {(c.name, c.component, c.level) for c in found} == {
        ("network.link_down", "eth0", Level.BAD), ("network.link_down", "mlx5_0/1", Level.BAD),
    }  # fmt: skip
    found = evolution.take(
        [replace(UP, errors=500, carrier_changes=12)], [replace(PORT, errors=90, downed=6)], "eth0", 20.0
    )
    assert {(c.name, c.component, c.value) for c in found} == {
        ("network.errors", "eth0", 495), ("network.flaps", "eth0", 5),
        ("network.infiniband", "mlx5_0/1", 87), ("network.flaps", "mlx5_0/1", 5),
    }  # fmt: skip


def test_interfaces_that_never_were_up_or_are_not_real_are_left_alone() -> None:
    evolution = Network()
    spare = Interface(name="eth7", state="down", errors=0, carrier_changes=1, physical=True)
    bridge = Interface(name="docker0", state="down", errors=0, carrier_changes=9, physical=False)
    assert evolution.take([UP, spare, bridge], [], "eth0", 0.0) == ()
    (found,) = evolution.take([replace(bridge, name="bond0")], [], "bond0", 10.0)  # ranks talk over it
    assert found.component == "bond0"


def test_a_buddy_is_unreachable_after_two_tries() -> None:
    evolution = Network()
    assert evolution.reached({"b": "refused"}) == ()
    (found,) = evolution.reached({"b": "refused"})
    assert (found.name, found.component, found.value) == ("network.buddy_unreachable", "b", 2)
    assert evolution.reached({"b": ""}) == () and evolution.reached({"b": "refused"}) == ()


def test_reaching_somebody() -> None:
    async def both() -> tuple[str, str]:
        server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        yes = await network.reaches("127.0.0.1", port)
        server.close()
        await server.wait_closed()
        return yes, await network.reaches("127.0.0.1", port)

    yes, no = asyncio.run(both())
    assert yes == "" and "refused" in no.lower()


def test_links_and_ports_are_read_from_sys(tmp_path: Path) -> None:
    files = {
        "class/net/eth0/operstate": "up\n", "class/net/eth0/carrier_changes": "3\n",
        "class/net/eth0/statistics/rx_errors": "4\n", "class/net/eth0/statistics/tx_errors": "1\n",
        "class/net/eth0/device/vendor": "0x15b3\n", "class/net/lo/operstate": "unknown\n",
        "class/infiniband/mlx5_0/ports/1/state": "4: ACTIVE\n",
        "class/infiniband/mlx5_0/ports/1/counters/symbol_error": "7\n",
        "class/infiniband/mlx5_0/ports/1/counters/link_downed": "2\n",
    }  # fmt: skip
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    (tmp_path / "class/net/bonding_masters").write_text("")
    assert network.interfaces(tmp_path) == (
        Interface(name="eth0", state="up", errors=5, carrier_changes=3, physical=True),
        Interface(name="lo", state="unknown", errors=0, carrier_changes=0, physical=False),
    )
    assert network.ports(tmp_path) == (Port(name="mlx5_0/1", active=True, errors=7, downed=2),)
    assert any(link.name == "lo" for link in network.interfaces())


# ---------------------------------------------------------------- storage

QUICK = Thresholds(first_s=0.0, every_s=0.2, size=1 << 16, hang_s=1.0)


def turns(trials: Trials, folder: Path, until: Callable[[], bool], within_s: float = 30.0) -> None:
    deadline = time.monotonic() + within_s
    while not until():
        assert time.monotonic() < deadline, trials.checks()
        trials.turn([str(folder)])
        time.sleep(0.02)


def test_a_folder_is_tried_and_nothing_is_left_in_it(tmp_path: Path) -> None:
    trials = Trials(SystemClock(), QUICK)
    try:
        turns(trials, tmp_path, lambda: trials._folders.get(str(tmp_path), None) is not None)
        turns(trials, tmp_path, lambda: trials._folders[str(tmp_path)].answer is not None)
        answer = trials._folders[str(tmp_path)].answer
        assert answer is not None and answer.error == "" and answer.total and 0 < answer.took_s < 30
        assert [each for each in trials.checks() if each.name.startswith("storage.")] == []
        assert list(tmp_path.iterdir()) == []
        turns(trials, tmp_path / "not made yet", lambda: len(trials._folders) == 1)
    finally:
        trials.end()


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    trials = Trials(SystemClock(), QUICK)
    try:
        turns(trials, tmp_path / "file", lambda: bool(trials.checks()))
        (found,) = trials.checks()
        assert (found.name, found.component) == ("storage.failed", str(tmp_path / "file"))
        assert "Not a directory" in found.text
    finally:
        trials.end()


@contextmanager
def frozen_file_system(folder: Path) -> Iterator[Callable[[], object]]:
    """An ext4 on a loop device whose writers hang in the kernel; call what it yields to thaw it.

    A guard thaws and unmounts it also when this process is killed.
    """
    if os.geteuid() != 0:
        pytest.skip("mounting a file system that can be frozen needs root")
    image, mount = folder / "image", folder / "mount"
    mount.mkdir()
    with image.open("wb") as file:
        file.truncate(16 << 20)
    made = [["mkfs.ext4", "-q", str(image)], ["mount", "-o", "loop", str(image), str(mount)]]
    try:
        for command in made:
            subprocess.run(command, check=True, capture_output=True, timeout=30)
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"no file system can be made and mounted here: {error}")
    script = f"cat >/dev/null; fsfreeze -u {mount} 2>/dev/null; umount -l {mount}"
    guard = subprocess.Popen(["sh", "-c", script], stdin=subprocess.PIPE, start_new_session=True)
    assert guard.stdin is not None
    try:
        subprocess.run(["fsfreeze", "-f", str(mount)], check=True, timeout=30)
        yield lambda: subprocess.run(["fsfreeze", "-u", str(mount)], check=True, timeout=30)
    finally:
        guard.stdin.close()
        guard.wait(30)


def test_a_file_system_that_hangs_holds_up_nobody(tmp_path: Path) -> None:
    with frozen_file_system(tmp_path) as thaw:
        folder = tmp_path / "mount"
        trials = Trials(SystemClock(), QUICK)
        try:
            turns(trials, folder, lambda: bool(trials.checks()))
            (found,) = trials.checks()
            assert (found.name, found.component, found.level) == (
                "host.file_system_hang", str(folder), Level.BAD,
            )  # fmt: skip
            began = trials._folders[str(folder)].process
            assert began is not None, "it cannot be killed: no second one is started beside it"
            longest = 0.0
            for _ in range(20):
                before = time.monotonic()
                trials.turn([str(folder)])
                longest = max(longest, time.monotonic() - before)
            assert longest < 0.5 and trials._folders[str(folder)].process is began
            thaw()
            turns(trials, folder, lambda: not trials.checks())
        finally:
            trials.end()


def test_trials_end_with_their_agent(tmp_path: Path) -> None:
    """Killed while a trial hangs, the agent takes it along; nothing is left in the folder."""
    trial = Path(storage.__file__).with_name("trial.py")
    parent = f"""
import os, signal, subprocess, sys, time
arguments = [{str(trial)!r}, {str(tmp_path)!r}, str(1 << 28), str(os.getpid())]
trial = subprocess.Popen([sys.executable, "-I", "-S", *arguments])
print(trial.pid, flush=True)
folder, end = f"/proc/{{trial.pid}}/fd", time.monotonic() + 30
def opened():
    try:
        return any({str(tmp_path)!r} in os.readlink(f"{{folder}}/{{name}}") for name in os.listdir(folder))
    except OSError:
        return False
while not opened():
    assert time.monotonic() < end and trial.poll() is None
os.kill(os.getpid(), signal.SIGKILL)
"""
    command = [sys.executable, "-c", parent]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    pid = int(ended.stdout)
    assert ended.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 30
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("answer", "names"),
    [
        (Answer(took_s=0.1, free=100 * GIB, total=1000 * GIB), []),
        (Answer(took_s=9.0, free=100 * GIB, total=1000 * GIB), ["storage.slow"]),
        (Answer(stage="fsync", error="Input/output error"), ["storage.failed"]),
        (Answer(took_s=0.1, free=5 * GIB, total=1000 * GIB), ["host.disk_space"]),
        (Answer(hangs_s=31.0), ["host.file_system_hang"]),
        (Answer(absent=True), []),
    ],
)
def test_what_a_trial_tells(answer: Answer, names: list[str]) -> None:
    found = list(storage.checks("/ckpt", answer, Thresholds()))
    assert [each.name for each in found] == names and all(each.component == "/ckpt" for each in found)


# ---------------------------------------------------------------- standing and rates


def test_checks_say_since_when_they_stand() -> None:
    standing = Standing()
    warm = check("host.load", "", Level.WARN, 9.0, 8.0, "x" * 1000)
    assert standing.update([warm], 10.0) and standing.now[0].for_s == 0.0 and len(standing.now[0].text) == 300
    assert not standing.update([warm], 15.0) and standing.now[0].for_s == 5.0
    worse = check("host.load", "", Level.BAD, 90.0, 8.0, "")
    assert standing.update([worse], 16.0) and standing.now[0].for_s == 6.0
    assert standing.update([], 17.0) and not standing.now
    assert standing.update([warm], 18.0) and standing.now[0].for_s == 0.0


def test_the_worst_come_first_and_there_is_an_end_to_them() -> None:
    standing = Standing()
    many = [check("gpu.throttled", f"GPU-{k:04}", Level.WARN, 1, None, "") for k in range(500)]
    standing.update([*many, check("gpu.lost", "GPU-z", Level.BAD, 15, None, "")], ManualClock().now)
    assert standing.now[0].name == "gpu.lost" and len(standing.now) == 128


def test_rates_forget_what_is_older_than_their_window() -> None:
    rate = Rate(60.0)
    assert rate.per_s is None
    values = [rate.take(10.0 * k, 100.0 if k < 5 else 400.0) for k in range(20)]
    assert max(values) == 300.0 and values[-1] == 0.0 and rate.per_s == 0.0
    assert [rate.take(200.0 + k, value) for k, value in enumerate((400.0, 0.0, 50.0))] == [0.0, 0.0, 50.0]
