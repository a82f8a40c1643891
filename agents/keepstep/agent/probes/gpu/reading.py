"""What the sampling process tells the agent: a `Reading` for each GPU and pass, with the newest of each tier.

Times are CLOCK_MONOTONIC seconds, which all processes of a machine share. None: not to be had here.
"""

from typing import Any

import msgspec


class Part(msgspec.Struct, array_like=True, omit_defaults=True):
    """Both sides are of one version: positions are enough."""


class Identity(msgspec.Struct, array_like=True, omit_defaults=True, frozen=True):
    index: int
    uuid: str = ""
    pci: str = ""  # 0000:0f:00.0
    name: str = ""


class Fast(Part):
    at: float
    utilisation: int | None = None  # percent
    memory_utilisation: int | None = None
    memory_used: int | None = None  # bytes
    memory_total: int | None = None
    sm_clock: int | None = None  # MHz
    memory_clock: int | None = None
    reasons: int | None = None  # bits
    policies: dict[int, int] = {}  # field -> counter that grows while clocks are held down
    power_w: float | None = None
    energy_mj: int | None = None


class Heat(Part):
    at: float
    temperature: int | None = None
    margin: int | None = None  # to the GPU's own limit: T.Limit
    slowdown_limit: int | None = None  # the margin at which it slows down
    slowdown: int | None = None  # degrees, of GPUs without T.Limit
    memory_temperature: int | None = None
    memory_max: int | None = None  # degrees
    recovery_action: int | None = None


class Activity(Part):
    at: float
    graphics: float | None = None  # 0..1
    sm: float | None = None
    tensor: float | None = None
    dram: float | None = None


class Ecc(Part):
    at: float
    correctable: int | None = None  # since the driver was loaded: DRAM and SRAM
    uncorrectable: int | None = None


class Rows(Part):
    at: float
    correctable: int | None = None
    uncorrectable: int | None = None
    pending: int | None = None
    failed: int | None = None


class Links(Part):
    at: float
    up: int | None = None
    total: int | None = None
    errors: int | None = None  # of all links, since the driver was loaded
    kib: int | None = None  # sent and received


class Pcie(Part):
    at: float
    width: int | None = None
    generation: int | None = None
    width_max: int | None = None
    generation_max: int | None = None
    replays: int | None = None
    errors: int | None = None
    tx: int | None = None  # bytes
    rx: int | None = None


class Fabric(Part):
    at: float
    state: int = 0
    status: int = 0
    summary: int = 0
    cluster: str = ""
    clique: int = 0


class Reading(Part):
    gpu: Identity
    error: int = 0  # NVML's, which ended the pass; 0: none
    failing: dict[str, int] = {}  # calls that should work and do not, with NVML's error
    fast: Fast | None = None
    heat: Heat | None = None
    activity: Activity | None = None
    ecc: Ecc | None = None
    links: Links | None = None
    rows: Rows | None = None
    pcie: Pcie | None = None
    fabric: Fabric | None = None


# ---------------------------------------------------------------- frames, child -> agent


class Opened(msgspec.Struct, tag="opened"):
    """NVML is there; what GPUs it has."""

    driver: str
    nvml: str
    gpus: list[Identity]
    errors: dict[int, int] = {}  # of GPUs that cannot be opened, by index


class Refused(msgspec.Struct, tag="refused"):
    """NVML cannot be used here."""

    error: int
    text: str


class Pass(msgspec.Struct, tag="pass"):
    readings: list[Reading]
    cpu_ms: float = 0.0  # of the sampling thread, for the whole pass


class Events(msgspec.Struct, tag="events"):
    """XIDs since the last of these: how often, by PCI address and code. Recovery actions: the newest."""

    xids: list[tuple[str, int, int]] = []
    actions: dict[str, int] = {}  # by UUID


class Blind(msgspec.Struct, tag="blind"):
    """The event set cannot be had, or can again ("")."""

    why: str


Frame = Opened | Refused | Pass | Events | Blind

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(Frame)
HEADER = 4


def encode(frame: Frame) -> bytes:
    data = _encoder.encode(frame)
    return len(data).to_bytes(HEADER, "little") + data


def decode(data: bytes) -> Frame:
    """Errors: msgspec.DecodeError."""
    frame: Frame = _decoder.decode(data)
    return frame


def pci_address(text: str) -> str:
    """One spelling: the kernel prints 0000:0f:00 or PCI:0000:0f:00, NVML 00000000:0F:00.0."""
    parts = text.lower().removeprefix("pci:").split(":")
    if len(parts) not in {2, 3} or not all(parts):
        return text
    domain, bus, device = parts if len(parts) == 3 else ("0", *parts)
    return f"{int(domain, 16):04x}:{bus}:{device if '.' in device else f'{device}.0'}"


class Order(msgspec.Struct, frozen=True):
    """What a sampling process is started for: the only argument, as JSON."""

    parent: int
    page: int  # descriptor
    known: tuple[Identity, ...] = ()  # as an earlier one of this boot found them: then nothing else is opened
    left_out: tuple[str, ...] = ()  # UUIDs, or indexes of GPUs that never told theirs
    only: tuple[str, ...] = ()  # UUIDs or indexes; empty: all
    passes: int = 0  # then it ends; 0: never; negative: it only says what there is
    events: bool = True
