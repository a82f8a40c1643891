"""What a validation says: one line of JSON for each workload on each rank, among whatever else is printed.

The workloads are `keepstep.validate`, what follows from their results is `keepstep.decide.validation`.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from enum import StrEnum

MARK = "keepstep.validate "
TRAINING = "training"  # the last workload: whoever has said it has said everything


class Outcome(StrEnum):
    OK = "ok"
    WRONG = "wrong"  # it computed, moved or kept something else than it should have
    HUNG = "hung"  # not done within its deadline
    FAILED = "failed"  # an error instead of a result
    UNTESTED = "untested"  # the software here refuses the workload, whatever the device is like


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    rank: int
    workload: str
    outcome: Outcome
    device: str = ""  # kind, library and threads: what is equal here computes equal bits
    checksum: str = ""  # of what must be the same wherever `device` is
    figure: float = 0.0  # how fast, more is faster; 0: not measured
    unit: str = ""
    took_s: float = 0.0
    text: str = ""

    @property
    def line(self) -> str:
        return f"{MARK}{json.dumps(asdict(self))}"


_KNOWN = {field.name for field in fields(Result)}


def results(lines: Iterable[str]) -> Iterator[Result]:
    """Those among the lines of a log. What is none, or is cut off, is passed over."""
    for line in lines:
        _, mark, said = line.partition(MARK)
        try:
            value = json.loads(said) if mark else None
            if isinstance(value, dict):
                known = {name: part for name, part in value.items() if name in _KNOWN}
                yield Result(**{**known, "outcome": Outcome(value["outcome"])})
        except (ValueError, KeyError, TypeError):
            continue
