"""A controller's process for the store's tests: `python store_holder.py MODE URL`.

beat    holds the lease and beats until it is refused, then prints the error's class and ends
stop    beats a little, stops itself between two beats, and beats on when somebody continues it
stream  adds events as fast as it can and prints each number once its commit came back
inside  stays inside a write transaction for ever
"""

import itertools
import os
import signal
import sys
import time

from keepstep.core.clock import SystemClock
from keepstep.core.errors import KeepstepError
from keepstep.store import Store, this_process
from keepstep.store.rows import NewEvent


def main(mode: str, url: str) -> None:
    store = Store.open(url, clock=SystemClock())
    store.acquire(this_process("http://holder.test", instance=mode), patience_s=1.0)
    print("holds", flush=True)
    match mode:
        case "beat" | "stop":
            try:
                for beats in itertools.count():
                    if mode == "stop" and beats == 5:
                        os.kill(os.getpid(), signal.SIGSTOP)
                    store.beat()
                    time.sleep(0.05)
            except KeepstepError as error:
                print(type(error).__name__, flush=True)
        case "stream":
            number = 0
            while True:
                number += 1
                with store.transaction() as write:
                    write.add_event(NewEvent(kind="test", text=str(number), data={"pad": "x" * 500}))
                print(number, flush=True)
        case "inside":
            with store.transaction() as write:
                write.add_event(NewEvent(kind="test", text="never committed"))
                print("inside", flush=True)
                while True:
                    time.sleep(1)
        case _:
            raise SystemExit(f"no mode {mode}")


if __name__ == "__main__":
    main(*sys.argv[1:])
