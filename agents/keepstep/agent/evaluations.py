"""What ranks write of their evaluations: lines of JSON beside job.json, read as they come.

    {"step": 40, "loss": 2.931, "by_source": {"code": 2.104, "web": 3.758}}

One in some minutes, with names: that is nothing for a page of shared memory. An agent that starts anew reads
all of them again; the store knows which it has.
"""

import json
from pathlib import Path
from typing import Any

FILE = "evaluations.jsonl"
_READ_MAX = 1 << 20  # bytes at a time


class Evaluations:
    def __init__(self, folder: Path) -> None:
        self._path, self._offset = folder / FILE, 0

    def news(self) -> list[dict[str, Any]]:
        """Whole lines that were added since; what is no evaluation is passed over."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                read = file.read(_READ_MAX)
        except OSError:
            return []  # none yet, as a rule
        whole = read[: read.rfind(b"\n") + 1]
        self._offset += len(whole)
        return [found for line in whole.splitlines() if (found := _evaluation(line)) is not None]


def _evaluation(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
        return {
            "step": int(value["step"]),
            "losses": {"": float(value["loss"]), **{str(k): float(v) for k, v in value["by_source"].items()}},
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
