"""The standby server and what is forked from it, with torch: start, death, ten attempts in a row."""

import asyncio
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from keepstep.agent import shimlink
from keepstep.agent.rank.marker import carries
from keepstep.agent.rank.preload import Wanted
from keepstep.agent.shimlink import LaunchFile, Shim
from keepstep.agent.standby import StandbyServer, key_of
from keepstep.core.errors import Unreachable
from shims import (
    ENV,
    WITHIN_S,
    alive,
    launch_file,
    launched,
    members,
    run,
    said,
    script,
    shared_memory,
    until,
)

# torch is loaded cold here, beside whatever else the machine does
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
LOAD_S = 300.0

TORCH = ("torch", "torch.distributed", "numpy?", "no_such_module?")

ALL_REDUCE = """
import os, time
import torch
import torch.distributed as dist
dist.init_process_group("gloo")
x = torch.full((3,), float(dist.get_rank() + 1))
dist.all_reduce(x)
print(x.tolist(), time.monotonic_ns())
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandbyServer]:
    folder = tmp_path_factory.mktemp("standby")
    server = StandbyServer(
        folder, interpreter=(sys.executable,), env=ENV, cwd="/", wanted=Wanted(modules=TORCH)
    )
    yield server
    asyncio.run(server.stop())


def _light(folder: Path, *modules: str) -> StandbyServer:
    return StandbyServer(
        folder / "standby", interpreter=(sys.executable,), env=ENV, cwd="/", wanted=Wanted(modules=modules)
    )


def _training(folder: Path, ranks: int, **changes: object) -> LaunchFile:
    return launch_file(folder, script(folder, ALL_REDUCE), ranks=ranks, store=True, **changes)


def test_two_ranks_meet_cold_and_warm(tmp_path: Path, server: StandbyServer) -> None:
    async def check(name: str, warm: bool) -> None:
        file = replace(_training(tmp_path, 2, warm=warm), job=name)
        async with launched(tmp_path / name, file, standby=server) as shim:
            assert shim.status.store
            assert shim.status.warm is warm, shim.status.note
            ending = await shim.ended(timeout_s=LOAD_S)
            assert [rank.exit_code for rank in ending.ranks] == [0, 0], said(tmp_path / name)
            assert said(tmp_path / name).startswith("[3.0, 3.0, 3.0]")

    async def both() -> None:
        state = await server.ensure(timeout_s=LOAD_S)
        assert state.loaded[:2] == ("torch", "torch.distributed")
        assert any("no_such_module" in missing for missing in state.missing)
        await check("warm", True)
        await check("cold", False)

    asyncio.run(both())


def test_ten_attempts_have_ten_stores(tmp_path: Path, server: StandbyServer) -> None:
    async def check() -> None:
        await server.ensure(timeout_s=LOAD_S)
        ports = []
        for attempt in range(1, 11):
            file = replace(_training(tmp_path, 2, warm=True), attempt=attempt)
            async with launched(tmp_path / str(attempt), file, standby=server) as shim:
                ending = await shim.ended(timeout_s=WITHIN_S)
                assert [rank.exit_code for rank in ending.ranks] == [0, 0], said(tmp_path / str(attempt))
                ports.append(shim.status.master_port)
        assert all(ports)

    asyncio.run(check())


def test_eight_ranks(tmp_path: Path, server: StandbyServer, capsys: pytest.CaptureFixture[str]) -> None:
    async def check() -> None:
        await server.ensure(timeout_s=LOAD_S)
        taken = []
        for attempt in (1, 2, 3):
            file = replace(_training(tmp_path, 8, warm=True), attempt=attempt)
            directory = tmp_path / str(attempt)
            async with launched(directory, file, standby=server, go=False) as shim:
                began_ns = time.monotonic_ns()
                await shim.go("127.0.0.1", shim.status.master_port or 0, store=True)
                ending = await shim.ended(timeout_s=WITHIN_S)
                assert {rank.exit_code for rank in ending.ranks} == {0}
            done_ns = [int(said(directory, rank).split()[-1]) for rank in range(8)]
            taken.append((max(done_ns) - began_ns) / 1e9)
        with capsys.disabled():
            print(f"\neight forked ranks, go -> first all_reduce done everywhere: {taken} s")
        assert min(taken) < 20

    asyncio.run(check())


def test_a_killed_server_costs_the_rank_nothing(tmp_path: Path) -> None:
    text = """
import os, sys, time
print("up", flush=True)
while not os.path.exists("leave"):
    time.sleep(0.01)
sys.exit(21)
"""

    async def check() -> None:
        server = _light(tmp_path, "json")
        first = await server.ensure(timeout_s=WITHIN_S)
        file = launch_file(tmp_path, script(tmp_path, text), warm=True)
        async with launched(tmp_path / "1", file, standby=server) as shim:
            until(lambda: said(tmp_path / "1"))
            assert shim.status.warm
            os.kill(first.pid, signal.SIGKILL)
            until(lambda: not alive(first.pid))
            (tmp_path / "leave").touch()
            assert (await shim.ended(timeout_s=WITHIN_S)).ranks[0].exit_code == 21
        later = replace(file, attempt=2)
        async with launched(tmp_path / "2", later, standby=server) as shim:  # cold, and nobody had to say so
            assert not shim.status.warm
            assert (await shim.ended(timeout_s=WITHIN_S)).ranks[0].exit_code == 21
        again = await server.ensure(timeout_s=WITHIN_S)
        assert again.pid != first.pid
        await server.stop()
        assert not alive(again.pid)

    asyncio.run(check())


def test_a_new_agent_finds_the_server(tmp_path: Path) -> None:
    async def check() -> None:
        first = _light(tmp_path, "json")
        state = await first.ensure(timeout_s=WITHIN_S)
        first.close()
        second = _light(tmp_path, "json")
        assert (await second.ensure(timeout_s=WITHIN_S)).pid == state.pid
        others = [_light(tmp_path, "json") for _ in range(3)]
        together = await asyncio.gather(*(other.ensure(timeout_s=WITHIN_S) for other in others))
        assert {other.pid for other in together} == {state.pid}
        for other in others:
            other.close()
        await second.stop()
        await second.stop()
        assert not alive(state.pid)

    asyncio.run(check())


def test_servers_started_at_once_are_one(tmp_path: Path) -> None:
    async def check() -> None:
        servers = [_light(tmp_path, "json") for _ in range(4)]
        states = await asyncio.gather(*(server.ensure(timeout_s=WITHIN_S) for server in servers))
        assert len({state.pid for state in states}) == 1
        for server in servers:
            await server.stop()

    asyncio.run(check())


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (
            "import threading, time; threading.Thread(target=time.sleep, args=(600,), daemon=True).start()",
            "2 threads",
        ),
        ("import subprocess; child = subprocess.Popen(['sleep', '5'])", "started a process"),
        ("import no_such_module_at_all", "no_such_module_at_all"),
    ],
)
def test_a_server_that_is_not_fit_to_fork_says_so(tmp_path: Path, text: str, why: str) -> None:
    async def check() -> None:
        script(tmp_path, text, "unfit.py")
        env = {**ENV, "PYTHONPATH": str(tmp_path)}
        server = StandbyServer(
            tmp_path / "s", interpreter=(sys.executable,), env=env, cwd="/", wanted=Wanted(modules=("unfit",))
        )
        with pytest.raises(Unreachable, match=why):
            await server.ensure(timeout_s=WITHIN_S)
        file = launch_file(tmp_path, script(tmp_path, "print('c')"), warm=True)
        assert (await run(tmp_path / "1", file, standby=server)).ranks[0].exit_code == 0
        await server.stop()

    asyncio.run(check())


def test_a_server_goes_with_its_folder(tmp_path: Path) -> None:
    async def check() -> None:
        server = _light(tmp_path, "json")
        state = await server.ensure(timeout_s=WITHIN_S)
        server.close()  # wakes it
        (tmp_path / "standby" / "standby.sock").unlink()
        until(lambda: not alive(state.pid))

    asyncio.run(check())


def test_a_killed_warm_shim_takes_everything_with_it(tmp_path: Path) -> None:
    """Also what was forked from a loaded process and left its session: the marker shows."""
    text = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        print(os.getpid(), flush=True)
        time.sleep(600)
    os._exit(0)
os.wait()
time.sleep(600)
"""

    async def check() -> None:
        server = _light(tmp_path, "json")
        state = await server.ensure(timeout_s=WITHIN_S)
        file = launch_file(tmp_path, script(tmp_path, text), ranks=2, warm=True)
        async with launched(tmp_path / "1", file, standby=server) as shim:
            assert shim.status.warm
            escaped = int(until(lambda: said(tmp_path / "1")))
            until(lambda: said(tmp_path / "1", 1))
            assert len(members(file.marker)) == 5  # the shim, two ranks, what left them
            assert carries(escaped, file.marker)
            assert not carries(state.pid, file.marker)
            found = await shimlink.adopt(tmp_path / "1", file.marker)
            assert isinstance(found, Shim)
            found.close()
            os.kill(shim.pid, signal.SIGKILL)
            ending = await shim.ended(timeout_s=WITHIN_S)
            assert ending.shim_died
            assert [rank.state for rank in ending.ranks] == ["lost", "lost"]
        await server.stop()

    asyncio.run(check())


LOADER = """
import torch, sys, time, os
from torch.utils.data import DataLoader, Dataset

class Numbers(Dataset):
    def __len__(self): return 1 << 40
    def __getitem__(self, n): return torch.full((1000,), float(n % 7))

if __name__ == "__main__":
    context = {"num_workers": 2, "multiprocessing_context": sys.argv[1]}
    loader = DataLoader(Numbers(), batch_size=4, sampler=range(1 << 40), **context)
    for n, batch in enumerate(loader):
        if n == 4:
            print("fed", flush=True)
        time.sleep(0.01)
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_data_loader_workers_leave_nothing(tmp_path: Path, server: StandbyServer, method: str) -> None:
    before = shared_memory()

    async def check() -> None:
        await server.ensure(timeout_s=LOAD_S)
        file = launch_file(tmp_path, (*script(tmp_path, LOADER), method), ranks=1, warm=True)
        async with launched(tmp_path / "1", file, standby=server) as shim:
            until(lambda: "fed" in said(tmp_path / "1"), within_s=LOAD_S)
            await shim.end("KILL")
            ending = await shim.ended(timeout_s=WITHIN_S)
            assert ending.swept >= 3
        left = {name for name in shared_memory() - before if name.startswith(("sem.mp-", "torch_", "psm_"))}
        assert not left

    asyncio.run(check())


def test_a_key_is_what_the_imports_depend_on() -> None:
    def key(**changes: object) -> str:
        fields = {"interpreter": ("python",), "env": {"A": "1", "B": "2"}, "modules": ("torch",)}
        return key_of(**{**fields, **changes})  # type: ignore[arg-type]

    assert key() == key(env={"B": "2", "A": "1"})
    others = {key(env={"A": "1"}), key(interpreter=("python", "-O")), key(modules=("torch", "numpy"))}
    assert len({key(), *others}) == 4
