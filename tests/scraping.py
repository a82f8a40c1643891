"""A real Prometheus that scrapes one address, and promtool's word on what stands there."""

import contextlib
import json
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_WITHIN_S = 60.0
missing = "" if shutil.which("prometheus") and shutil.which("promtool") else (
    "no prometheus and promtool on this machine (Debian: apt install prometheus)"
)  # fmt: skip


def complaints(text: str) -> list[str]:
    """What promtool finds wrong. dcgm-exporter's names and labels are as they are."""
    linted = subprocess.run(
        ["promtool", "check", "metrics"], input=text, text=True, capture_output=True, timeout=60, check=False
    )
    lines = [line for line in linted.stderr.splitlines() if line]
    return [line for line in lines if "DCGM" not in line and "camelCase" not in line]


@contextmanager
def scraping(folder: Path, url: str) -> Iterator[Callable[[str], float]]:
    """Gives a function that answers a query as soon as Prometheus can."""
    target = url.removeprefix("http://").removesuffix("/metrics")
    (folder / "prometheus.yml").write_text(
        "global: {scrape_interval: 1s}\n"
        f"scrape_configs: [{{job_name: keepstep, static_configs: [{{targets: ['{target}']}}]}}]\n"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [
        "prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/tsdb",
        f"--web.listen-address={address}",
    ]  # fmt: skip
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        yield lambda query: _answer(address, query)
    finally:
        process.terminate()
        process.wait(30)


def _answer(address: str, query: str) -> float:
    deadline = time.monotonic() + _WITHIN_S
    url = f"http://{address}/api/v1/query?" + urllib.parse.urlencode({"query": query})
    while True:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=10) as answer:
            if found := json.load(answer)["data"]["result"]:
                return float(found[0]["value"][1])
        assert time.monotonic() < deadline, f"Prometheus has nothing for {query}"
        time.sleep(0.2)
