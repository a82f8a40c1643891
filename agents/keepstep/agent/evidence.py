"""Why a rank ended: what it wrote to torchrun's error file, and the last it printed. Bounded in size."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_TAIL_BYTES = 32 << 10
_LINES = 20
_LINE_CHARACTERS = 300
_ERROR_CHARACTERS = 1000
_ERROR_FILE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    error: str = ""  # the error file's message, else the last line of the log
    last_lines: tuple[str, ...] = ()


def log_file(directory: Path, rank: int) -> Path:
    return directory / f"rank-{rank}.log"


def error_file(directory: Path, rank: int) -> Path:
    return directory / f"error-{rank}.json"


def control_socket(directory: Path, rank: int) -> Path:
    return directory / f"control-{rank}.sock"


def collect(directory: Path, rank: int) -> Evidence:
    lines = _last_lines(log_file(directory, rank))
    error = _error_message(error_file(directory, rank)) or next(
        (line for line in reversed(lines) if line.strip()), ""
    )
    return Evidence(error=error[:_ERROR_CHARACTERS], last_lines=lines)


def _last_lines(path: Path) -> tuple[str, ...]:
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _TAIL_BYTES))
            tail = file.read(_TAIL_BYTES)
    except OSError:
        return ()  # it never printed
    lines = tail.decode(errors="replace").splitlines()
    if size > _TAIL_BYTES:
        lines = lines[1:]
    return tuple(line[:_LINE_CHARACTERS] for line in lines[-_LINES:])


def _error_message(path: Path) -> str:
    """Of the JSON that torch.distributed.elastic's `record` writes; "" for anything else."""
    try:
        with path.open("rb") as file:
            content: Any = json.loads(file.read(_ERROR_FILE_BYTES))
    except (OSError, ValueError):
        return ""
    message = content.get("message") if isinstance(content, dict) else None
    if isinstance(message, dict):
        message = message.get("message")
    return message if isinstance(message, str) else ""
