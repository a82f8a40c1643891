"""`python -m keepstep.agent.carrier DIR ADDRESS`: detaches itself, prints nothing, and serves."""

import asyncio
import fcntl
import logging
import os
import socket
import sys
from pathlib import Path

from keepstep.agent.carrier.server import Server
from keepstep.agent.rank import processes
from keepstep.agent.rank.protocol import write_atomically
from keepstep.agent.rank.spawn import redirect
from keepstep.core.clock import SystemClock

LOCK, STATE, LOG = "carrier.lock", "carrier.json", "carrier.log"


def main(directory: Path, address: str) -> None:
    lock = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SystemExit("another carrier has this folder") from None
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.bind((address, 0))
        listener.listen(64)
        listener.setblocking(False)
        asyncio.run(_serve(directory, listener))
    os._exit(0)  # with gigabytes of slots in it, an orderly end is only slower


async def _serve(directory: Path, listener: socket.socket) -> None:
    server = Server(directory, listener, SystemClock())
    me = processes.itself()
    write_atomically(directory / STATE, {"pid": me.pid, "start_ticks": me.start_ticks})
    await server.run()


def detached(directory: Path, address: str) -> None:
    """In a session of its own, nobody's child."""
    if os.fork():
        os.wait()
        return
    os.setsid()
    if os.fork():
        os._exit(0)
    redirect(directory / LOG)
    os.closerange(3, 1 << 16)
    main(directory, address)


if __name__ == "__main__":
    detached(Path(sys.argv[1]), sys.argv[2])
