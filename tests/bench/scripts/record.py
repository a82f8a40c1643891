"""Records what an agent would have seen of an unchanged script: two ranks with the hook.

    record.py FILE SCRIPT [WORD...]     SCRIPT runs with these words; tests/recorded.py plays FILE back

FILE is one JSON object: `command`, and `looks`, each [seconds, [[phase, step, counter] of each rank]], with a
table {phase: [count, ranks, longest_s, {bin: count}]} where a rank had stood still for a second, every few
looks, and at the end. What a script's own time-outs and restarts would do is not in it: both ranks must
come to their end.
"""

import asyncio
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from hooked import HOOKED, gang
from keepstep.agent.pulse import phases
from keepstep.agent.shimlink import Shim

LOOK_S, STILL_S, TABLE_EVERY = 0.25, 1.0, 60
WITHIN_S = 1800.0
ELASTIC = {"TORCHELASTIC_RUN_ID": "recorded", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}  # as under torchrun


async def record(script: str, words: list[str]) -> list[list[Any]]:
    text = f"import sys\nsys.argv += {words!r}\n{script}"
    with tempfile.TemporaryDirectory() as folder:
        async with gang(Path(folder), text, ranks=2, env=HOOKED | ELASTIC) as (shim, _):
            looks: list[list[Any]] = []
            looking = asyncio.create_task(look(shim, looks))
            ending = await shim.ended(timeout_s=WITHIN_S)
            looking.cancel()
            await asyncio.gather(looking, return_exceptions=True)
            assert all(rank.exit_code == 0 for rank in ending.ranks), ending
            looks[-1].append(table(shim))
            return looks


async def look(shim: Shim, looks: list[list[Any]]) -> None:
    began = time.monotonic()
    moved: dict[int, tuple[int, float]] = {}
    told_s = 0.0
    while True:
        now = time.monotonic()
        ranks = []
        for rank, beacon in sorted(shim.beacons.items()):
            if (seen := beacon.read()) is not None:
                ranks.append([seen.phase.name.lower(), seen.step, seen.sequence])
                if moved.get(rank, (-1, 0.0))[0] != seen.sequence:
                    moved[rank] = seen.sequence, now
        since = min((at for _, at in moved.values()), default=now)
        looks.append([round(now - began, 3), ranks])
        if (now - since >= STILL_S and told_s <= since) or len(looks) % TABLE_EVERY == 0:
            looks[-1].append(table(shim))
            told_s = now
        await asyncio.sleep(LOOK_S)


def table(shim: Shim) -> dict[str, Any]:
    return {
        one.phase: [one.count, one.ranks, one.longest_s, {k: n for k, n in enumerate(one.bins) if n}]
        for one in phases(shim.beacons.values())
    }


def main() -> None:
    file, script, *words = sys.argv[1:]
    looks = asyncio.run(record(Path(script).read_text(), words))
    command = " ".join([Path(script).name, *words])
    lines = ",\n".join(json.dumps(each, separators=(",", ":")) for each in looks)
    Path(file).write_text(f'{{"command": {json.dumps(command)}, "looks": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
