"""From when on a GPU is said not to be well. Judgement, unless NVIDIA's documents say otherwise."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds:
    slowdown_near_c: float = 3.0  # from the temperature at which it slows down: a warning
    memory_c: float = 95.0  # HBM, where the GPU does not tell its own limit
    throttled_s: float = 10.0  # a reason that was seen stands for so long: samples miss most of them
    ecc_correctable_per_h: float = 100.0
    nvlink_errors_per_min: float = 30.0  # replays are repaired; many of them slow every collective down
    pcie_replays_per_min: float = 60.0
    busy_percent: float = 30.0  # links of idle GPUs are slow to save power
    failing_passes: int = 3  # of a call that should work: then the probe sees only a part
