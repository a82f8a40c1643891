"""Agents that look after their node, as processes: real pynvml, a stand-in driver, a file as kernel's log."""

import asyncio
import os
import statistics
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families as plain

from agents import Agent, Controller, controlled, launch_of, lives, until
from keepstep.agent.probes.xid.kmsg import seconds_since_boot
from keepstep.agent.rank import processes
from keepstep.core.health import FaultKind, ProbeState
from keepstep.wire.health import Check, GpuSample, HealthStatus
from nvml_standin import RECOVERY_ACTION, SOURCE, Standin, compiler_here
from scraping import complaints, missing, scraping

pytestmark = pytest.mark.skipif(
    compiler_here() is None,
    reason="no C compiler here (cc, gcc or clang): the stand-in for NVML cannot be built",
)


def record(sequence: int, text: str) -> str:
    """As the kernel would write it now."""
    return f"4,{sequence},{int(seconds_since_boot() * 1e6)},-;{text}\n"


def xid(sequence: int, code: int, gpu: int = 0) -> str:
    return record(
        sequence, f"NVRM: Xid (PCI:0000:{0x0F + gpu:02x}:00): {code}, pid=77, name=python, it broke"
    )


@dataclass
class Probed:
    controller: Controller
    agent: Agent
    standin: Standin
    log: Path
    metrics: str = ""

    @property
    def health(self) -> HealthStatus:
        health = self.controller.states[-1].health
        assert health is not None
        return health

    def checks(self) -> dict[tuple[str, str], Check]:
        return {(check.name, check.component): check for check in self.health.checks}

    def gpus(self) -> list[GpuSample]:
        return sorted(self.health.gpus, key=lambda gpu: gpu.index)

    def probe(self, name: str) -> tuple[str, str]:
        return next((p.state, p.reason) for p in self.health.probes if p.name == name)

    def faults(self) -> list[tuple[str, int, str, int]]:
        return [(f.kind, f.code, f.component, f.count) for f in self.health.faults]

    async def until(self, look: Callable[[], object], within_s: float = 30.0) -> None:
        await until(look, lambda: f"{self.health.checks} {self.health.probes}\n{self.agent.said()}", within_s)

    async def stands(self, name: str, component: str = "") -> Check:
        await self.until(lambda: (name, component) in self.checks())
        return self.checks()[name, component]

    async def ends(self, name: str, component: str = "") -> None:
        await self.until(lambda: (name, component) not in self.checks())

    def write(self, text: str) -> None:
        with self.log.open("a") as file:
            file.write(text)

    async def sampled(self, count: int = 2) -> None:
        """Every GPU, so often, from now on."""
        for _ in range(count):
            now = time.monotonic()
            await self.until(partial(self.newer_than, now))

    def newer_than(self, moment: float) -> bool:
        return all(gpu.age_s < time.monotonic() - moment for gpu in self.health.gpus)

    def samplers(self) -> list[int]:
        found = processes.descendants(self.agent.pid, processes.table())
        return [process.pid for process in found if b"probes.gpu" in command_of(process.pid)]


def command_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # it has just ended
        return b""


@asynccontextmanager
async def probed(
    folder: Path, *options: str, start: bool = True, env: dict[str, str] | None = None, **standin: Any
) -> AsyncIterator[Probed]:
    driver = Standin(folder / "nvml", **standin)
    log = folder / "kmsg"
    log.touch()
    settings = ("--kernel-log", str(log), "--driver-call", "1", "--driver-trial", "1", *options)
    async with controlled(folder, *settings, start=start, env={**driver.env, **(env or {})}) as (
        controller,
        agent,
    ):
        its = Probed(controller, agent, driver, log)
        if start:
            await its.until(lambda: len(its.health.gpus) == driver.control.gpus)
        yield its


async def fetched(url: str, accept: str = "") -> tuple[str, str]:
    def fetch() -> tuple[str, str]:
        headers = {"Accept": accept} if accept else {}
        request = urllib.request.Request(url, headers=headers)  # noqa: S310
        with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310 - of an agent of ours
            return answer.headers["Content-Type"], answer.read().decode()

    return await asyncio.to_thread(fetch)


def environ(pid: int) -> list[bytes]:
    return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")


def metrics_url(agent: Agent) -> str:
    said = agent.said()
    assert "metrics at " in said
    return said.split("metrics at ")[1].split()[0]


# ---------------------------------------------------------------- GPUs


async def _what_an_agent_tells(tmp_path: Path) -> None:
    async with probed(tmp_path, "--metrics", "0", gpus=4) as its:
        standin = its.standin
        uuids = tuple(standin.uuid(k) for k in range(4))
        assert its.controller.registers[0].gpus == uuids and its.controller.registers[0].slots == 4
        await its.until(lambda: its.gpus()[0].memory_temperature_c is not None)
        first = its.gpus()[0]
        assert (first.uuid, first.pci, first.name) == (uuids[0], "0000:0f:00.0", "NVIDIA H100 80GB HBM3")
        assert (first.utilisation, first.sm_clock_mhz, first.power_w, first.energy_j) == (
            97,
            1755,
            612.0,
            1000.0,
        )
        assert (first.temperature_c, first.memory_temperature_c) == (61, 70)
        assert (first.pcie_width, first.pcie_generation, first.recovery_action) == (16, 5, 0)
        assert its.health.fabric == dict.fromkeys(uuids, bytes(range(1, 17)).hex() + "/32766")
        assert its.health.epoch == its.controller.registers[0].boot_id
        assert its.probe("gpu") == its.probe("xid") == (ProbeState.OK, "")
        assert [c for c in its.health.checks if c.name.startswith("gpu.")] == [] and its.faults() == []

        # A GPU falls off the bus, and no line says so.
        standin.lose(2)
        assert (await its.stands("gpu.lost", uuids[2])).level == "bad"
        assert its.faults() == []

        # One XID, told by NVML and by the kernel: once. Of another GPU: another one.
        standin.raise_event(1, 94)
        its.write(xid(1, 94, gpu=1))
        await its.until(lambda: its.health.faults and its.health.faults[0].text)
        its.write(xid(2, 31, gpu=3))
        await its.until(lambda: len(its.health.faults) == 2)
        assert its.faults() == [(FaultKind.XID, 94, uuids[1], 1), (FaultKind.XID, 31, uuids[3], 1)]
        assert its.health.faults[0].pid == 77

        # The driver asks for an action, by event, then by field; a number that nobody knows is told, too.
        standin.raise_event(0, 3, RECOVERY_ACTION)
        standin.gpu(0).field[230] = 42
        await its.until(lambda: (c := its.checks().get(("gpu.recovery_action", uuids[0]))) and c.value == 42)
        standin.gpu(0).field[230] = 0
        await its.ends("gpu.recovery_action", uuids[0])

        await _is_exported(its, uuids)
        await _is_found_again(its, uuids)

        # Whatever the agent started for this dies with it.
        samplers = its.samplers()
        assert samplers
        await its.agent.kill()
        await until(lambda: not any(map(lives, samplers)))


async def _is_exported(its: Probed, uuids: tuple[str, ...]) -> None:
    url = metrics_url(its.agent)
    kind, text = await fetched(url)
    assert kind.startswith("text/plain")
    families = {family.name: family for family in plain(text)}
    util = {s.labels["UUID"]: s for s in families["DCGM_FI_DEV_GPU_UTIL"].samples}
    assert util[uuids[3]].value == 97 and util[uuids[3]].labels == {
        "gpu": "3", "UUID": uuids[3], "pci_bus_id": "0000:12:00.0", "device": "nvidia3",
        "modelName": "NVIDIA H100 80GB HBM3", "Hostname": os.uname().nodename,
    }  # fmt: skip
    (used,) = [s.value for s in families["DCGM_FI_DEV_FB_USED"].samples if s.labels["gpu"] == "0"]
    assert used == its.gpus()[0].memory_used_bytes / (1 << 20)  # type: ignore[operator]
    last = {s.labels["gpu"]: s.value for s in families["DCGM_FI_DEV_XID_ERRORS"].samples}
    assert last == {"0": 0, "1": 94, "2": 0, "3": 31}
    await its.until(lambda: its.gpus()[0].tensor_active is not None)  # GPM wants two samples
    kind, text = await fetched(url, "application/openmetrics-text; version=1.0.0")
    assert kind.startswith("application/openmetrics-text")
    families = {family.name: family for family in openmetrics_families(text)}  # type: ignore[no-untyped-call]
    (tensor,) = [
        s.value for s in families["DCGM_FI_PROF_PIPE_TENSOR_ACTIVE"].samples if s.labels["gpu"] == "0"
    ]
    assert tensor == 0.54 and its.gpus()[0].sm_active == 0.88
    xids = {(s.labels["gpu"], s.labels["xid"]): s.value for s in families["keepstep_gpu_xid_errors"].samples}
    assert xids == {("1", "94"): 1, ("3", "31"): 1}
    checks = {(s.labels["check"], s.labels["component"]) for s in families["keepstep_check"].samples}
    assert ("gpu.lost", uuids[2]) in checks
    states = {
        s.labels["state"]
        for s in families["keepstep_probe_state"].samples
        if s.value and s.labels["probe"] == "gpu"
    }
    assert states == {"ok"}
    with pytest.raises(urllib.error.HTTPError, match="404"):
        await fetched(url.replace("/metrics", "/other"))


async def _is_found_again(its: Probed, uuids: tuple[str, ...]) -> None:
    """A lost GPU is back after its reset, without a new agent."""
    its.standin.gpu(2).answer = 0
    await its.ends("gpu.lost", uuids[2])
    await its.sampled()


@pytest.mark.slow  # GPM is sampled every ten seconds, and wants two samples
def test_what_an_agent_tells_of_its_gpus(tmp_path: Path) -> None:
    asyncio.run(_what_an_agent_tells(tmp_path))


async def _one_hangs(tmp_path: Path) -> None:
    async with probed(tmp_path, gpus=8) as its:
        hung = its.standin.uuid(5)
        (before,) = its.samplers()
        its.standin.hang(5, "nvmlDeviceGetMemoryInfo")
        check = await its.stands("gpu.hung", hung)
        assert "nvmlDeviceGetMemoryInfo" in check.text and its.probe("gpu")[0] == ProbeState.HUNG
        # The other seven go on, once a second; the eighth is shown as old as it is.
        moments: dict[int, list[float]] = {gpu.index: [] for gpu in its.health.gpus}

        def seen() -> bool:
            now = time.monotonic()
            for gpu in its.health.gpus:
                if not moments[gpu.index] or now - gpu.age_s > moments[gpu.index][-1] + 0.5:
                    moments[gpu.index].append(now - gpu.age_s)
            return all(len(times) > 6 for index, times in moments.items() if index != 5)

        await its.until(seen)
        for index, times in moments.items():
            if index != 5:  # the first is from before it hung
                assert statistics.median(b - a for a, b in pairwise(times[1:])) < 1.5, times
        assert len(moments[5]) == 1 and its.gpus()[5].age_s > 4.0
        assert before not in its.samplers() and not lives(before)
        its.standin.hang(5, "")
        await its.ends("gpu.hung", hung)
        await its.sampled()
        await its.until(lambda: len(its.samplers()) == 1)
        assert its.probe("gpu") == (ProbeState.OK, "")


@pytest.mark.slow
def test_one_gpu_hangs_and_the_others_go_on(tmp_path: Path) -> None:
    asyncio.run(_one_hangs(tmp_path))


async def _an_old_driver(tmp_path: Path) -> None:
    async with probed(tmp_path, gpus=2, old_driver=True) as its:
        control = its.standin.control
        await its.until(lambda: its.gpus()[0].temperature_c is not None)
        first = its.gpus()[0]
        assert (first.temperature_c, first.utilisation, first.throttled) == (61, 97, ())
        assert first.tensor_active is None and its.health.fabric == {}
        its.standin.gpu(0).reasons = 0x40
        await its.stands("gpu.throttled", first.uuid)
        its.standin.raise_event(1, 79)
        await its.until(lambda: its.faults() == [(FaultKind.XID, 79, its.standin.uuid(1), 1)])
        assert its.probe("gpu") == its.probe("xid") == (ProbeState.OK, "")
        assert control.gpus == 2


def test_a_driver_that_lacks_functions(tmp_path: Path) -> None:
    asyncio.run(_an_old_driver(tmp_path))


async def _another_version(tmp_path: Path) -> None:
    async with probed(tmp_path, gpus=2, start=False) as its:
        its.standin.control.driver, its.standin.control.nvml = b"999.10", b"14.999.10"
        its.standin.control.struct_newest = 2  # GetGpuFabricInfoV in version 3 is not known
        for number in range(2):
            its.standin.gpu(
                number
            ).refused = b" nvmlDeviceGetUtilizationRates nvmlDeviceGetSramEccErrorStatus "
            for field in (4, 82, 142, 230):
                its.standin.gpu(number).field_answer[field] = 3
        its.agent.start()
        await until(lambda: its.controller.states and len(its.health.gpus) == 2, its.agent.said)
        await its.until(lambda: its.gpus()[0].temperature_c is not None)
        first = its.gpus()[0]
        assert (first.utilisation, first.memory_temperature_c, first.recovery_action) == (None, None, None)
        assert first.power_w == 612.0 and len(its.health.fabric) == 2
        assert its.probe("gpu") == (ProbeState.OK, "")
        its.standin.gpu(1).field_answer[186] = 99  # an error that nobody has seen: of one field of one GPU
        its.standin.gpu(1).power_mw = 0
        await its.sampled(3)
        assert its.gpus()[0].power_w == 612.0 and its.probe("gpu") == (ProbeState.OK, "")


def test_a_driver_of_another_major_version(tmp_path: Path) -> None:
    asyncio.run(_another_version(tmp_path))


async def _nvml_is_unusable(tmp_path: Path) -> None:
    async with probed(tmp_path, gpus=2) as its:
        uuids = its.controller.registers[0].gpus
        await its.agent.kill()
        its.standin.control.init_answer = 18  # the library was replaced under a driver that is still loaded
        its.agent.start()
        await until(lambda: len(its.controller.registers) == 2, its.agent.said)
        assert its.controller.registers[1].gpus == uuids, "it had them, and is no CPU node now"
        check = await its.stands("gpu.missing")
        assert (check.value, check.limit) == (0, 2) and "mismatch" in its.probe("gpu")[1]
        its.standin.control.init_answer = 0
        await its.ends("gpu.missing")
        await its.sampled()


async def _lost_before_the_start(tmp_path: Path) -> None:
    async with probed(tmp_path, gpus=2) as its:
        uuids = its.controller.registers[0].gpus
        await its.agent.kill()
        its.standin.lose(1)
        its.agent.start()
        await until(lambda: len(its.controller.registers) == 2, its.agent.said)
        assert its.controller.registers[1].gpus == uuids
        await its.stands("gpu.lost", uuids[1])
        its.standin.gpu(1).answer = 0
        await its.ends("gpu.lost", uuids[1])
        await its.until(lambda: len(its.health.gpus) == 2 and len(its.samplers()) == 1)
        pids = its.samplers()
        await its.sampled(4)  # longer than until the next trial, if there were one
        assert its.samplers() == pids and ("gpu.missing", "") not in its.checks()


def test_a_gpu_that_was_lost_before_the_start_and_is_back(tmp_path: Path) -> None:
    asyncio.run(_lost_before_the_start(tmp_path))


def test_nvml_that_cannot_be_used(tmp_path: Path) -> None:
    asyncio.run(_nvml_is_unusable(tmp_path))


async def _hangs_from_the_start(tmp_path: Path) -> None:
    """Nobody has ever heard of the GPU that hangs: the others are there, and it is when it answers."""
    async with probed(tmp_path, gpus=3, start=False) as its:
        its.standin.hang(1)
        its.agent.start()
        await until(lambda: its.controller.states and len(its.health.gpus) == 2, its.agent.said)
        assert its.controller.registers[0].gpus == (its.standin.uuid(0), its.standin.uuid(2))
        check = await its.stands("gpu.hung", "1")
        assert "nvmlDeviceGetHandleByIndex" in check.text
        its.standin.hang(1, "")
        await its.ends("gpu.hung", "1")
        await its.until(lambda: [gpu.uuid for gpu in its.gpus()] == [its.standin.uuid(k) for k in range(3)])
        await its.sampled()


def test_a_gpu_that_hangs_from_the_start(tmp_path: Path) -> None:
    asyncio.run(_hangs_from_the_start(tmp_path))


async def _fewer(tmp_path: Path) -> None:
    async with probed(tmp_path, gpus=4) as its:
        await its.agent.kill()
        its.standin.control.gpus = 3
        its.agent.start()
        check = await its.stands("gpu.missing")
        assert (check.value, check.limit) == (3, 4) and its.standin.uuid(3) in check.text
        await its.until(lambda: len(its.health.gpus) == 3)
        its.standin.hang(0)
        await its.stands("gpu.hung", its.standin.uuid(0))
        assert ("gpu.missing", "") in its.checks()


def test_fewer_gpus_than_before(tmp_path: Path) -> None:
    asyncio.run(_fewer(tmp_path))


async def _joined(tmp_path: Path) -> None:
    async with probed(tmp_path, gpus=4) as its:
        launch = launch_of(tmp_path / "work", "import time\ntime.sleep(600)\n", ranks=3)
        status = await its.controller.started(launch)
        assert [rank.gpu for rank in status.ranks] == [its.standin.uuid(k) for k in range(3)]
        await its.agent.kill()
        its.agent.start()
        await until(lambda: len(its.controller.registers) == 2, its.agent.said)
        status = await its.controller.phase("running")
        assert [rank.gpu for rank in status.ranks] == [its.standin.uuid(k) for k in range(3)]
        for rank in status.ranks:
            shown = environ(rank.pid)
            assert f"CUDA_VISIBLE_DEVICES={','.join(its.standin.uuid(k) for k in range(3))}".encode() in shown


def test_a_rank_is_told_with_its_gpu(tmp_path: Path) -> None:
    asyncio.run(_joined(tmp_path))


async def _without_gpus(tmp_path: Path) -> None:
    async with controlled(tmp_path, "--kernel-log", str(tmp_path / "none")) as (controller, agent):
        await until(lambda: controller.states[-1].health is not None and controller.states[-1].health.probes)
        health = controller.states[-1].health
        assert health is not None and health.gpus == ()
        states = {probe.name: (probe.state, probe.reason) for probe in health.probes}
        assert states["gpu"] == (ProbeState.ABSENT, "no NVIDIA driver here")
        assert agent.said().count("no NVIDIA driver") == 1
        assert processes.descendants(agent.pid, processes.table()) == []
        # A log that cannot be read is said, and the rest works.
        assert states["xid"][0] == ProbeState.DEGRADED and "No such file" in states["xid"][1]
        assert states["host"] == (ProbeState.OK, "")
        await agent.kill()
        off = Agent(agent.folder, controller.endpoint, "--no-probes")
        off.start()
        try:
            await until(lambda: len(controller.registers) == 2, off.said)
            assert controller.states[-1].health is None
        finally:
            await off.kill()


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="this machine has an NVIDIA driver")
def test_a_node_without_gpus_says_so_once(tmp_path: Path) -> None:
    asyncio.run(_without_gpus(tmp_path))


def test_an_address_for_metrics_that_is_none_is_refused(tmp_path: Path) -> None:
    options = ["--dir", str(tmp_path / "a"), "--metrics", "everywhere"]
    command = [sys.executable, "-m", "keepstep.agent", *options]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode != 0 and "'everywhere' is no address" in ended.stderr and "PORT" in ended.stderr


# ---------------------------------------------------------------- the kernel's log


async def _told_at_once(tmp_path: Path) -> None:
    async with probed(tmp_path, gpus=1, start=False) as its:
        its.controller.state_every_s = 60.0
        its.agent.start()
        await until(lambda: its.controller.states, its.agent.said)
        await until(lambda: "connected" in its.agent.said())
        its.write(xid(1, 79))
        await its.until(lambda: [f.code for f in its.health.faults] == [79], within_s=20.0)
        its.write(record(2, "Out of memory: Killed process 4242 (python) total-vm:1kB"))
        await its.until(lambda: len(its.health.faults) == 2, within_s=20.0)


def test_an_xid_is_told_at_once(tmp_path: Path) -> None:
    """Not with the next report, which is a minute away."""
    asyncio.run(_told_at_once(tmp_path))


async def _restarted_in_a_flood(tmp_path: Path) -> None:
    """Killed while XIDs pour in by log and by NVML; the count is what the log has, and never falls."""
    async with probed(tmp_path, gpus=1) as its:
        enough_of_it = threading.Event()

        def pour() -> int:
            """How many lines there were."""
            total = 0
            while not enough_of_it.is_set() and total < 1_000_000:
                its.write("".join(xid(total + k, 45) for k in range(50)))
                its.standin.raise_event(0, 45)
                total += 50
                enough_of_it.wait(0.01)
            return total

        flood = asyncio.create_task(asyncio.to_thread(pour))
        told: list[int] = []

        def count() -> int:
            faults = its.controller.states[-1].health.faults if its.controller.states[-1].health else ()
            assert [f.code for f in faults] in ([], [45])
            told.append(sum(f.count for f in faults))
            return told[-1]

        def reached(enough: int) -> bool:
            return count() > enough

        def again(registered: int) -> bool:
            return len(its.controller.registers) > registered

        for _ in range(2):
            enough = count() + 500
            await its.until(partial(reached, enough))
            registered = len(its.controller.registers)
            await its.agent.kill()
            its.agent.start()
            await its.until(partial(again, registered))
        enough_of_it.set()
        total = await flood
        await its.until(lambda: count() >= total)
        await its.sampled()
        assert count() == total and told == sorted(told)


def test_an_agent_that_is_restarted_in_a_flood_counts_it_once(tmp_path: Path) -> None:
    asyncio.run(_restarted_in_a_flood(tmp_path))


async def _clock_set_back(tmp_path: Path) -> None:
    library, clock = tmp_path / "wallclock.so", tmp_path / "clock"
    compiler = compiler_here()
    assert compiler is not None
    source = SOURCE.with_name("wallclock.c")
    command = [compiler, "-O2", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"]
    await asyncio.to_thread(subprocess.run, command, check=True, timeout=60)
    clock.write_bytes(struct.pack("q", 0))
    env = {"LD_PRELOAD": str(library), "KEEPSTEP_TEST_CLOCK": str(clock)}
    async with probed(tmp_path, gpus=2, env=env) as its:
        its.write(xid(1, 31))
        await its.until(lambda: its.health.faults)
        with clock.open("r+b") as file:
            file.write(struct.pack("q", -3600))
        its.write(xid(2, 31) + xid(3, 13, gpu=1))
        await its.until(lambda: len(its.health.faults) == 2)
        await its.sampled(3)
        faults = {fault.code: fault for fault in its.health.faults}
        assert faults[31].count == 2 and faults[13].count == 1
        assert all(0 <= f.last_age_s < 60 and 0 <= f.first_age_s < 60 for f in faults.values())
        assert [c for c in its.health.checks if c.name.startswith("gpu.")] == []


def test_a_clock_that_is_set_back_by_an_hour(tmp_path: Path) -> None:
    asyncio.run(_clock_set_back(tmp_path))


async def _flood(tmp_path: Path, lines: int, within_s: float) -> float:
    """The share of one core that agent and sampling process take while so many lines come in that time."""
    os.mkfifo(tmp_path / "kmsg.fifo")
    async with probed(tmp_path, "--kernel-log", str(tmp_path / "kmsg.fifo"), gpus=8) as its:
        pipe = os.open(tmp_path / "kmsg.fifo", os.O_WRONLY)

        at = int(seconds_since_boot() * 1e6)

        def pour() -> None:
            begun, sent = time.monotonic(), 0
            while sent < lines:
                due = min(lines, int((time.monotonic() - begun) / within_s * lines))
                text = "".join(
                    f"4,{k},{at},-;NVRM: Xid (PCI:0000:{0x0F + k % 8:02x}:00): 45, pid=77, Ch 00000008\n"
                    for k in range(sent, due)
                ).encode()
                while text:
                    text = text[os.write(pipe, text) :]
                sent = max(sent, due)
                time.sleep(0.005)

        def spent_s() -> float:
            fields = Path(f"/proc/{its.agent.pid}/stat").read_text().rpartition(")")[2].split()
            return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

        before = spent_s()
        try:
            await asyncio.to_thread(pour)
            await its.until(lambda: sum(f.count for f in its.health.faults) == lines)
            share = (spent_s() - before) / within_s
        finally:
            os.close(pipe)
        assert {f.code for f in its.health.faults} == {45} and len(its.health.faults) == 8
        assert [c for c in its.health.checks if c.name.startswith("gpu.")] == []
        return share


@pytest.mark.slow
def test_a_million_lines_in_a_minute_cost_little(tmp_path: Path) -> None:
    """A quarter of them."""
    share = asyncio.run(_flood(tmp_path, 250_000, 15.0))
    print(f"flood_core_share {share:.3f}")
    assert share <= 0.2


async def _scraped(tmp_path: Path) -> None:
    async with probed(tmp_path, "--metrics", "0", gpus=2) as its:
        its.write(xid(1, 79))
        await its.until(lambda: its.health.faults)
        _, text = await fetched(metrics_url(its.agent))
        assert await asyncio.to_thread(complaints, text) == []
        with scraping(tmp_path, metrics_url(its.agent)) as ask:
            for query, value in (
                ('DCGM_FI_DEV_POWER_USAGE{gpu="1"}', 612),
                ('keepstep_gpu_xid_errors_total{xid="79",gpu="0"}', 1),
                ('count(DCGM_FI_DEV_GPU_UTIL{modelName=~"NVIDIA.*"})', 2),
            ):
                assert await asyncio.to_thread(ask, query) == value


@pytest.mark.slow
@pytest.mark.skipif(bool(missing), reason=missing)
def test_a_real_prometheus_scrapes_an_agent(tmp_path: Path) -> None:
    asyncio.run(_scraped(tmp_path))
