"""Two ranks with checkpoints of their own on a shared folder, written at any moment: nothing fences them.

Every write is noted in a journal of its rank by the machine's monotonic clock, so that a test on one machine
can tell whether two attempts ever wrote at the same time. A step needs both ranks: they meet over a plain
connection, which blocks for ever when the other one falls silent. With `tell` the steps are known.
"""

import os
import socket
import sys
import time
from pathlib import Path

from keepstep import session

folder, tell, steps = Path(sys.argv[1]), sys.argv[2] == "tell", int(sys.argv[3])
attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"]) + 1
rank = int(os.environ["RANK"])
state, meeting = folder / "state", folder / f"port-{attempt}"


def write(path: Path, text: str) -> None:
    draft = path.with_name(f"{path.name}-{attempt}.part")
    draft.write_text(text)
    draft.replace(path)


if rank == 0:
    listener = socket.create_server((os.environ["MASTER_ADDR"], 0))
    write(meeting, str(listener.getsockname()[1]))
    peer, _ = listener.accept()
else:
    while not meeting.exists():
        time.sleep(0.01)
    peer = socket.create_connection((os.environ["MASTER_ADDR"], int(meeting.read_text())))

journal = (folder / f"journal-{attempt}-{rank}").open("a", buffering=1)
start = int(state.read_text()) if state.exists() else 0
progress = session.current() if tell else None
for step in range(start + 1, steps + 1):
    journal.write(f"{time.monotonic()}\n")
    peer.sendall(b"x")
    if not peer.recv(1):
        sys.exit("the other rank is gone")
    if rank == 0:
        write(state, str(step))
    if progress is not None:
        progress.step_done(step)
    time.sleep(0.05)
