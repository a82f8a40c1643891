"""A stand-in libnvidia-ml.so.1 (native/nvml.c), built here and told at run time how its GPUs do.

The real pynvml finds it by the real loader, through LD_LIBRARY_PATH. Whatever a test writes into `Standin`
holds for every process that has it loaded, at once.
"""

import ctypes
import functools
import mmap
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SOURCE = Path(__file__).with_name("native") / "nvml.c"
GPUS, FIELDS, LINKS, EVENTS, MAGIC = 16, 320, 36, 64, 0x6B737031
XID, RECOVERY_ACTION = 0x8, 0x8000  # types of events
LOST = 15
GIB = 1 << 30


class Gpu(ctypes.Structure):
    """gpu_t"""

    _fields_ = [
        ("uuid", ctypes.c_char * 48), ("bus", ctypes.c_char * 24), ("name", ctypes.c_char * 64),
        ("answer", ctypes.c_uint32), ("hang", ctypes.c_char * 64), ("refused", ctypes.c_char * 256),
        *((name, ctypes.c_uint32) for name in
          ("utilisation", "memory_utilisation", "sm_clock", "memory_clock", "power_mw")),
        *((name, ctypes.c_int32) for name in ("temperature", "slowdown", "memory_max", "margin")),
        *((name, ctypes.c_uint64) for name in
          ("memory_total", "memory_used", "reasons", "sram_uncorrectable", "sram_correctable")),
        *((name, ctypes.c_uint32) for name in
          ("pcie_width", "pcie_generation", "pcie_width_max", "pcie_generation_max", "gpm", "fabric_state",
           "fabric_status", "fabric_health", "fabric_summary", "clique")),
        ("cluster", ctypes.c_uint8 * 16), ("activity", ctypes.c_double * 32),
        ("field_answer", ctypes.c_uint8 * FIELDS), ("field", ctypes.c_uint64 * FIELDS),
        ("link", ctypes.c_uint64 * LINKS * 8), ("links", ctypes.c_uint32), ("calls", ctypes.c_uint64),
    ]  # fmt: skip


class Event(ctypes.Structure):
    _fields_ = [("gpu", ctypes.c_uint32), ("type", ctypes.c_uint32), ("data", ctypes.c_uint64)]


class Control(ctypes.Structure):
    """control_t"""

    _fields_ = [
        ("magic", ctypes.c_uint32), ("gpus", ctypes.c_uint32), ("init_answer", ctypes.c_uint32),
        ("init_hangs", ctypes.c_uint32), ("driver", ctypes.c_char * 32), ("nvml", ctypes.c_char * 32),
        ("struct_newest", ctypes.c_uint32), ("events", ctypes.c_uint64), ("event", Event * EVENTS),
        ("gpu", Gpu * GPUS),
    ]  # fmt: skip


class Standin:
    """`gpus` healthy H100s behind NVLink; change what is to be otherwise."""

    def __init__(self, folder: Path, *, gpus: int = 8, old_driver: bool = False) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        build(folder / "libnvidia-ml.so.1", old_driver=old_driver)
        path = folder / "control"
        with path.open("wb") as file:
            file.truncate(ctypes.sizeof(Control))
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), ctypes.sizeof(Control))
        self.control = Control.from_buffer(self._memory)
        self.control.gpus = gpus
        self.control.driver, self.control.nvml = b"580.95.05", b"13.580.95.05"
        for number in range(gpus):
            _healthy(self.gpu(number), number)
        self.control.magic = MAGIC

    @property
    def env(self) -> dict[str, str]:
        """What a process that is to find it needs."""
        return {"LD_LIBRARY_PATH": str(self.folder), "KEEPSTEP_NVML_CONTROL": str(self.folder / "control")}

    def gpu(self, number: int) -> Gpu:
        gpu: Gpu = self.control.gpu[number]
        return gpu

    def uuid(self, number: int) -> str:
        return bytes(self.gpu(number).uuid).decode()

    def raise_event(self, number: int, data: int, kind: int = XID) -> None:
        event = self.control.event[self.control.events % EVENTS]
        event.gpu, event.type, event.data = number, kind, data
        self.control.events += 1

    def lose(self, number: int) -> None:
        """It falls off the bus."""
        self.gpu(number).answer = LOST

    def hang(self, number: int, call: str = "*") -> None:
        self.gpu(number).hang = call.encode()


def _healthy(gpu: Gpu, number: int) -> None:
    gpu.uuid = f"GPU-{number:08x}-0000-4000-8000-000000000000".encode()
    gpu.bus = f"00000000:{0x0F + number:02X}:00.0".encode()
    gpu.name = b"NVIDIA H100 80GB HBM3"
    gpu.utilisation, gpu.memory_utilisation = 97, 40
    gpu.sm_clock, gpu.memory_clock, gpu.power_mw = 1755, 2619, 612_000
    gpu.temperature, gpu.margin = 61, 26
    gpu.memory_total, gpu.memory_used = 80 * GIB, 71 * GIB
    gpu.pcie_width = gpu.pcie_width_max = 16
    gpu.pcie_generation = gpu.pcie_generation_max = 5
    gpu.gpm, gpu.fabric_state, gpu.fabric_summary, gpu.clique = 1, 3, 1, 32766
    gpu.cluster[:] = range(1, 17)
    gpu.activity[1], gpu.activity[2], gpu.activity[5], gpu.activity[10] = 96.0, 88.0, 54.0, 37.0
    gpu.field[82] = 70
    gpu.field[83] = 1_000_000
    gpu.field[186] = 612_000
    gpu.field[193], gpu.field[194], gpu.field[195], gpu.field[196] = (2**64 - 8, 2**64 - 2, 0, 0)
    gpu.links = 18
    for link in range(18):
        gpu.link[4][link] = 1


def build(target: Path, *, old_driver: bool = False) -> None:
    """With this machine's C compiler, once in each process of tests. Errors: NoCompiler."""
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    beside.write_bytes(_library(old_driver))
    beside.rename(target)


@functools.cache
def _library(old_driver: bool) -> bytes:
    compiler = compiler_here()
    if compiler is None:
        raise NoCompiler("no C compiler here (cc, gcc or clang): the stand-in for NVML cannot be built")
    options = ["-DOLD_DRIVER"] if old_driver else []
    command = [compiler, "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", *options]
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "library.so"
        subprocess.run([*command, "-o", str(library), str(SOURCE)], check=True, timeout=60)
        return library.read_bytes()


def compiler_here() -> str | None:
    return next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)


class NoCompiler(Exception):
    """Tests that need the stand-in are skipped, and say so."""


@contextmanager
def standing_in(folder: Path, *, gpus: int = 8, old_driver: bool = False) -> Iterator[Standin]:
    """For this process's children: its environment finds the stand-in while this lasts."""
    standin = Standin(folder, gpus=gpus, old_driver=old_driver)
    before = {name: os.environ.get(name) for name in standin.env}
    os.environ.update(standin.env)
    try:
        yield standin
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
