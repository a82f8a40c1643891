"""A controller and three agents of the static pool, each on a host of its own (tests/hosts.py).

What is asked again and again is asked by one process on the controller's host: a command line for each
question would take a processor from the ranks whose progress is waited for.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hosts import Hosts
from keepstep.cli import service
from keepstep.core.home import Home, running_controller

AGENTS = ("n1", "n2", "n3")


@contextmanager
def standing(folder: Path) -> Iterator["Site"]:
    """Needs what `hosts.missing` looks for."""
    with Hosts(("ctl", *AGENTS)) as hosts:
        site = Site(hosts, folder)
        try:
            site.start()
            yield site
        finally:
            site.close()


class Site:
    """The hosts with a controller and agents of the static pool on them."""

    def __init__(self, hosts: Hosts, folder: Path) -> None:
        self.hosts, self.folder = hosts, folder
        self.home = folder / "controller"
        self.shared = folder / "shared"
        self.shared.mkdir()
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._asker: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        address = self.hosts.address("ctl", "management")
        self._spawn("ctl", "controller", "--home", str(self.home), "--nodes", "0", "--host", address)
        self.until((self.home / "controller.json").exists, "the controller to answer")
        url = json.loads((self.home / "controller.json").read_text())["url"]
        self._asker = subprocess.Popen(
            self.hosts.command("ctl", sys.executable, __file__, str(self.home)),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        token = self.keepstep("token", "create", "join", "--join", "-o", "json")["secret"]
        for name in AGENTS:
            file = self.folder / f"{name}.token"
            file.write_text(token)
            file.chmod(0o600)
            self._spawn(
                name, "agent", "--controller", url, "--token-file", str(file), "--node", name,
                "--dir", str(self.folder / name), "--slots", "4", "--pool", "static",
                "--address", self.hosts.address(name, "training"),
                "--interface", self.hosts.interface("training"),
            )  # fmt: skip
        self.until(lambda: len(self._connected()) == 3, "three agents to register")

    def keepstep(self, *arguments: str) -> Any:
        env = {**os.environ, "KEEPSTEP_HOME": str(self.home)}
        command = self.hosts.command("ctl", sys.executable, "-m", "keepstep.cli.main", *arguments)
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout) if "json" in arguments else done.stdout.strip()

    def get(self, path: str) -> Any:
        """What the API answers."""
        asker = self._asker
        assert asker is not None and asker.stdin is not None and asker.stdout is not None
        asker.stdin.write(f"{path}\n".encode())
        asker.stdin.flush()
        return json.loads(asker.stdout.readline())

    def job(self, ref: str) -> Any:
        return self.get(f"/jobs/{ref}")

    def until(self, condition: Callable[[], Any], what: str, within_s: float = 90.0) -> None:
        deadline = time.monotonic() + within_s
        while not condition():
            if time.monotonic() > deadline:
                raise AssertionError(f"waited {within_s} s for {what}\n{self._logs()}")
            time.sleep(0.1)

    def until_step(self, job: str, step: int, *, attempt: int = 1, within_s: float = 120.0) -> None:
        def reached() -> bool:
            told = self.job(job)
            assert told["state"] not in {"failed", "cancelled"}, told["reason"]
            ranks = self.get(f"/jobs/{job}/ranks")["ranks"]
            now = max((rank["step"] for rank in ranks), default=-1)
            return bool(told["attempt"] and told["attempt"]["number"] >= attempt and now >= step)

        self.until(reached, f"step {step} of attempt {attempt}", within_s)

    def close(self) -> None:
        if self._asker is not None:
            self._asker.kill()
            self._asker.communicate()
        for host, process in self.processes.items():
            if process.poll() is None:  # an interrupted agent ends its ranks, also when a test has failed
                process.send_signal(signal.SIGTERM if host == "ctl" else signal.SIGINT)
        for process in self.processes.values():
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _connected(self) -> list[str]:
        return [node["name"] for node in self.get("/nodes")["nodes"] if node["connected"]]

    def _spawn(self, host: str, *arguments: str) -> None:
        log = (self.folder / f"{host}.log").open("ab")
        command = self.hosts.command(host, sys.executable, "-m", "keepstep.cli.main", *arguments)
        self.processes[host] = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        log.close()

    def _logs(self) -> str:
        return "\n".join(f"--- {p.name}\n{p.read_text()[-3000:]}" for p in sorted(self.folder.glob("*.log")))


def _answer(home: Path) -> None:
    """Paths of the API come in, answers go out, a line each."""
    running = running_controller(Home(path=home))
    assert running is not None
    client = service.client(running)
    for path in sys.stdin:
        print(json.dumps(client.get(path.strip())), flush=True)


if __name__ == "__main__":
    _answer(Path(sys.argv[1]))
