"""The client against a small server that answers as a controller does, or not at all."""

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from keepstep.cli.client import Client, ref
from keepstep.core.errors import (
    InputError,
    KeepstepError,
    NotFound,
    Refused,
    TimedOut,
    Unauthorized,
    Unreachable,
)

SECRET = "ks_for_this_test"  # noqa: S105


class Answers(BaseHTTPRequestHandler):
    """Answers from the server's table; keeps what it was asked."""

    server: "Server"
    protocol_version = "HTTP/1.1"

    def _answer(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        url = urlsplit(self.path)
        self.server.asked.append((self.command, self.path, self.headers.get("Authorization"), body))
        status, kind, text = self.server.table(url.path, parse_qs(url.query))
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_POST = do_PUT = do_DELETE = _answer  # noqa: N815 - http.server's names

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - http.server's name
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, answers: dict[str, Any]) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.answers, self.asked = answers, list[tuple[str, str, str | None, bytes]]()

    def table(self, path: str, query: dict[str, list[str]]) -> tuple[int, str, bytes]:
        answer = self.answers.get(path, (404, {"detail": "Not Found"}))
        if callable(answer):
            answer = answer(query)
        status, content = answer
        if isinstance(content, bytes):
            return status, "text/plain", content
        return status, "application/json", json.dumps(content).encode()


@contextmanager
def serving(answers: dict[str, Any]) -> Iterator[tuple[Client, Server]]:
    server = Server({f"/api/v1{path}": answer for path, answer in answers.items()})
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield Client(url=f"http://127.0.0.1:{server.server_address[1]}", token=SECRET), server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_names_are_quoted_and_the_token_is_sent() -> None:
    with serving({"/jobs/%40last": (200, {"id": "a"})}) as (client, server):
        assert client.get(f"/jobs/{ref('@last')}") == {"id": "a"}
    assert server.asked == [("GET", "/api/v1/jobs/%40last", f"Bearer {SECRET}", b"")]


def test_empty_values_are_left_out_and_lists_are_repeated() -> None:
    with serving({"/jobs": (200, {"jobs": []})}) as (client, server):
        client.get("/jobs", state=["running", "queued"], name="", after=None, all=True, limit=5, tail=0)
    assert server.asked[0][1] == "/api/v1/jobs?state=running&state=queued&all=1&limit=5&tail=0"


@pytest.mark.parametrize(
    ("status", "kind"),
    [(422, InputError), (404, NotFound), (409, Refused), (401, Unauthorized), (403, Unauthorized),
     (503, Unreachable), (504, TimedOut), (500, KeepstepError)],
)  # fmt: skip
def test_errors_come_back_as_what_they_were(status: int, kind: type[KeepstepError]) -> None:
    told = {"error": {"what": "no", "where": "here", "why": "because", "next": "try"}}
    with serving({"/x": (status, told)}) as (client, _), pytest.raises(KeepstepError) as caught:
        client.get("/x")
    assert type(caught.value) is kind
    assert str(caught.value) == "here: no: because\n  try"


def test_an_error_of_something_else_is_one_too() -> None:
    with serving({}) as (client, _), pytest.raises(NotFound, match="GET /x was answered with 404"):
        client.get("/x")


def test_an_answer_that_is_no_json_is_not_a_controllers() -> None:
    page = {"/x": (200, b"<html>welcome</html>")}
    with serving(page) as (client, _), pytest.raises(Unreachable, match="not a controller's"):
        client.get("/x")


def test_pages_go_on_until_the_end_or_the_limit() -> None:
    def page(query: dict[str, list[str]]) -> tuple[int, Any]:
        after, limit = int(query.get("after", ["0"])[0]), int(query["limit"][0])
        items = [{"n": n} for n in range(after, min(7, after + min(3, limit)))]
        return 200, {"items": items, "next": items[-1]["n"] + 1 if items and items[-1]["n"] < 6 else None}

    with serving({"/x": page}) as (client, _):
        assert [item["n"] for item in client.pages("/x", "items", limit=100)] == [0, 1, 2, 3, 4, 5, 6]
        assert [item["n"] for item in client.pages("/x", "items", limit=4)] == [0, 1, 2, 3]
        assert [item["n"] for item in client.pages("/x", "items", limit=100, after=5)] == [5, 6]


def test_lines_and_events() -> None:
    told = (
        b': welcome\n\nid: 4\nevent: placed\ndata: {"a": 1}\n\n: still here\n\n'
        b"id: 5\nevent: went\ndata: {}\n\nid: 6\n"
    )
    answers = {"/l": (200, b'{"line": "a"}\n\n{"line": "b"}\n'), "/events/stream": (200, told)}
    with serving(answers) as (client, _):
        assert [line["line"] for line in client.lines("/l")] == ["a", "b"]
        events = [(event.id, event.kind, event.data) for event in client.events(after=3)]
    assert events == [(4, "placed", {"a": 1}), (5, "went", {})]


def test_nobody_listens() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        client = Client(url=f"http://127.0.0.1:{free.getsockname()[1]}")
        with pytest.raises(Unreachable, match="nothing listens there"):
            client.get("/info")
        assert not client.healthy()


def test_a_controller_that_does_not_answer_is_given_up() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        client = Client(url=f"http://127.0.0.1:{silent.getsockname()[1]}", answer_s=0.05)
        with pytest.raises(Unreachable, match="does not answer in time"):
            client.get("/info")


@pytest.mark.parametrize("url", ["", "nonsense", "ftp://host", "http://"])
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(InputError, match="no address"):
        Client(url=url).get("/info")
