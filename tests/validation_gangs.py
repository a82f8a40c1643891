"""The parent of test_validate: forks gangs whose ranks are validations, sick ones among them."""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import keepstep.llama.preload
import keepstep.validate.run
from rank_gang import GangFailed, run_gang
from sickness import fall_sick


def validate(request: dict[str, Any], folder: Path) -> int:
    """On one rank, its lines in a file: a rank that hangs ends without a word to whoever started it."""
    rank = int(os.environ["RANK"])
    lines = os.open(folder / f"{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(lines, 1)
    if "sickness" in request:
        os.environ["SICKNESS"] = request["sickness"]
        fall_sick()
    return keepstep.validate.run.main(request["arguments"])


def answer(request: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            run_gang(request["ranks"], lambda: validate(request, folder))
        except GangFailed as error:
            if "died silently" not in str(error):
                return {"error": str(error)}
        return {
            "lines": [line for file in sorted(folder.iterdir()) for line in file.read_text().splitlines()]
        }


def main() -> None:
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
