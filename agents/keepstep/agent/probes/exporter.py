"""A small HTTP server for one page: `/metrics`, as text or as OpenMetrics, whichever is asked for."""

import asyncio
import logging
from contextlib import suppress

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

_log = logging.getLogger("keepstep.agent")
_REQUEST_BYTES, _REQUEST_S, _BIND_AGAIN_S = 16 << 10, 10.0, 30.0
_AT_ONCE = 16


class Exporter:
    def __init__(self, address: str, port: int, metrics: Collector) -> None:
        self._address, self._port = address, port
        self._registry = CollectorRegistry()
        self._registry.register(metrics)
        self._slots = asyncio.Semaphore(_AT_ONCE)

    async def run(self) -> None:
        """Until cancelled. A port that is taken is asked for again: an agent does not end for that."""
        said = False
        while True:
            try:
                server = await asyncio.start_server(
                    self._serve, self._address, self._port, limit=_REQUEST_BYTES
                )
            except OSError as error:
                if not said:
                    _log.warning("no metrics at %s:%d: %s", self._address, self._port, error)
                said = True
                await asyncio.sleep(_BIND_AGAIN_S)
                continue
            host, port = server.sockets[0].getsockname()[:2]
            _log.info("metrics at http://%s:%d/metrics", host, port)
            async with server:
                await server.serve_forever()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(_REQUEST_S), self._slots:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                writer.write(self._answer(head))
                await writer.drain()
        except (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    def _answer(self, head: list[str]) -> bytes:
        method, _, rest = head[0].partition(" ")
        path = rest.split(" ")[0].partition("?")[0]
        headers = {
            name.strip().lower(): value.strip()
            for name, _, value in (line.partition(":") for line in head[1:])
        }
        if method not in {"GET", "HEAD"}:
            return _response(
                "405 Method Not Allowed", "text/plain", b"only GET is answered here\n", head=False
            )
        if path != "/metrics":
            return _response("404 Not Found", "text/plain", b"there is /metrics\n", head=method == "HEAD")
        encode, kind = choose_encoder(headers.get("accept", ""))
        return _response("200 OK", kind, encode(self._registry), head=method == "HEAD")


def _response(status: str, kind: str, body: bytes, *, head: bool) -> bytes:
    lines = (
        f"HTTP/1.1 {status}", f"Content-Type: {kind}", f"Content-Length: {len(body)}", "Connection: close",
        "", "",
    )  # fmt: skip
    return "\r\n".join(lines).encode() + (b"" if head else body)
