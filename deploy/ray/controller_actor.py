"""keepstep's controller as a Ray actor, begun on one of the cluster's nodes.

    python controller_actor.py HOME PORT [OPTIONS of the controller]
    python controller_actor.py HOME PORT stop                              ends it and its agents

The actor is detached and Ray starts it again where it dies; HOME holds the store, so it must be a folder that
every node on which the actor may come up has, or --store names a PostgreSQL.
"""

import subprocess
import sys

import ray

NAME, NAMESPACE = "keepstep-controller", "keepstep"


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, max_concurrency=2)
class Controller:
    def __init__(self, home: str, port: int, options: list[str]) -> None:
        self._home = home
        self._process = subprocess.Popen(
            [
                sys.executable, "-m", "keepstep.cli.main", "controller", "--home", home, "--nodes", "0",
                "--host", ray.util.get_node_ip_address(), "--port", str(port),
                "--ray", ray.get_runtime_context().gcs_address, *options,
            ]
        )  # fmt: skip

    def alive(self) -> bool:
        return self._process.poll() is None

    def stop(self) -> int:
        command = [sys.executable, "-m", "keepstep.cli.main", "down", "--force", "--yes"]
        return subprocess.run(command, env={"KEEPSTEP_HOME": self._home}, check=False).returncode


def main() -> None:
    home, port, *options = sys.argv[1:]
    ray.init(namespace=NAMESPACE, log_to_driver=False)
    actor = Controller.options(name=NAME, lifetime="detached", get_if_exists=True).remote(
        home, int(port), options
    )
    if options == ["stop"]:
        print("stopped" if ray.get(actor.stop.remote()) == 0 else "it did not stop")
        ray.kill(actor)
    else:
        print("runs" if ray.get(actor.alive.remote()) else "ended: see the actor's log")


if __name__ == "__main__":
    main()
