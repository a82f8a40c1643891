"""keepstep's controller as a Ray actor: `python controller_actor.py HOME [PORT]` on a node of the cluster.

The actor is detached and Ray starts it again where it dies; HOME holds the store, so it must be a folder that
every node on which the actor may come up has (the store wants a disk that SQLite can lock, or give the
controller --store postgresql+psycopg://...). `python controller_actor.py HOME PORT stop` ends it and its
agents.
"""

import subprocess
import sys

import ray

NAME, NAMESPACE = "keepstep-controller", "keepstep"


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, max_concurrency=2)
class Controller:
    def __init__(self, home: str, port: int) -> None:
        self._home = home
        self._process = subprocess.Popen(
            [
                sys.executable, "-m", "keepstep.cli.main", "controller", "--home", home, "--nodes", "0",
                "--host", ray.util.get_node_ip_address(), "--port", str(port), "--ray", "auto",
            ]
        )  # fmt: skip

    def alive(self) -> bool:
        return self._process.poll() is None

    def stop(self) -> int:
        command = [sys.executable, "-m", "keepstep.cli.main", "down", "--force", "--yes"]
        return subprocess.run(command, env={"KEEPSTEP_HOME": self._home}, check=False).returncode


def main() -> None:
    home, port = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 7070
    ray.init(namespace=NAMESPACE, log_to_driver=False)
    actor = Controller.options(name=NAME, lifetime="detached", get_if_exists=True).remote(home, port)
    if sys.argv[3:] == ["stop"]:
        print("stopped" if ray.get(actor.stop.remote()) == 0 else "it did not stop")
        ray.kill(actor)
    else:
        print("runs" if ray.get(actor.alive.remote()) else "ended: see the actor's log")


if __name__ == "__main__":
    main()
