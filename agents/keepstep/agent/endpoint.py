"""Where the controller is, and what this agent shows it.

A local controller may come back on another port with another token, so its file is read anew each time. A
token to join with is exchanged once for this node's own credential, which is kept (0600) and wins then.
"""

import json
import os
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from keepstep.agent.settings import AgentSettings
from keepstep.core.errors import InputError, KeepstepError, NotFound, Unauthorized, Unreachable

JOIN_PREFIX = "ks_join_"  # what the controller begins such tokens with
_ANSWER_BYTES_MAX = 1 << 20
_OUR_FAULT = {400, 401, 403, 409, 422}  # the same request would be answered the same way again
_LOOPBACK = {"127.0.0.1", "::1", "localhost"}


@dataclass(frozen=True, slots=True)
class Endpoint:
    url: str  # http(s)://host:port
    token: str = field(repr=False)

    @property
    def socket(self) -> str:
        parts = urlsplit(self.url)
        scheme = {"http": "ws", "https": "wss"}[parts.scheme]
        return urlunsplit((scheme, parts.netloc, parts.path.rstrip("/") + "/api/v1/agents/socket", "", ""))

    @property
    def joins(self) -> bool:
        return self.token.startswith(JOIN_PREFIX)

    @property
    def here(self) -> bool:
        """On this machine: never by way of a proxy."""
        return urlsplit(self.url).hostname in _LOOPBACK


def endpoints(settings: AgentSettings, credential: str | None) -> list[Endpoint]:
    """What to try, in order; read anew at each call. Errors: InputError, Unreachable (not announced now)."""
    if settings.endpoint_file is not None:
        return [_of_file(settings.endpoint_file, credential)]
    token = _choice(_token(settings), credential)
    if not settings.controllers or token is None:
        missing = "token" if settings.controllers else "controller"
        raise InputError(
            f"this agent was given no {missing}",
            next="Give it --controller URL and --token-file FILE, or --endpoint-file controller.json.",
        )
    return [Endpoint(_checked(url), token) for url in settings.controllers]


def join(endpoint: Endpoint, node: str) -> str:
    """Exchange a join token for this node's credential. Blocking. Errors: Unauthorized, Unreachable."""
    body = json.dumps({"token": endpoint.token, "node": node}).encode()
    answer = _open(endpoint, "/api/v1/join", body=body)
    try:
        credential = json.loads(answer)["credential"]
    except (ValueError, KeyError, TypeError):
        credential = None
    if not isinstance(credential, str) or not credential:
        raise Unreachable("the controller's answer to a join holds no credential", where=endpoint.url)
    return credential


def store_credential(path: Path, credential: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(credential + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_credential(path: Path) -> str | None:
    try:
        return path.read_text().strip() or None
    except FileNotFoundError:
        return None


def download(endpoint: Endpoint, path: str, target: Path, *, bytes_max: int, timeout_s: float) -> None:
    """A file of the controller's. Blocking. Errors: NotFound, Unauthorized, Unreachable."""
    with _request(endpoint, path, None, timeout_s) as answer, target.open("wb") as file:
        left = bytes_max
        while block := answer.read(1 << 20):
            left -= len(block)
            if left < 0:
                raise Unreachable(f"{path} is larger than {bytes_max} bytes", where=endpoint.url)
            file.write(block)


def _open(endpoint: Endpoint, path: str, *, body: bytes | None) -> bytes:
    with _request(endpoint, path, body, 10.0) as answer:
        content: bytes = answer.read(_ANSWER_BYTES_MAX)
    return content


def _request(endpoint: Endpoint, path: str, body: bytes | None, timeout_s: float) -> Any:
    headers = {"Authorization": f"Bearer {endpoint.token}"}
    if body is not None:
        headers["Content-Type"] = "application/json"
    request = urllib.request.Request(endpoint.url.rstrip("/") + path, data=body, headers=headers)  # noqa: S310
    handlers = [urllib.request.ProxyHandler({})] if endpoint.here else []
    try:
        return urllib.request.build_opener(*handlers).open(request, timeout=timeout_s)
    except urllib.error.HTTPError as error:
        with error:
            said = error.read(2000).decode(errors="replace")
        kind: type[KeepstepError] = Unauthorized if error.code in _OUR_FAULT else Unreachable
        if error.code == 404:
            kind = NotFound
        raise kind(f"{path} was answered with {error.code}", where=endpoint.url, why=said) from error
    except OSError as error:
        raise Unreachable("the controller does not answer", where=endpoint.url, why=str(error)) from error


def _of_file(path: Path, credential: str | None) -> Endpoint:
    try:
        found = json.loads(path.read_bytes())
        given = str(found["token"])
        return Endpoint(_checked(str(found["url"])), _choice(given, credential) or given)
    except FileNotFoundError as error:
        raise Unreachable("no controller is announced", where=str(path)) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Unreachable("the controller's file cannot be used", where=str(path), why=repr(error)) from error


def _token(settings: AgentSettings) -> str | None:
    if settings.token_file is not None:
        try:
            return settings.token_file.read_text().strip()
        except OSError as error:
            raise InputError(
                f"the token cannot be read: {error.strerror}", where=str(settings.token_file)
            ) from error
    return settings.token


def _choice(given: str | None, credential: str | None) -> str | None:
    """A token to join with has done its work once there is a credential; any other is meant as it stands."""
    if given is not None and not given.startswith(JOIN_PREFIX):
        return given
    return credential or given


def _checked(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise InputError(
            f"{url!r} is no address of a controller", next="Use http://host:port or https://host."
        )
    return url
