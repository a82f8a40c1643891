"""How long a person waits for `keepstep --help` and `keepstep list`, against a controller that runs.

The last line is one JSON object; seconds are medians of whole processes, start of the interpreter included.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from keepstep.cli import service
from keepstep.core.home import Home

TIMES = 15


def median_s(arguments: list[str], env: dict[str, str]) -> float:
    keepstep = Path(sys.executable).with_name("keepstep")
    took = []
    for _ in range(TIMES):
        began = time.perf_counter()
        subprocess.run([keepstep, *arguments], env=env, check=True, capture_output=True, timeout=60)
        took.append(time.perf_counter() - began)
    return statistics.median(took)


def main() -> None:
    home = Home(path=Path(tempfile.mkdtemp(prefix="keepstep-bench-")))
    env = {**os.environ, "KEEPSTEP_HOME": str(home.path), "KEEPSTEP_CONTEXT": "local"}
    try:
        service.start(home, service.Options(nodes=0))
        figures = {"help_s": median_s(["--help"], env), "list_s": median_s(["list"], env)}
    finally:
        service.stop(home, force=True)
        shutil.rmtree(home.path, ignore_errors=True)
    rounded = {name: round(value, 3) for name, value in figures.items()}
    print(json.dumps({"bench": "cli", "figures": rounded, "context": {"load": round(os.getloadavg()[0], 1)}}))


if __name__ == "__main__":
    main()
