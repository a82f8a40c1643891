"""Figures as people read them."""

from typing import Any


def seconds(value: float | None) -> str:
    """A duration: 0.47 s, 12 s, 3 min 20 s, 5 h 2 min, 3 d 4 h."""
    if value is None:
        return "-"
    if value < 0:
        return "-" + seconds(-value)
    if value < 9.995:
        return f"{value:.2f} s"
    if value < 99.95:
        return f"{value:.1f} s"
    whole = round(value)
    if whole < 3600:
        return _pair(whole, 60, "min", 1, "s")
    if whole < 86_400:
        return _pair(whole, 3600, "h", 60, "min")
    return _pair(whole, 86_400, "d", 3600, "h")


def age(value: float | None) -> str:
    """A duration in one short word, for columns: 12s, 3m, 5h, 3d."""
    if value is None:
        return "-"
    for limit, unit, letter in ((100, 1, "s"), (6000, 60, "m"), (172_800, 3600, "h")):
        if value < limit:
            return f"{int(max(0, value) // unit)}{letter}"
    return f"{int(value // 86_400)}d"


def count(value: float | None) -> str:
    """3.8 k, 1.2 M; plain below a thousand."""
    if value is None:
        return "-"
    for limit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g} {letter}"
    return f"{value:.3g}"


def size(value: float | None) -> str:
    """Bytes in binary units."""
    if value is None:
        return "-"
    for limit, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= limit:
            return f"{value / limit:.1f} {unit}"
    return f"{value:.0f} B"


def figure(value: Any, digits: int = 3) -> str:
    """A measured number or '-'."""
    return f"{value:.{digits}f}" if isinstance(value, int | float) else "-"


def clock_time(wall: float | None) -> str:
    """A moment, in this machine's time zone: 11:02:07, with the date when it is not today's."""
    if wall is None:
        return "-"
    from datetime import datetime

    from keepstep.core.clock import SystemClock

    moment = datetime.fromtimestamp(wall).astimezone()
    today = datetime.fromtimestamp(SystemClock().wall()).astimezone().date()
    return f"{moment:%H:%M:%S}" if moment.date() == today else f"{moment:%Y-%m-%d %H:%M:%S}"


def _pair(value: int, large: int, large_unit: str, small: int, small_unit: str) -> str:
    whole, rest = divmod(value, large)
    below = rest // small
    if whole == 0:
        return f"{below} {small_unit}"
    return f"{whole} {large_unit} {below} {small_unit}" if below else f"{whole} {large_unit}"
