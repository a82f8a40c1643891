"""Hooks as they are: real commands and a real web server; a controller that ends in the middle."""

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from keepstep.control.repair import Command, Order, Repairs, Webhook
from keepstep.core.clock import SystemClock
from keepstep.core.rules import Hook
from keepstep.decide.life import Outcome

ORDER = Order(key="b/7/reset", node="b", action="drain and reset", reason="XID 48 on GPU-1")


def repairs(home: Path) -> Repairs:
    clock = SystemClock()
    return Repairs({"command": Command(home / "repairs", clock), "webhook": Webhook(clock)})


def writes(home: Path, then: str = "true") -> Hook:
    script = f'echo "$1 $2" >> {home}/done; {then}'
    return Hook(command=("/bin/sh", "-c", script, "sh", "{node}", "{key}"), within_s=20.0, tries=2)


def done(home: Path) -> list[str]:
    return (home / "done").read_text().splitlines()


def test_a_command_gets_its_words_and_its_last_line_is_told(tmp_path: Path) -> None:
    hook = writes(tmp_path, "echo all well")
    result = asyncio.run(repairs(tmp_path).carry_out(ORDER, hook))
    assert (result.outcome, result.text) == (Outcome.DONE, "all well")
    assert done(tmp_path) == ["b b/7/reset/1"]


def test_it_is_tried_again_under_another_key_and_then_given_up(tmp_path: Path) -> None:
    result = asyncio.run(repairs(tmp_path).carry_out(ORDER, writes(tmp_path, "echo no; exit 3")))
    assert (result.outcome, result.text) == (Outcome.FAILED, "exit code 3: no")
    assert done(tmp_path) == ["b b/7/reset/1", "b b/7/reset/2"]


def test_two_at_once_and_one_later_do_it_once(tmp_path: Path) -> None:
    hook = writes(tmp_path, "sleep 0.3")

    async def both() -> list[Any]:
        return list(await asyncio.gather(*(repairs(tmp_path).carry_out(ORDER, hook) for _ in range(2))))

    assert [one.outcome for one in asyncio.run(both())] == [Outcome.DONE] * 2
    assert asyncio.run(repairs(tmp_path).carry_out(ORDER, hook)).outcome is Outcome.DONE
    assert len(done(tmp_path)) == 1


def test_a_controller_that_is_killed_in_the_middle_has_it_done_once(tmp_path: Path) -> None:
    go = tmp_path / "go"
    hook = writes(tmp_path, f"while [ ! -e {go} ]; do sleep 0.05; done")
    controller = f"""
import asyncio; from pathlib import Path
from keepstep.control.repair import *
from keepstep.core.clock import SystemClock
from keepstep.core.rules import Hook
home = Path({str(tmp_path)!r})
asyncio.run(Command(home / "repairs", SystemClock()).carry_out(
    Order(key="b/7/reset/1", node="b", action="r", reason=""), Hook(command={hook.command!r}, within_s=20.0)))
"""
    first = subprocess.Popen([sys.executable, "-c", controller])
    while not (tmp_path / "done").exists():
        assert first.poll() is None
    first.kill()
    first.wait(10)
    go.touch()
    assert asyncio.run(repairs(tmp_path).carry_out(ORDER, hook)).outcome is Outcome.DONE
    assert len(done(tmp_path)) == 1


def test_a_command_that_does_not_end_is_ended(tmp_path: Path) -> None:
    hook = Hook(command=("sleep", "60"), within_s=0.5, tries=1)
    result = asyncio.run(repairs(tmp_path).carry_out(ORDER, hook))
    assert result.outcome is Outcome.FAILED
    assert "ended after 0.5 s" in result.text


def test_a_command_that_is_not_there_says_so(tmp_path: Path) -> None:
    hook = Hook(command=("/no/such/thing",), within_s=5.0, tries=1)
    result = asyncio.run(repairs(tmp_path).carry_out(ORDER, hook))
    assert (result.outcome, "/no/such/thing" in result.text) == (Outcome.FAILED, True)


class Receiver(BaseHTTPRequestHandler):
    answers: list[int]
    asked: list[tuple[str, dict[str, Any]]]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append((self.headers["Idempotency-Key"], body))
        code = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        self.send_response(code)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def receiver() -> Iterator[tuple[type[Receiver], str]]:
    kind = type("One", (Receiver,), {"answers": [200], "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield kind, f"http://127.0.0.1:{server.server_address[1]}/"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("answers", "outcome", "requests"), [([200], "done", 1), ([400], "failed", 1), ([202], "failed", 2)]
)
def test_a_webhook_is_asked_under_one_key(
    receiver: tuple[type[Receiver], str], tmp_path: Path, answers: list[int], outcome: str, requests: int
) -> None:
    kind, url = receiver
    kind.answers = answers
    hook = Hook(webhook=url, within_s=0.4 if answers == [202] else 10.0, tries=1 if answers != [202] else 2)
    result = asyncio.run(repairs(tmp_path).carry_out(ORDER, hook))
    assert result.outcome == outcome
    assert len(kind.asked) == requests
    assert kind.asked[0] == (
        "b/7/reset/1",
        {"key": "b/7/reset/1", "node": "b", "action": "drain and reset", "reason": "XID 48 on GPU-1"},
    )
