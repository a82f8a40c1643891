"""Links as the kernel counts them, from /sys; and whether a buddy's carrier takes a connection."""

import asyncio
import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

_CONNECT_S = 3.0
_ERRORS = ("rx_errors", "tx_errors", "rx_crc_errors", "rx_missed_errors")
# https://docs.kernel.org/infiniband/sysfs.html and the counters that vendors add
_INFINIBAND_ERRORS = (
    "symbol_error", "link_error_recovery", "port_rcv_errors", "local_link_integrity_errors",
    "excessive_buffer_overrun_errors",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Interface:
    name: str
    state: str  # up | down | unknown (of interfaces that have no carrier to tell) ...
    errors: int
    carrier_changes: int
    physical: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Port:
    name: str  # mlx5_0/1
    active: bool
    errors: int
    downed: int


def interfaces(sys: Path = Path("/sys")) -> tuple[Interface, ...]:
    return tuple(
        Interface(
            name=entry.name,
            state=_text(entry / "operstate"),
            errors=sum(_number(entry / "statistics" / name) for name in _ERRORS),
            carrier_changes=_number(entry / "carrier_changes"),
            physical=(entry / "device").exists(),
        )
        for entry in sorted((sys / "class/net").iterdir())
        if (entry / "operstate").exists()
    )


def ports(sys: Path = Path("/sys")) -> tuple[Port, ...]:
    """Of InfiniBand adapters; empty where there are none."""
    return tuple(
        Port(
            name=f"{port.parents[1].name}/{port.name}",
            active=_text(port / "state").startswith("4"),  # "4: ACTIVE"
            errors=sum(_number(port / "counters" / name) for name in _INFINIBAND_ERRORS),
            downed=_number(port / "counters/link_downed"),
        )
        for port in sorted((sys / "class/infiniband").glob("*/ports/*"))
    )


async def reaches(host: str, port: int) -> str:
    """ "" when it takes a connection, else why it does not."""
    try:
        async with asyncio.timeout(_CONNECT_S):
            _, writer = await asyncio.open_connection(host, port)
    except TimeoutError:
        return f"no answer within {_CONNECT_S:g} s"
    except OSError as error:
        return os.strerror(error.errno) if error.errno else str(error)
    writer.close()
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(_CONNECT_S):
            await writer.wait_closed()
    return ""


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:  # this driver does not count it
        return ""


def _number(path: Path) -> int:
    text = _text(path)
    return int(text) if text.isdecimal() else 0
