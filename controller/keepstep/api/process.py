"""The controller as a process: store, term, pools, cycle and HTTP, brought up in order, down in reverse.

It listens on loopback by default, announces itself in controller.json when it answers, and ends when it is
asked to, when its term is taken over, or after a while in which it had neither jobs nor clients.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import uvicorn
from fastapi import FastAPI

from keepstep.api.app import build
from keepstep.api.service import Service
from keepstep.control.health import Health
from keepstep.control.loop import Controller
from keepstep.control.repair import Command, Managed, Means, Repairs, Webhook
from keepstep.control.requests import Principal, want
from keepstep.core.clock import Clock, SystemClock, system_random
from keepstep.core.errors import Fenced, InputError, KeepstepError
from keepstep.core.home import Home, Running, announce, running_controller, start_ticks, withdraw
from keepstep.core.ids import Node, short
from keepstep.core.states import JOB
from keepstep.decide.plan import Policy
from keepstep.decide.view import Wanted
from keepstep.pools.local import LocalPool, LocalSettings
from keepstep.pools.pool import Pool
from keepstep.pools.ray.pool import RayPool, RaySettings
from keepstep.pools.static import StaticPool
from keepstep.store import Store, this_process
from keepstep.wire.messages import MAX_MESSAGE_BYTES

log = logging.getLogger(__name__)

_IDLE_LOOK_S = 5.0
_CANCEL_WITHIN_S = 60.0
_NAMES = "abcdefghijklmnopqrstuvwxyz"
_IDENTITY = "identity"  # the store's key


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    home: Home
    store_url: str | None = None  # None: SQLite in the home
    host: str = "127.0.0.1"
    port: int = 0  # 0: the one it had before if that is free, else any
    nodes: int = 1  # of the local pool
    slots: int = 0  # of each; 0: as many as GPUs, else processors
    return_after_s: float = 30.0  # a lost local node's way back
    health_policy: Path | None = None  # over keepstep's own
    ray: Callable[[str], RaySettings] | None = None  # a Ray cluster as a pool, by whose things are ours there
    idle_exit_s: float | None = None  # None: stays up without jobs and clients


def serve(settings: Settings) -> int:
    """Run the controller until it ends. Returns the exit code. Errors: InputError, Refused."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    settings.home.make()
    clock = SystemClock()
    health = Health(clock, settings.health_policy)
    store = Store.open(settings.store_url or f"sqlite:///{settings.home.store_file}", clock=clock)
    try:
        last_seen_at = store.lease().beat_at
        store.acquire(this_process())
        listener = _listen(settings)
        url = f"http://{settings.host}:{listener.getsockname()[1]}"
        pools = _pools(settings, clock, store, url)
        command = Command(settings.home.path / "repairs", clock)
        used = (pool.settings.address for pool in pools if isinstance(pool, RayPool))
        ray = next(used, os.environ.get("RAY_ADDRESS") or "auto")
        ways: dict[str, Means] = {
            "command": command,
            "webhook": Webhook(clock),
            "kubernetes": Managed(command, "keepstep.pools.kubernetes.repair"),
            "ray": Managed(command, "keepstep.pools.ray.drain", ("--address", ray)),
        }
        controller = Controller(
            store, clock, Policy(), pools, last_seen_at=last_seen_at, health=health, repairs=Repairs(ways)
        )
        return asyncio.run(_serve(settings, controller, listener))
    finally:
        store.close()


async def _serve(settings: Settings, controller: Controller, listener: socket.socket) -> int:
    loop = asyncio.get_running_loop()
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    loop.add_signal_handler(signal.SIGHUP, lambda: controller.begin(_reload(controller)))
    url = f"http://{settings.host}:{listener.getsockname()[1]}"
    service = Service(
        version=version("keepstep"),
        url=url,
        home=settings.home.path,
        clock=controller.clock,
        stop=stopping.set,
    )
    app = build(controller, service)
    server = _server(app)
    http = asyncio.create_task(_http(server, listener), name="http")
    ends: list[asyncio.Future[Any]] = [
        http,
        asyncio.create_task(controller.run(), name="cycle"),
        asyncio.create_task(stopping.wait()),
    ]
    if settings.idle_exit_s is not None:
        ends.append(asyncio.create_task(_idle(controller, service, settings.idle_exit_s)))
    _announce(settings.home, controller.store, url)
    done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    code = _why(done)
    if code == 0 and service.stop_agents:
        await _cancel_all(controller)
    app.state.streams.set()
    controller.tell()
    server.should_exit = True
    if code == 0:
        for pool in controller.pools.values():
            await pool.close(stop=service.stop_agents or settings.idle_exit_s is not None)
    for end in ends:
        if end is not http:
            end.cancel()
    with contextlib.suppress(asyncio.CancelledError, TimeoutError):
        await asyncio.wait_for(http, 10)
    await asyncio.gather(*ends, return_exceptions=True)
    if code == 0:
        controller.store.release()
    withdraw(settings.home)
    return code


async def _reload(controller: Controller) -> None:
    """SIGHUP. A policy that cannot be used is logged, and the old one stays."""
    try:
        await controller.reload_policy("SIGHUP")
    except KeepstepError as problem:
        log.error("the policy on node health stays as it was: %s", problem)


def _server(app: FastAPI) -> uvicorn.Server:
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            lifespan="off",
            ws="websockets-sansio",
            ws_max_size=MAX_MESSAGE_BYTES,
            timeout_graceful_shutdown=5,
            ws_ping_interval=None,
        )
    )
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    return server


def _announce(home: Home, store: Store, url: str) -> None:
    """Say where the controller is, with this start's own token."""
    issued = store.tokens.issue(name="local", role="admin", replace=True)
    store.beat(url=url)
    ticks = start_ticks(os.getpid()) or 0
    announce(home, Running(url=url, pid=os.getpid(), start_ticks=ticks, token=issued.secret, term=store.term))
    log.info("term %d, %s, store %s", store.term, url, store.name)


def _why(done: Iterable[asyncio.Future[Any]]) -> int:
    """0 for a wanted end; an error of the cycle is logged and ends the process."""
    for task in done:
        problem = task.exception()
        if isinstance(problem, Fenced):
            log.error("%s", problem)
            return problem.exit_code
        if problem is not None:
            log.error("the controller failed", exc_info=problem)
            return 1
    return 0


async def _http(server: uvicorn.Server, listener: socket.socket) -> None:
    await server.serve(sockets=[listener])


async def _idle(controller: Controller, service: Service, exit_s: float) -> None:
    """Return after `exit_s` without jobs and without requests."""
    clock = controller.clock
    busy_at = clock.monotonic()
    while True:
        await asyncio.sleep(min(_IDLE_LOOK_S, exit_s / 4))
        attached = any(m.session is not None and m.pool == "run" for m in controller.fleet.members.values())
        if controller.book.entries or attached:
            busy_at = clock.monotonic()
        if clock.monotonic() - max(busy_at, service.asked_at) > exit_s:
            log.info("no jobs and no clients for %g s: ending", exit_s)
            return


async def _cancel_all(controller: Controller) -> None:
    """`down --force`: every job is cancelled and seen dead, so that nothing is left behind."""
    who = Principal(name="keepstep down", project="default")
    for job in list(controller.book.entries):
        with contextlib.suppress(KeepstepError):
            await want(controller, job, Wanted.CANCEL, who, "the service is stopped")
    try:
        async with asyncio.timeout(_CANCEL_WITHIN_S):
            while any(entry.job.state not in JOB.final for entry in controller.book.entries.values()):
                await controller.told.wait()
    except TimeoutError:
        log.warning("jobs did not end within %g s: %s", _CANCEL_WITHIN_S, sorted(controller.book.entries))


def _pools(settings: Settings, clock: Clock, store: Store, url: str) -> list[Pool]:
    slots = settings.slots or os.cpu_count() or 1
    local = LocalSettings(
        nodes=tuple(_NAMES[: settings.nodes]), slots=slots, return_after_s=settings.return_after_s
    )
    pools: list[Pool] = [LocalPool(home=settings.home, clock=clock, settings=local), StaticPool()]
    if settings.ray is not None:
        ray = settings.ray(_identity(store))
        ray = ray if ray.url else replace(ray, url=_reached_at(url))
        log_file = settings.home.path / "pool-ray.log"
        issue = partial(_credential, store)
        pools.append(RayPool(settings=ray, clock=clock, log_file=log_file, issue=issue, term=int(store.term)))
    return pools


def _identity(store: Store) -> str:
    """The store's own: whoever holds its lease, from whatever machine, finds what an earlier holder made."""
    with store.transaction() as writer:
        known = writer.meta(_IDENTITY)
        if not known:
            known = short(system_random(), 8)
            writer.set_meta(_IDENTITY, known)
    return known


async def _credential(store: Store, node: Node) -> str:
    """For one node alone; the one before is not valid any more."""
    issue = partial(store.tokens.issue, name=f"node/{node}", kind="agent", node=node, replace=True)
    return (await asyncio.to_thread(issue)).secret


def _reached_at(url: str) -> str:
    """Where other machines find a controller that listens on all its addresses."""
    host = urlsplit(url).hostname or ""
    return url.replace(host, socket.gethostbyname(socket.gethostname()), 1) if host == "0.0.0.0" else url  # noqa: S104


def _listen(settings: Settings) -> socket.socket:
    """Bind before anything else is announced. Errors: InputError where the port is taken."""
    before = running_controller(settings.home)
    ports = [settings.port] if settings.port else [_earlier_port(settings.home), 0]
    if before is not None and before.pid != os.getpid():
        raise InputError(
            f"a controller (pid {before.pid}) already runs in {settings.home.path} at {before.url}"
        )
    for number, port in enumerate(ports):
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((settings.host, port))
        except OSError as problem:
            listener.close()
            if number + 1 < len(ports):
                continue
            raise InputError(
                f"cannot listen on {settings.host}:{port}", why=problem.strerror or str(problem),
                next="Give another --port, or none to take any that is free.",
            ) from problem  # fmt: skip
        return listener
    raise AssertionError("unreachable")


def _earlier_port(home: Home) -> int:
    """The port of the controller before, so that agents and contexts find this one again."""
    try:
        text = home.controller_file.read_text()
    except OSError:
        return 0
    digits = text.partition("127.0.0.1:")[2].partition('"')[0]
    return int(digits) if digits.isdigit() else 0
