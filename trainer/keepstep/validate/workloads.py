"""What one device does alone: multiply, keep, move.

Where it can be, a result is known to the bit: whole numbers small enough that every sum is exact in every
precision and order, so that a reference in higher precision must give the same checksum on any hardware. What
rounds is compared with the reference within a bound, and bit by bit with devices of the same kind.
"""

import torch
from torch import Tensor

from keepstep.validate.bench import Bench, Measured, checksum

_WHOLE = 4  # largest; products over a row of 2,048 add up to less than 2**24, so to exact float32
_ERROR_MAX = 1e-4  # of the largest value, in float32
_PATTERNS = (0, -1, 0x5555555555555555, -0x5555555555555556)  # each bit both ways, and beside its opposite


def matmul(bench: Bench) -> Measured:
    """Whole numbers, in each precision that is trained in: the checksum is the reference's."""
    size, chance = bench.sizes.matrix, torch.Generator().manual_seed(1)
    a, b = (_whole(size, chance) for _ in range(2))
    reference = torch.mm(a.double(), b.double())
    for dtype in (torch.bfloat16, torch.float32):
        left, right = a.to(bench.device, dtype), b.to(bench.device, dtype)
        expected = checksum(reference.to(dtype))
        found = checksum(torch.mm(left, right))
        if found != expected:
            return Measured(checksum=found, wrong=f"{dtype} gives {found}, the reference {expected}")
    return _burn(bench, left, right)


def _burn(bench: Bench, left: Tensor, right: Tensor) -> Measured:
    """Again and again: each time the same, and how fast.

    A GPU is kept busy without a pause, so that it is as fast as it stays. A slot shares its processors: its
    quickest repetition says what it can, all of them what else the machine does.
    """
    first = torch.mm(left, right)
    differs = torch.zeros((), dtype=torch.int64, device=bench.device)

    at_once = bench.sizes.repeats if bench.cuda else 1

    def again() -> None:
        for _ in range(at_once):
            differs.add_((torch.mm(left, right) != first).sum())

    took_s = min(bench.seconds(again) for _ in range(bench.sizes.repeats // at_once))
    flops = 2.0 * bench.sizes.matrix**3 * at_once
    wrong = f"{int(differs)} values differ between repetitions" if int(differs) else ""
    return Measured(checksum=checksum(first), figure=flops / took_s / 1e9, unit="GFLOP/s", wrong=wrong)


def rounding(bench: Bench) -> Measured:
    """Numbers that round: near the reference, and the same bits on each device of the kind."""
    size, chance = bench.sizes.matrix, torch.Generator().manual_seed(2)
    a, b = (torch.randn(size, size, generator=chance) for _ in range(2))
    found = torch.mm(a.to(bench.device), b.to(bench.device))
    reference = torch.mm(a.double(), b.double())
    error = float((found.cpu().double() - reference).abs().max() / reference.abs().max())
    far = "" if error <= _ERROR_MAX else f"{error:.1e} off the reference in float64"  # nan is far, too
    return Measured(checksum=checksum(found), wrong=far)


def memory(bench: Bench) -> Measured:
    """Fill everything, then read everything back; each bit both ways, and each word its own address."""
    words = bench.sizes.chunk_bytes // 8
    count = max(1, bench.memory_bytes // bench.sizes.chunk_bytes)
    chunks = [torch.empty(words, dtype=torch.int64, device=bench.device) for _ in range(count)]
    wrong: list[str] = []

    def patterns() -> None:
        for pattern in _PATTERNS:
            for chunk in chunks:
                chunk.fill_(pattern)
            bad = sum(int((chunk != pattern).sum()) for chunk in chunks)
            if bad:
                wrong.append(f"{bad} words were not {pattern & (1 << 64) - 1:#x}")
        for number, chunk in enumerate(chunks):
            torch.arange(number * words, (number + 1) * words, out=chunk)
        bad = sum(
            int((chunk != torch.arange(k * words, (k + 1) * words, device=bench.device)).sum())
            for k, chunk in enumerate(chunks)
        )
        if bad:
            wrong.append(f"{bad} words were not their address")

    took_s = bench.seconds(patterns)
    if bench.cuda:
        chunks.clear()
        torch.cuda.empty_cache()  # what libraries allocate by themselves needs room, too
    moved = 2.0 * (len(_PATTERNS) + 1) * count * words * 8
    return Measured(figure=moved / took_s / 1e9, unit="GB/s", wrong="; ".join(wrong))


def copying(bench: Bench) -> Measured:
    """From the host to the device and back; on a CPU within its memory."""
    words = bench.sizes.chunk_bytes // 8
    chance = torch.Generator().manual_seed(3)
    host = torch.randint(-(2**63), 2**63 - 1, (words,), dtype=torch.int64, generator=chance)
    back = torch.empty_like(host)
    if bench.cuda:
        host, back = host.pin_memory(), back.pin_memory()
    there = torch.empty(words, dtype=torch.int64, device=bench.device)

    def both_ways() -> None:
        there.copy_(host, non_blocking=True)
        back.copy_(there, non_blocking=True)

    took_s = min(bench.seconds(both_ways) for _ in range(4))  # the first touches pages
    wrong = "" if torch.equal(back, host) else "what came back is not what was sent"
    return Measured(checksum=checksum(back), figure=2.0 * words * 8 / took_s / 1e9, unit="GB/s", wrong=wrong)


def _whole(size: int, chance: torch.Generator) -> Tensor:
    return torch.randint(-_WHOLE, _WHOLE + 1, (size, size), generator=chance).float()
