"""The application: routes, errors as people can read them, bounds on what is taken in."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CollectorRegistry, generate_latest
from starlette.exceptions import HTTPException

from keepstep.api import agents, events, incidents, jobs, logs, nodes, service
from keepstep.api.metrics import Collector
from keepstep.control.loop import Controller
from keepstep.core.errors import InputError, KeepstepError, NotFound

BODY_MAX_BYTES = 4 << 20
BUNDLE_MAX_BYTES = 1 << 30
PREFIX = "/api/v1"


def build(controller: Controller, settings: service.Service) -> FastAPI:
    app = FastAPI(
        title="keepstep",
        version=settings.version,
        docs_url="/api/docs",
        openapi_url="/api/openapi.json",
        redoc_url=None,
    )
    app.state.controller, app.state.service = controller, settings
    app.state.streams = asyncio.Event()  # set when the service ends: streams end with it
    registry = CollectorRegistry(auto_describe=False)
    registry.register(Collector(controller))
    for module in (jobs, logs, incidents, events, nodes, service, agents):
        app.include_router(module.router, prefix=PREFIX)
    app.include_router(nodes.policies, prefix=PREFIX)
    app.add_exception_handler(KeepstepError, _known_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.middleware("http")(_bounded)

    @app.get("/healthz", include_in_schema=False)
    async def healthz() -> PlainTextResponse:
        return PlainTextResponse("ok\n")

    @app.get("/readyz", include_in_schema=False)
    async def readyz() -> PlainTextResponse:
        return PlainTextResponse(
            "ok\n" if controller.ready else "starting\n", 200 if controller.ready else 503
        )

    @app.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        return Response(generate_latest(registry), media_type="text/plain; version=0.0.4")

    return app


async def _bounded(request: Request, call: Callable[[Request], Awaitable[Response]]) -> Response:
    """Refuse what is too large before any of it is read."""
    state: service.Service = request.app.state.service
    state.asked_at = state.clock.monotonic()
    limit = BUNDLE_MAX_BYTES if request.url.path.startswith(f"{PREFIX}/bundles/") else BODY_MAX_BYTES
    length = request.headers.get("content-length", "0")
    if not length.isdigit() or int(length) > limit:
        return _answer(
            InputError(f"the request's body has {length} bytes, and {limit:,} is the most that is taken"), 413
        )
    if request.method in {"POST", "PUT"} and "content-length" not in request.headers:
        return _answer(
            InputError("the request has a body of unknown length", next="Send Content-Length."), 411
        )
    return await call(request)


def _answer(error: KeepstepError, status: int | None = None) -> JSONResponse:
    body: dict[str, Any] = {
        "what": error.what,
        "where": error.where,
        "why": error.why,
        "next": error.next,
        "kind": type(error).__name__,
        "exit_code": error.exit_code,
    }
    headers = {"WWW-Authenticate": "Bearer"} if body["what"] == "no token" else None
    return JSONResponse({"error": body}, 401 if headers else status or error.status, headers=headers)


async def _known_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, KeepstepError)
    return _answer(error)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return _answer(NotFound(f"nothing is at {request.method} {request.url.path}", next="See /api/docs."))
    return _answer(InputError(str(error.detail)), error.status_code)


async def _invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first.get("loc", ()))
    return _answer(InputError(str(first.get("msg", "not valid")), where=where))
