"""The actor on each node: starts keepstep's agent as a child process, and ends it.

The agent holds one end of a pipe as its standard input. When this actor is gone, however it went, the pipe
closes and the agent ends its ranks: Ray has given their GPUs to somebody else. A raylet that dies leaves its
actors alive for minutes; so this one looks for its parent itself, and goes with it. An agent that was killed
is started again at once: what ran under it is its to adopt. (Ray kills an actor's own children with it, so
the agent is a grandchild.)
"""

import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from keepstep.core.clock import SystemClock

_CLOCK = SystemClock()
_LOOK_S = 0.2
_AGAIN_S = 1.0  # an agent that ends is not started more often than this
_LEAVE_WITHIN_S = 20.0
_ASK_S = 5.0
_OURS = ("RAY_", "OMP_NUM_THREADS", "PYTHONPATH")  # what Ray sets for its workers is not for ranks

# Ray kills an actor's children, so a shell stands between; it says the agent's pid, and later its exit code.
_SCRIPT = """umask 077; exec 3<&0
{ "$@" <&3 3<&- >>"$KEEPSTEP_LOG" 2>&1 & echo $!; exec >&- 2>&-
  wait $!; echo $? >"$KEEPSTEP_EXIT.tmp"; mv "$KEEPSTEP_EXIT.tmp" "$KEEPSTEP_EXIT"; } &"""


class Keeper:
    def __init__(self, folder: str, node: str, arguments: tuple[str, ...], endpoint: str, group: str) -> None:
        self._folder = Path(folder)
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._command = [
            sys.executable, "-m", "keepstep.agent", "--dir", folder, "--node", node, "--leash",
            "--endpoint-file", str(self._folder / "endpoint.json"), *arguments,
        ]  # fmt: skip
        self._group, self._raylet = group, os.getppid()
        self._lock = threading.Lock()
        self._pid, self._began, self._leash = 0, 0.0, -1
        self._leaving = self._left = False
        self.renew(endpoint)
        threading.Thread(target=self._mind, name="keepstep", daemon=True).start()

    def renew(self, endpoint: str) -> int:
        """Where the controller is and what to show it. The same again changes nothing. The agent's pid."""
        with self._lock:
            path = self._folder / "endpoint.json"
            temporary = path.with_suffix(".tmp")
            with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
                file.write(endpoint)
            temporary.replace(path)
            self._left = False
            if not self._leaving and not self._alive():
                self._begin()
            return self._pid

    def leave(self) -> None:
        """End the agent, and then this actor. Asked twice, it is done once."""
        self._leaving = True

    def left(self) -> bool:
        """Its agent went by itself: nothing ran on it, and no controller came for long."""
        return self._left

    def _begin(self) -> None:
        exit_file = self._folder / "exit"
        exit_file.unlink(missing_ok=True)
        reading, self._leash = os.pipe()
        environment = {key: value for key, value in os.environ.items() if not key.startswith(_OURS)}
        environment |= {
            "KEEPSTEP_LOG": str(self._folder / "agent.log"),
            "KEEPSTEP_EXIT": str(exit_file),
        }
        try:
            said = subprocess.run(
                ["/bin/sh", "-c", _SCRIPT, "sh", *self._command], stdin=reading, stdout=subprocess.PIPE,
                cwd=self._folder, env=environment, start_new_session=True, check=True,
                timeout=_LEAVE_WITHIN_S,
            )  # fmt: skip
        finally:
            os.close(reading)
        self._pid = int(said.stdout)
        self._began = _CLOCK.monotonic()

    def _alive(self) -> bool:
        return self._pid != 0 and Path(f"/proc/{self._pid}").exists() and not self._exit_code()

    def _exit_code(self) -> str:
        try:
            return (self._folder / "exit").read_text().strip()
        except FileNotFoundError:
            return ""

    def _mind(self) -> None:
        asked_at = 0.0
        rest = _until_gone(self._raylet)
        while True:
            rest()
            now = _CLOCK.monotonic()
            if self._leaving or os.getppid() != self._raylet:
                self._go()
            with self._lock:
                if self._alive() or self._leaving:
                    continue
                self._left = self._left or self._exit_code() == "0"
                if not self._left and now - self._began >= _AGAIN_S:
                    os.close(self._leash)
                    self._begin()
            if self._left and now - asked_at >= _ASK_S:
                asked_at = now
                self._let_go()

    def _go(self) -> None:
        """Let the agent end everything, make sure of it, and go."""
        os.close(self._leash)
        deadline = _CLOCK.monotonic() + _LEAVE_WITHIN_S
        while self._alive() and _CLOCK.monotonic() < deadline:
            time.sleep(_LOOK_S / 4)
        if self._alive():
            os.kill(self._pid, signal.SIGKILL)
        if os.getppid() == self._raylet:
            import ray

            ray.kill(ray.get_runtime_context().current_actor)  # Ray is not to think that it crashed
            time.sleep(_LOOK_S * 5)
        os._exit(0)

    def _let_go(self) -> None:
        """Nobody is left to remove the group of a controller that never came back, so the last one does."""
        import ray
        from ray.util import get_placement_group, list_named_actors, remove_placement_group

        try:
            mine = [name for name in list_named_actors() if name.startswith(f"{self._group}/")]
            others = [ray.get_actor(name) for name in mine]
            asked = [actor.left.remote() for actor in others]
            if all(ray.get(asked, timeout=_ASK_S)) and self._left:
                remove_placement_group(get_placement_group(self._group))
        except (ray.exceptions.RayError, ValueError):
            return  # one of them is going at this moment: asked again


def _until_gone(pid: int) -> Callable[[], object]:
    """Waits for `_LOOK_S`, and no longer than the process lives."""
    try:
        process = os.pidfd_open(pid)
    except OSError:  # it is gone already, or the kernel is too old
        return lambda: time.sleep(_LOOK_S)
    watch = select.poll()
    watch.register(process, select.POLLIN)
    return lambda: watch.poll(_LOOK_S * 1000)
