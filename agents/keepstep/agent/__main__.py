"""`python -m keepstep.agent`: what `keepstep agent` runs, without the command line's imports."""

import argparse
import logging
import sys
from pathlib import Path

from keepstep.agent.main import run_agent
from keepstep.agent.settings import AgentSettings
from keepstep.core.errors import InputError, KeepstepError


def parse(arguments: list[str] | None = None) -> AgentSettings:
    parser = argparse.ArgumentParser(
        prog="keepstep agent", description="Run a node's agent in the foreground."
    )
    add = parser.add_argument
    add("--dir", type=Path, required=True, help="this agent's own state folder, on a local disk")
    add("--node", help="the node's name [the host name]")
    add("--controller", action="append", default=[], metavar="URL", help="may be given more than once")
    add("--endpoint-file", type=Path, metavar="FILE", help="JSON with url and token, read at each connection")
    add("--token-file", type=Path, metavar="FILE", help="a token to join with, or another one")
    add("--pool", default="static")
    add("--role", choices=("run", "watch", "run+watch"), default="run")
    add("--slots", type=int, help="ranks at once [one for each GPU, else for each CPU]")
    add("--gpus", help="UUIDs or indexes, with commas; empty: none [all there are]")
    add("--label", action="append", default=[], metavar="NAME=VALUE")
    add("--address", help="where ranks of other nodes reach this node's [the route to the controller]")
    add("--interface", help="the network interface of that address")
    add(
        "--snapshot-bytes",
        type=int,
        metavar="N",
        help="at most for one rank's snapshots [half of what is free]",
    )
    add("--attached", action="store_true", help="belongs to a terminal: when it goes, its ranks go")
    add(
        "--leash",
        action="store_true",
        help="belongs to who holds its standard input's other end: when that closes, its ranks go at once",
    )
    add("--drain", action="store_true", help="end the ranks before leaving")
    add(
        "--standby",
        choices=("auto", "fork", "processes"),
        default="auto",
        help="what ranks are made from: forks of one process, or one for each rank [processes on GPUs]",
    )
    add("--standby-context", action="store_true", help="such processes create their CUDA contexts ahead")
    add("--standby-linger", type=float, default=300.0, metavar="SECONDS", help="kept so long without a job")
    add("--standby-memory", type=float, metavar="GIB", help="of all standby servers together [no limit]")
    add(
        "--exit-when-orphaned", type=float, metavar="SECONDS", help="without controller and ranks for so long"
    )
    add("--no-probes", action="store_true", help="do not look after this node's health")
    add("--kernel-log", default="/dev/kmsg", metavar="FILE", help="or '' for none [/dev/kmsg]")
    add("--metrics", metavar="[ADDRESS:]PORT", help="serve /metrics there [not at all; address: 127.0.0.1]")
    add(
        "--driver-call",
        type=float,
        default=3.0,
        metavar="SECONDS",
        help="a GPU driver's call that takes longer hangs",
    )
    add(
        "--driver-trial",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="until a GPU that hangs is tried again",
    )
    given = parser.parse_args(arguments)
    gpus = None if given.gpus is None else tuple(filter(None, given.gpus.split(",")))
    labels = dict(label.split("=", 1) for label in given.label if "=" in label)
    memory = None if given.standby_memory is None else int(given.standby_memory * (1 << 30))
    values = {
        "dir": given.dir, "controllers": tuple(given.controller), "endpoint_file": given.endpoint_file,
        "token_file": given.token_file, "pool": given.pool, "role": given.role, "slots": given.slots,
        "gpus": gpus, "labels": labels, "address": given.address, "interface": given.interface,
        "attached": given.attached, "leash": given.leash, "drain": given.drain,
        "exit_when_orphaned_s": given.exit_when_orphaned,
        "standby_bytes_max": memory, "standby_context": given.standby_context,
        "standby_linger_s": given.standby_linger,
        "standby_processes": None if given.standby == "auto" else given.standby == "processes",
        "snapshot_bytes": given.snapshot_bytes, "probes": not given.no_probes,
        "kernel_log": Path(given.kernel_log) if given.kernel_log else None,
        "metrics": None if given.metrics is None else _address(given.metrics),
        "driver_call_s": given.driver_call, "driver_trial_s": given.driver_trial,
    }  # fmt: skip
    return AgentSettings(**values) if given.node is None else AgentSettings(node=given.node, **values)


def _address(text: str) -> tuple[str, int]:
    """Errors: InputError."""
    host, _, port = text.rpartition(":")
    if not port.isdecimal() or int(port) > 65535:
        raise InputError(f"--metrics {text!r} is no address", next="Write a port, or ADDRESS:PORT.")
    return host.strip("[]") or "127.0.0.1", int(port)


def main(arguments: list[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    try:
        return run_agent(parse(arguments))
    except KeepstepError as error:
        print(error, file=sys.stderr)  # noqa: T201 - to a person or a service manager
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
