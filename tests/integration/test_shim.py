"""One attempt on one node, with real processes that are really killed. Cold: no test here loads torch."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from keepstep.agent import shimlink
from keepstep.agent.rank import processes
from keepstep.agent.shimlink import Ending, Rotate, Shim
from keepstep.core.errors import Refused, Unreachable
from shims import (
    ENV,
    WITHIN_S,
    alive,
    launch_file,
    launched,
    left_of,
    run,
    said,
    script,
    shared_memory,
    until,
)

SLEEP = "import time\nprint('up', flush=True)\ntime.sleep(600)\n"


def _ended(directory: Path, shim: Shim) -> Ending:
    """Told, written, and true."""
    ending = shimlink.read_result(directory)
    assert ending is not None
    assert ending.ranks == shim.status.ranks
    assert not (directory / "shim.sock").exists()
    return ending


@pytest.mark.parametrize(
    ("text", "code", "signalled"),
    [
        ("", 0, None),
        ("raise SystemExit(3)", 3, None),
        ("import os; os._exit(255)", 255, None),
        ("import os; os.abort()", None, "SIGABRT"),
        ("import os; os.kill(os.getpid(), 9)", None, "SIGKILL"),
        ("import os; os.kill(os.getpid(), 15)", None, "SIGTERM"),
        ("import os; os.kill(os.getpid(), 40)", None, "SIG40"),
        ("import ctypes; ctypes.string_at(0)", None, "SIGSEGV"),
    ],
)
def test_exit_codes_and_signals_are_exact(
    tmp_path: Path, text: str, code: int | None, signalled: str | None
) -> None:
    ending = asyncio.run(run(tmp_path / "1", launch_file(tmp_path, script(tmp_path, text))))
    (rank,) = ending.ranks
    assert (rank.state, rank.exit_code, rank.signal, rank.order) == ("exited", code, signalled, 1)
    assert not ending.shim_died


def test_the_first_failure_in_time_is_told_from_those_that_followed(tmp_path: Path) -> None:
    text = """
import os, time
rank = int(os.environ["RANK"])
with open(f"draft-{rank}", "w") as file:
    file.write(str(os.getpid()))
os.rename(f"draft-{rank}", f"pid-{rank}")
if rank != 2:  # 0 follows 2, 1 follows 0
    before = f"pid-{2 if rank == 0 else 0}"
    while not os.path.exists(before) or os.path.exists(f"/proc/{open(before).read()}"):
        time.sleep(0.002)
os._exit(10 + rank)
"""

    async def check() -> None:
        async with launched(tmp_path / "1", launch_file(tmp_path, script(tmp_path, text), ranks=3)) as shim:
            ending = await shim.ended(timeout_s=WITHIN_S)
            assert [rank.exit_code for rank in ending.ranks] == [10, 11, 12]
            assert [rank.order for rank in ending.ranks] == [2, 3, 1]
            times = [rank.exited_ns for rank in sorted(ending.ranks, key=lambda rank: rank.order or 0)]
            assert times == sorted(times, key=lambda at_ns: at_ns or 0)
            assert ending == _ended(tmp_path / "1", shim)

    asyncio.run(check())


def test_ranks_get_their_surroundings_and_nothing_else(tmp_path: Path) -> None:
    text = """
import os, resource, stat, sys
print(sorted(os.environ.items()))
print(os.getcwd(), oct(os.umask(0)), resource.getrlimit(resource.RLIMIT_NOFILE)[0])
print(sorted(int(fd) for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")))
print(os.readlink("/proc/self/fd/0"), os.environ["KEEPSTEP_BEACON_FD"])
print([line for line in open("/proc/self/status") if line.startswith(("SigBlk", "SigIgn"))])
"""
    file = launch_file(
        tmp_path, script(tmp_path, text), env={"PATH": ENV["PATH"], "SECRET": "s3cret"}, umask=0o27,
        limits={"nofile": 77, "core": 0},
    )  # fmt: skip
    asyncio.run(run(tmp_path / "1", file))
    environment, place, descriptors, stdin, masks = said(tmp_path / "1").splitlines()
    expected = {
        "PATH": ENV["PATH"],
        "SECRET": "s3cret",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
        "TORCHELASTIC_USE_AGENT_STORE": "False",
        "KEEPSTEP_ATTEMPT": file.marker,
        "LC_CTYPE": "C.UTF-8",
    }  # fmt: skip  LC_CTYPE: the interpreter's own
    seen = dict(eval(environment))  # noqa: S307 - printed by the script above
    beacon = seen.pop("KEEPSTEP_BEACON_FD")
    assert seen.pop("KEEPSTEP_RANK_PID").isdecimal()
    assert seen == expected
    assert place == f"{tmp_path} 0o27 77"
    assert descriptors == f"[0, 1, 2, {beacon}]"
    assert stdin == f"/dev/null {beacon}"
    assert "SigBlk:\\t0000000000000000" in masks
    for path in (tmp_path / "1").iterdir():
        assert path.name.startswith("rank-") or b"s3cret" not in path.read_bytes(), path


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (("sh", "-c", "echo $RANK of $WORLD_SIZE; exit 5"), 5, "0 of 1\n"),
        (("keepstep-no-such-command",), 127, "No such file or directory"),
        (("./plain",), 126, "Permission denied"),
    ],
)
def test_native_commands(tmp_path: Path, argv: tuple[str, ...], code: int, words: str) -> None:
    (tmp_path / "plain").touch(mode=0o600)
    file = launch_file(tmp_path, argv, python=False, interpreter=(), store=True)
    ending = asyncio.run(run(tmp_path / "1", file))
    assert ending.ranks[0].exit_code == code
    assert words in said(tmp_path / "1")


def test_without_torch_a_free_port_is_named(tmp_path: Path) -> None:
    async def check(interpreter: tuple[str, ...]) -> None:
        name = str(len(interpreter))
        file = launch_file(tmp_path, ("true",), python=False, interpreter=interpreter, store=True)
        async with launched(tmp_path / name, file, go=False) as shim:
            assert shim.status.phase == "prepared"
            assert shim.status.master_port
            assert not shim.status.store
            assert "no store" in shim.status.note

    asyncio.run(check(()))
    asyncio.run(check((sys.executable, "-I", "-S")))


def test_a_missing_folder_is_the_ranks_failure(tmp_path: Path) -> None:
    file = launch_file(tmp_path, ("true",), python=False, cwd=str(tmp_path / "gone"))
    ending = asyncio.run(run(tmp_path / "1", file))
    assert ending.ranks[0].exit_code == 127
    assert "gone" in said(tmp_path / "1")


def test_when_the_shim_is_killed_its_ranks_die_and_what_left_them_is_swept(tmp_path: Path) -> None:
    text = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        print("escaped", os.getpid(), flush=True)
        time.sleep(600)
    os._exit(0)
os.wait()
time.sleep(600)
"""

    async def check() -> None:
        directory = tmp_path / "1"
        file = launch_file(tmp_path, script(tmp_path, text), ranks=2)
        async with launched(directory, file) as shim:
            escaped = [
                int(until(lambda rank=rank: said(directory, rank)).split()[1])  # type: ignore[misc]
                for rank in (0, 1)
            ]
            os.kill(shim.pid, signal.SIGKILL)
            ending = await shim.ended(timeout_s=WITHIN_S)
            assert ending.shim_died
            assert ending.swept >= 2
            assert [rank.state for rank in ending.ranks] == ["lost", "lost"]
            assert left_of(file.marker) == []
            assert not any(map(alive, escaped))
            with pytest.raises(Unreachable):
                await shim.end()
        assert isinstance(await shimlink.adopt(directory, file.marker), Ending)

    asyncio.run(check())


def test_a_grandchild_that_hides_dies_with_the_attempt(tmp_path: Path) -> None:
    """Another session, another parent, an empty environment: the shim is still its ancestor."""
    text = """
import os, sys
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        hidden = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
        os.execve(sys.executable, ["python", "-c", hidden], {})
    os._exit(0)
os.wait()
if os.environ["RANK"] == "0":
    sys.exit(7)
import time
time.sleep(600)
"""

    async def check() -> None:
        directory = tmp_path / "1"
        async with launched(directory, launch_file(tmp_path, script(tmp_path, text), ranks=2)) as shim:
            hidden = [int(until(lambda rank=rank: said(directory, rank))) for rank in (0, 1)]  # type: ignore[misc]
            status = await shim.wait_for(lambda status: status.ranks[0].exit_code == 7, timeout_s=WITHIN_S)
            assert (
                status.ranks[1].state == "running"
            )  # one failure does not end the others: the controller says
            assert all(map(alive, hidden))
            await shim.end("KILL")
            ending = await shim.ended(timeout_s=WITHIN_S)
            assert ending.swept >= 3
            assert not any(map(alive, hidden))

    asyncio.run(check())


def test_what_outlives_all_ranks_is_ended(tmp_path: Path) -> None:
    text = "import os, time\nif os.fork() == 0:\n    print(os.getpid(), flush=True)\n    time.sleep(600)\n"
    ending = asyncio.run(run(tmp_path / "1", launch_file(tmp_path, script(tmp_path, text))))
    assert ending.ranks[0].exit_code == 0
    assert not alive(int(said(tmp_path / "1")))


def test_a_stopped_rank_is_killed(tmp_path: Path) -> None:
    async def check(how: str) -> None:
        async with launched(tmp_path / how, launch_file(tmp_path, script(tmp_path, SLEEP), ranks=2)) as shim:
            until(lambda: said(tmp_path / how) and said(tmp_path / how, 1))
            await shim.signal("STOP", ranks=[1])
            stopped = shim.status.ranks[1].pid
            assert stopped
            until(lambda: (found := processes.read(stopped)) and found.state == "T")
            await shim.end(how, grace_s=WITHIN_S)
            ending = await shim.ended(timeout_s=WITHIN_S)
            assert [rank.signal for rank in ending.ranks] == [f"SIG{how}"] * 2

    asyncio.run(check("KILL"))
    asyncio.run(check("TERM"))


def test_grace_is_given_and_then_ends(tmp_path: Path) -> None:
    text = """
import os, signal, sys, time
def leave(*_):
    if os.environ["RANK"] == "0":
        print("saved", flush=True)
        sys.exit(0)
signal.signal(signal.SIGTERM, leave)
print("up", flush=True)
while True:
    time.sleep(600)
"""

    async def check() -> None:
        directory = tmp_path / "1"
        async with launched(directory, launch_file(tmp_path, script(tmp_path, text), ranks=2)) as shim:
            until(lambda: said(directory) and said(directory, 1))
            status = await shim.end("TERM", grace_s=600)
            assert status.phase == "ending"
            await shim.wait_for(lambda status: status.ranks[0].exit_code == 0, timeout_s=WITHIN_S)
            assert shim.status.ranks[1].state == "running"
            await shim.end("TERM", grace_s=0.05)  # a shorter grace counts
            ending = await shim.ended(timeout_s=WITHIN_S)
            assert ending.ranks[1].signal == "SIGKILL"
            assert said(directory) == "up\nsaved\n"

    asyncio.run(check())


def test_a_term_to_the_shim_ends_the_ranks_with_grace(tmp_path: Path) -> None:
    async def check() -> None:
        async with launched(tmp_path / "1", launch_file(tmp_path, script(tmp_path, SLEEP))) as shim:
            until(lambda: said(tmp_path / "1"))
            os.kill(shim.pid, signal.SIGTERM)
            ending = await shim.ended(timeout_s=WITHIN_S)
            assert ending.ranks[0].signal == "SIGTERM"
            assert not ending.shim_died

    asyncio.run(check())


_AGENT = """
import asyncio, sys
from pathlib import Path
from keepstep.agent import shimlink
from shims import launch_file, script
folder = Path(sys.argv[1])
text = "import os, time\\nwhile not os.path.exists('go'): time.sleep(0.01)\\nprint('left'); exit(9)"
async def main():
    assert shimlink.claim(folder / "1")
    shim = await shimlink.launch(folder / "1", launch_file(folder, script(folder, text)))
    await shim.wait_for(lambda status: status.phase == "prepared", timeout_s=60)
    await shim.go("127.0.0.1", 1)
    print(shim.marker, shim.pid, flush=True)
    await shim.ended()
asyncio.run(main())
"""


def test_an_agent_dies_and_another_adopts(tmp_path: Path) -> None:
    path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    words = [sys.executable, "-c", _AGENT, str(tmp_path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env={**ENV, "PYTHONPATH": path}) as agent:
        assert agent.stdout is not None
        marker, pid = agent.stdout.readline().split()
        agent.kill()

    async def check() -> None:
        first = await shimlink.adopt(tmp_path / "1", marker)
        assert isinstance(first, Shim)
        assert first.pid == int(pid)
        assert first.status.phase == "running"
        again = await first.go("127.0.0.1", 2)  # a repeated command is answered with what happened
        assert again.ranks == first.status.ranks
        newest = await shimlink.adopt(tmp_path / "1", marker)
        assert isinstance(newest, Shim)
        (tmp_path / "go").touch()
        assert (await newest.ended(timeout_s=WITHIN_S)).ranks[0].exit_code == 9
        assert (await first.ended(timeout_s=WITHIN_S)).ranks[0].exit_code == 9
        assert newest.status.phase == "dead"
        first.close()
        newest.close()
        later = await shimlink.adopt(tmp_path / "1", marker)
        assert isinstance(later, Ending)
        assert later.ranks[0].exit_code == 9

    asyncio.run(check())
    assert said(tmp_path / "1") == "left\n"


def test_an_attempt_is_claimed_once(tmp_path: Path) -> None:
    assert shimlink.claim(tmp_path / "jobs" / "j" / "1")
    assert not shimlink.claim(tmp_path / "jobs" / "j" / "1")


def test_a_claimed_directory_without_a_shim_is_an_ending(tmp_path: Path) -> None:
    assert shimlink.claim(tmp_path / "1")
    ending = asyncio.run(shimlink.adopt(tmp_path / "1", "j/1/n"))
    assert isinstance(ending, Ending)
    assert ending.shim_died


def test_ranks_meet_at_a_cold_store(tmp_path: Path) -> None:
    argv = script(
        tmp_path,
        f"""
import os, sys
sys.path.insert(0, {str(Path(processes.__file__).parents[3])!r})
from keepstep.agent.rank.rendezvous import tcp_store
store = tcp_store()(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
store.set(os.environ["RANK"], "here")
print(store.get("0"), store.get("1"))  # waits for the other
""",
    )
    file = launch_file(tmp_path, argv, ranks=2, store=True)

    async def check() -> Ending:
        async with launched(tmp_path / "1", file) as shim:
            assert shim.status.store, shim.status.note
            return await shim.ended(timeout_s=WITHIN_S)

    ending = asyncio.run(check())
    assert [rank.exit_code for rank in ending.ranks] == [0, 0], said(tmp_path / "1")
    assert [said(tmp_path / "1", rank) for rank in (0, 1)] == ["b'here' b'here'\n"] * 2


def test_a_shim_that_cannot_start_says_why(tmp_path: Path) -> None:
    file = launch_file(tmp_path, ("true",), limits={}, rotate=Rotate(bytes=1, files=1), store=True)

    async def check() -> None:
        assert shimlink.claim(tmp_path / "1")
        with pytest.raises(Unreachable, match="ended before"):
            await shimlink.launch(tmp_path / "1", file, timeout_s=WITHIN_S)

    object.__setattr__(file, "bind_address", "no-such-host.invalid")
    asyncio.run(check())
    assert "gaierror" in (tmp_path / "1" / "shim.log").read_text()


def test_a_prepared_attempt_ends_without_having_started(tmp_path: Path) -> None:
    async def check() -> None:
        file = launch_file(tmp_path, script(tmp_path, SLEEP))
        async with launched(tmp_path / "1", file, go=False) as shim:
            with pytest.raises(Refused, match="signal"):
                await shim.signal("NO_SUCH_SIGNAL")
            await shim.end("TERM", grace_s=600)
            ending = await shim.ended(timeout_s=WITHIN_S)
            assert [rank.state for rank in ending.ranks] == ["waiting"]

    asyncio.run(check())


def test_a_flood_of_output_stalls_nobody_and_loses_no_last_line(tmp_path: Path) -> None:
    text = """
import os, sys, time
if os.environ["RANK"] == "0":
    while not os.path.exists("enough"):
        sys.stdout.write("flood " * 2000 + "\\n")
    print("the last line", end="")
else:
    for number in range(20):
        print(number, flush=True)
    while not os.path.exists("enough"):
        time.sleep(0.005)
"""

    async def check() -> None:
        directory = tmp_path / "1"
        file = launch_file(tmp_path, script(tmp_path, text), ranks=2, rotate=Rotate(bytes=1 << 20, files=3))
        async with launched(directory, file) as shim:
            until(lambda: said(directory, 1).count("\n") == 20)
            until((directory / "rank-0.log.2").exists)
            await shim.refresh()  # it answers
            (tmp_path / "enough").touch()
            ending = await shim.ended(timeout_s=WITHIN_S)
            assert [rank.exit_code for rank in ending.ranks] == [0, 0]
        files = sorted(directory.glob("rank-0.log*"))
        assert [file.name for file in files] == ["rank-0.log", "rank-0.log.1", "rank-0.log.2"]
        assert all(file.stat().st_size <= 1 << 20 for file in files)
        assert said(directory).endswith("\nthe last line")

    asyncio.run(check())


def test_a_beacon_is_read_while_the_rank_lives_and_afterwards(tmp_path: Path) -> None:
    text = f"""
import mmap, os, sys
sys.path[:0] = {sys.path!r}
from keepstep.core.beacon import PAGE, BeaconWriter, Record
page = mmap.mmap(int(os.environ["KEEPSTEP_BEACON_FD"]), PAGE)
rank = int(os.environ["RANK"])
BeaconWriter(page, rank=rank, world_size=2).write(Record(step=40 + rank))
"""

    async def check() -> None:
        file = launch_file(tmp_path, script(tmp_path, text), ranks=2)
        async with launched(tmp_path / "1", file) as shim:
            await shim.ended(timeout_s=WITHIN_S)
            steps = {rank: record.step for rank, beacon in shim.beacons.items() if (record := beacon.read())}
            assert steps == {0: 40, 1: 41}

    asyncio.run(check())


def test_a_long_path(tmp_path: Path) -> None:
    directory = tmp_path / ("d" * 120) / ("e" * 120)
    ending = asyncio.run(run(directory, launch_file(tmp_path, script(tmp_path, "print('here')"))))
    assert ending.ranks[0].exit_code == 0
    assert said(directory) == "here\n"


_SHARED = """
import multiprocessing, os, sys, time
from multiprocessing import shared_memory

def work(lock, name):
    with lock:
        memory = shared_memory.SharedMemory(name)
    print("working", flush=True)
    time.sleep(600)

if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    lock, memory = context.Lock(), shared_memory.SharedMemory(create=True, size=4096)
    for _ in range(2):
        context.Process(target=work, args=(lock, memory.name)).start()
    time.sleep(600)
"""


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_workers_and_their_semaphores_leave_nothing(tmp_path: Path, method: str) -> None:
    before = shared_memory()

    async def check() -> None:
        directory = tmp_path / "1"
        file = launch_file(tmp_path, (*script(tmp_path, _SHARED), method))
        async with launched(directory, file) as shim:
            until(lambda: said(directory).count("working") == 2)
            assert any(name.startswith("psm_") for name in shared_memory() - before)
            rank = shim.status.ranks[0].pid
            assert rank
            os.kill(rank, signal.SIGKILL)  # its workers would live on for seconds
            ending = await shim.ended(timeout_s=WITHIN_S)
            assert ending.ranks[0].signal == "SIGKILL"
            assert {name for name in shared_memory() if name.startswith(("psm_", "sem.mp-"))} <= before

    asyncio.run(check())


def test_a_delegated_cgroup_is_used_and_removed(tmp_path: Path) -> None:
    root = Path("/sys/fs/cgroup/unified" if Path("/sys/fs/cgroup/unified").is_dir() else "/sys/fs/cgroup")
    folder = root / f"keepstep-test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("no writable cgroup v2 folder")
    try:
        if not (folder / "cgroup.kill").exists():
            pytest.skip("this kernel's cgroups cannot be killed")
        file = launch_file(tmp_path, script(tmp_path, SLEEP), cgroup=str(folder))

        async def check() -> None:
            async with launched(tmp_path / "1", file) as shim:
                until(lambda: said(tmp_path / "1"))
                (mine,) = [path for path in folder.iterdir() if path.is_dir()]
                assert (mine / "cgroup.procs").read_text().split() == [str(shim.status.ranks[0].pid)]

        asyncio.run(check())
        assert not [path for path in folder.iterdir() if path.is_dir()]
    finally:
        folder.rmdir()
