"""The controller's HTTP API as the command line calls it.

Built on http.client, because importing a larger HTTP library takes longer than `keepstep list` may. Each
request has a connection of its own, a deadline for connecting and one for every read, so that a controller
that is gone or stuck is an error and not a wait. Errors of the controller come back as the errors they were.
"""

import http.client
import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

from keepstep.core.errors import (
    InputError,
    KeepstepError,
    NotFound,
    Refused,
    TimedOut,
    Unauthorized,
    Unreachable,
)

Json = dict[str, Any]
_JSON = "application/json"

_ERRORS: dict[int, type[KeepstepError]] = {
    400: InputError,
    401: Unauthorized,
    403: Unauthorized,
    404: NotFound,
    405: NotFound,
    409: Refused,
    422: InputError,
    502: Unreachable,
    503: Unreachable,
    504: TimedOut,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerEvent:
    id: int
    kind: str
    data: Json


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """Calls one controller. Every method raises a `KeepstepError` of the kind the controller answered."""

    url: str
    token: str = field(default="", repr=False)
    name: str = "local"  # the context, for messages
    connect_s: float = 5.0
    answer_s: float = 30.0

    def get(self, path: str, **query: Any) -> Json:
        return self._json("GET", path, query)

    def post(self, path: str, body: Any = None, **query: Any) -> Json:
        return self._json("POST", path, query, json.dumps({} if body is None else body).encode())

    def put(self, path: str, data: bytes) -> Json:
        return self._json("PUT", path, {}, data, content="application/octet-stream")

    def delete(self, path: str) -> Json:
        return self._json("DELETE", path, {})

    def head(self, path: str) -> None:
        """Ask whether something is there. Errors: NotFound."""
        with self._open("HEAD", path, {}):
            pass

    def pages(self, path: str, key: str, *, limit: int, after: Any = None, **query: Any) -> list[Json]:
        """Up to `limit` items of a list that comes in pages, from its beginning or past `after`."""
        found: list[Json] = []
        while len(found) < limit:
            page = self.get(path, limit=min(1000, limit - len(found)), after=after, **query)
            found += page[key]
            after = page.get("next")
            if after is None or not page[key]:
                break
        return found[:limit]

    def lines(self, path: str, **query: Any) -> Iterator[Json]:
        """One JSON value a line, for as long as the controller sends some."""
        with self._open("GET", path, query, endless=bool(query.get("follow"))) as response:
            for line in response:
                if line.strip():
                    yield json.loads(line)

    def events(self, *, after: int, job: str | None = None) -> Iterator[ServerEvent]:
        """Events as they happen, from the one after `after`; ends when the connection does."""
        with self._open("GET", "/events/stream", {"after": after, "job": job}, endless=True) as response:
            number, kind, data = 0, "", ""
            for raw in response:
                match raw.decode().rstrip("\r\n").partition(":"):
                    case ("id", _, value):
                        number = int(value)
                    case ("event", _, value):
                        kind = value.strip()
                    case ("data", _, value):
                        data += value
                    case ("", "", ""):
                        if data:
                            yield ServerEvent(id=number, kind=kind, data=json.loads(data))
                        kind, data = "", ""

    def healthy(self) -> bool:
        """Whether the controller answers at all."""
        try:
            connection = self._connect()
            try:
                connection.request("GET", "/healthz")
                return bool(connection.getresponse().status == 200)
            finally:
                connection.close()
        except (OSError, http.client.HTTPException):
            return False

    def _json(
        self, method: str, path: str, query: Json, body: bytes | None = None, content: str = _JSON
    ) -> Json:
        with self._open(method, path, query, body, content=content) as response:
            text = response.read()
        try:
            answer = json.loads(text) if text.strip() else {}
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise Unreachable(
                "the answer is not a controller's",
                where=self.url,
                why=f"{method} {path} gave {text[:60]!r}",
                next="Check the address: `keepstep context list`.",
            )
        return answer

    @contextmanager
    def _open(
        self,
        method: str,
        path: str,
        query: Json,
        body: bytes | None = None,
        *,
        content: str = _JSON,
        endless: bool = False,
    ) -> Iterator[http.client.HTTPResponse]:
        chosen = {key: _text(value) for key, value in query.items() if not _unset(value)}
        target = f"{urlsplit(self.url).path.rstrip('/')}/api/v1{path}"
        if chosen:
            target += "?" + urlencode(chosen, doseq=True)
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        if body is not None:
            headers["Content-Type"] = content
        try:
            connection = self._connect(endless=endless)
            try:
                connection.request(method, target, body=body, headers=headers)
                response = connection.getresponse()
                if response.status >= 300:
                    raise _error(response, f"{method} {path}", self.url)
                yield response
            finally:
                connection.close()
        except (OSError, http.client.HTTPException) as error:
            raise _unreachable(self, error) from error

    def _connect(self, *, endless: bool = False) -> http.client.HTTPConnection:
        address = urlsplit(self.url)
        if address.scheme not in ("http", "https") or not address.hostname:
            raise InputError(
                f"{self.url!r} is no address of a controller",
                why="it should look like http://host:port",
                next="Check KEEPSTEP_URL or `keepstep context list`.",
            )
        kind = http.client.HTTPSConnection if address.scheme == "https" else http.client.HTTPConnection
        connection = kind(address.hostname, address.port, timeout=self.connect_s)
        connection.connect()
        connection.sock.settimeout(None if endless else self.answer_s)
        if endless:  # silence is fine in a stream, a dead peer is not: the kernel asks it every 15 s
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 3)):
                connection.sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        return connection


def ref(name: str) -> str:
    """A job, node or incident as part of a path."""
    return quote(name, safe="")


def _unset(value: Any) -> bool:
    return value is None or value is False or value in ("", [])  # but not 0, which means something


def _text(value: Any) -> str | list[str]:
    if isinstance(value, list | tuple):
        return [str(item) for item in value]
    return "1" if value is True else str(value)


def _error(response: http.client.HTTPResponse, request: str, url: str) -> KeepstepError:
    kind = _ERRORS.get(response.status, KeepstepError)
    try:
        told = json.loads(response.read())["error"]
        return kind(
            str(told["what"]),
            where=str(told.get("where") or ""),
            why=str(told.get("why") or ""),
            next=str(told.get("next") or ""),
        )
    except (ValueError, KeyError, TypeError):
        return kind(
            f"{request} was answered with {response.status} {response.reason}",
            where=url,
            next="Is this a keepstep controller of the same version? `keepstep doctor` compares.",
        )


def _unreachable(client: Client, error: Exception) -> KeepstepError:
    if isinstance(error, TimeoutError):
        why = "it does not answer in time"
    elif isinstance(error, ConnectionRefusedError):
        why = "nothing listens there"
    else:
        why = getattr(error, "strerror", None) or str(error) or type(error).__name__
    local = client.name == "local"
    return Unreachable(
        "the controller cannot be reached",
        where=client.url if local else f"{client.name} ({client.url})",
        why=why,
        next="`keepstep doctor` looks at it; `keepstep up` starts one on this machine."
        if local
        else "Check the network and `keepstep context list`.",
    )
