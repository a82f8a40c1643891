"""Records what an agent would have seen of an unchanged script: two ranks with the hook.

    record.py SCRIPT FILE [WORD...]     SCRIPT runs with these words; FILE is what false_alarms.py plays back

The file is one JSON object: `script`, and `looks`, each [seconds, [[phase, step, counter] of each rank],
{phase: [count, ranks, longest_s, {bin: count}]}]. The table is there only where somebody stood still for a
second or more: elsewhere nobody asks for it.
"""

import asyncio
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from hooked import LOAD_S, gang
from keepstep.agent.pulse import phases
from keepstep.agent.shimlink import Shim

LOOK_S = 0.25
STILL_S = 1.0


async def record(script: str, words: list[str]) -> list[Any]:
    text = f"import sys\nsys.argv += {words!r}\n" + script
    with tempfile.TemporaryDirectory() as folder:
        async with gang(Path(folder), text, ranks=2) as (shim, _):
            looks: list[Any] = []
            looking = asyncio.create_task(look(shim, looks))
            ending = await shim.ended(timeout_s=10 * LOAD_S)
            looking.cancel()
            await asyncio.gather(looking, return_exceptions=True)
            assert all(rank.exit_code == 0 for rank in ending.ranks), ending
            return looks


async def look(shim: Shim, looks: list[Any]) -> None:
    began = time.monotonic()
    moved: dict[int, tuple[int, float]] = {}
    while True:
        now = time.monotonic()
        ranks, still_s = [], 0.0
        for rank, beacon in sorted(shim.beacons.items()):
            seen = beacon.read()
            if seen is None:
                continue
            ranks.append([seen.phase.name.lower(), seen.step, seen.sequence])
            if moved.get(rank, (-1, 0.0))[0] != seen.sequence:
                moved[rank] = seen.sequence, now
            still_s = max(still_s, now - moved[rank][1])
        table = {}
        if still_s >= STILL_S:
            table = {
                one.phase: [one.count, one.ranks, one.longest_s, {k: n for k, n in enumerate(one.bins) if n}]
                for one in phases(shim.beacons.values())
            }
        looks.append([round(now - began, 3), ranks, table])
        await asyncio.sleep(LOOK_S)


def main() -> None:
    script, file, *words = sys.argv[1:]
    looks = asyncio.run(record(Path(script).read_text(), words))
    Path(file).write_text(json.dumps({"script": Path(script).stem, "looks": looks}, separators=(",", ":")))


if __name__ == "__main__":
    main()
