"""Leaves a process behind that has its own session and no parent, and tries to commit late."""

import os
import sys
import time
from pathlib import Path

folder = Path(sys.argv[1])
attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"]) + 1
rank = int(os.environ["RANK"])
if attempt == 1 and rank == 0 and os.fork() == 0:
    os.setsid()
    if os.fork():
        os._exit(0)
    (folder / "writer.pid").write_text(str(os.getpid()))
    for number in range(3000):
        (folder / "beat").write_text(f"{attempt} {number}")
        time.sleep(0.01)
    os._exit(0)
if attempt == 1:
    while not (folder / "beat").exists():
        time.sleep(0.01)
    if rank == 1:
        os.kill(os.getpid(), 9)
    time.sleep(600)
pid = (folder / "writer.pid").read_text()
alive = Path(f"/proc/{pid}").exists()
before = (folder / "beat").read_text()
time.sleep(0.2)
wrote = (folder / "beat").read_text() != before
(folder / f"found-{rank}").write_text(f"alive={alive} wrote={wrote}")
