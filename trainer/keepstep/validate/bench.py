"""What workloads run on: a device, how much they take of it, and how they measure and sum up."""

import hashlib
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What one workload came to on this rank."""

    checksum: str = ""  # the same wherever the device is of the same kind
    figure: float = 0.0  # more is faster
    unit: str = ""
    wrong: str = ""  # what was not as it must be


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Seconds in all, on what each kind of device does in a second."""

    matrix: int  # rows and columns
    repeats: int
    memory_bytes: int  # of which patterns are written, if that much is free
    chunk_bytes: int
    reduce_elements: int


CPU = Sizes(matrix=384, repeats=8, memory_bytes=32 * 2**20, chunk_bytes=8 * 2**20, reduce_elements=2**20)
CUDA = Sizes(matrix=2048, repeats=400, memory_bytes=2**50, chunk_bytes=256 * 2**20, reduce_elements=2**26)
_FREE_SHARE = 0.8  # of a GPU's memory; the rest is for the library's own


class Bench:
    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda = device.type == "cuda"
        self.sizes = CUDA if self.cuda else CPU
        if self.cuda:  # the same bits each time: no atomic additions, no sums that are rounded on their way
            torch.use_deterministic_algorithms(True)
            torch.backends.cuda.matmul.allow_tf32 = False
            torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False

    @property
    def kind(self) -> str:
        if self.cuda:
            return f"cuda {torch.cuda.get_device_name(self.device)}, torch {torch.__version__}"
        return f"cpu {_cpu()}, torch {torch.__version__}, {torch.get_num_threads()} threads"

    @property
    def memory_bytes(self) -> int:
        """How much of its memory a workload may take."""
        if not self.cuda:
            return self.sizes.memory_bytes
        free, _ = torch.cuda.mem_get_info(self.device)
        return min(self.sizes.memory_bytes, int(free * _FREE_SHARE))

    def seconds(self, work: Callable[[], object]) -> float:
        """What it takes until the device has done it."""
        self._wait()
        started = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - started

    def _wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)


def checksum(tensor: Tensor) -> str:
    """Of every bit."""
    raw = tensor.detach().cpu().contiguous().view(torch.uint8).numpy()
    return hashlib.blake2b(raw.data, digest_size=8).hexdigest()


def _cpu() -> str:
    """Model and widest vectors: what decides in which order a library adds."""
    try:
        with open("/proc/cpuinfo") as told:  # noqa: PTH123
            name = next(
                (line.partition(":")[2].strip() for line in told if line.startswith("model name")), ""
            )
    except OSError:
        name = ""
    return f"{name or platform.machine()} {torch.backends.cpu.get_cpu_capability()} of {os.cpu_count()}"
