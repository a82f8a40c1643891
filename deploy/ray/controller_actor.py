"""keepstep's controller as a Ray actor, begun on one of the cluster's nodes.

    python controller_actor.py HOME PORT [OPTIONS of the controller]
    python controller_actor.py HOME PORT stop                              ends it and its agents

The actor is detached. Ray starts it again where it dies, as it does when the controller is killed; one that
ends by itself has said why in the log of the actor, and stays ended. HOME holds the store, so it must be a
folder that every node on which the actor may come up has, or --store names a PostgreSQL.
"""

import os
import subprocess
import sys
import threading

import ray

NAME, NAMESPACE = "keepstep-controller", "keepstep"


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, max_concurrency=2)
class Controller:
    def __init__(self, home: str, port: int, options: list[str]) -> None:
        self._home, self._stopping = home, False
        self._process = subprocess.Popen(
            [
                sys.executable, "-m", "keepstep.cli.main", "controller", "--home", home, "--nodes", "0",
                "--host", ray.util.get_node_ip_address(), "--port", str(port),
                "--ray", ray.get_runtime_context().gcs_address, *options,
            ]
        )  # fmt: skip

        threading.Thread(target=self._mind, name="controller", daemon=True).start()

    def _mind(self) -> None:
        code = self._process.wait()
        if self._stopping:
            return
        if code >= 0:
            ray.kill(ray.get_runtime_context().current_actor)
        os._exit(1)

    def alive(self) -> bool:
        return self._process.poll() is None

    def stop(self) -> int:
        self._stopping = True
        command = [sys.executable, "-m", "keepstep.cli.main", "down", "--force", "--yes"]
        environment = {**os.environ, "KEEPSTEP_HOME": self._home}
        return subprocess.run(command, env=environment, check=False).returncode


def main() -> None:
    home, port, *options = sys.argv[1:]
    ray.init(namespace=NAMESPACE, log_to_driver=False)
    if options == ["stop"]:
        try:
            actor = ray.get_actor(NAME)
        except ValueError:
            sys.exit(f"no actor {NAME} runs here")
        print("stopped" if ray.get(actor.stop.remote()) == 0 else "it did not stop")
        ray.kill(actor)
    else:
        begin = Controller.options(name=NAME, lifetime="detached", get_if_exists=True)
        actor = begin.remote(home, int(port), options)
        print("runs" if ray.get(actor.alive.remote()) else "ended: see the actor's log")


if __name__ == "__main__":
    main()
