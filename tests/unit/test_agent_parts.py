"""The smaller parts of the agent: what is kept, what is given out, what is read on the node."""

import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from keepstep.agent import host, logs, secrets
from keepstep.agent.endpoint import Endpoint, endpoints, join, store_credential
from keepstep.agent.evidence import collect
from keepstep.agent.folder import Folder
from keepstep.agent.history import clean
from keepstep.agent.preparation import job_document, read_run, recipe
from keepstep.agent.settings import AgentSettings, History
from keepstep.agent.slots import Slots
from keepstep.core.errors import InputError, Unauthorized, Unreachable
from keepstep.core.job import CommandRun, EnvSource, LlamaRun, SecretRef
from keepstep.spec import load, to_dict
from keepstep.wire.messages import Launch
from specs import TINY

# ---------------------------------------------------------------- logs


def test_a_cursor_stays_true_when_the_file_is_rotated(tmp_path: Path) -> None:
    current = tmp_path / "rank-0.log"
    current.write_text("one\ntwo\nhalf a li")
    piece = logs.after(tmp_path, 0, "", bytes_max=1 << 20, ended=False)
    assert piece.lines == ("one", "two") and not piece.more
    with current.open("a") as file:
        file.write("ne\nthree\n")
    current.rename(tmp_path / "rank-0.log.1")
    current.write_text("four\n")
    piece = logs.after(tmp_path, 0, piece.cursor, bytes_max=1 << 20, ended=False)
    assert piece.lines == ("half a line", "three", "four") and not piece.lost
    assert logs.after(tmp_path, 0, piece.cursor, bytes_max=1 << 20, ended=False).lines == ()

    (tmp_path / "rank-0.log.1").unlink()
    current.write_text("five, in place of four and more\n")
    lost = logs.after(tmp_path, 0, "1:5", bytes_max=1 << 20, ended=False)
    assert lost.lost and lost.lines == ("five, in place of four and more",)


def test_pieces_are_bounded_and_join_up(tmp_path: Path) -> None:
    lines = [f"line {k} " + "x" * (k % 50) for k in range(500)]
    (tmp_path / "rank-3.log.1").write_text("\n".join(lines[:300]) + "\n")
    (tmp_path / "rank-3.log").write_text("\n".join(lines[300:]))
    found: list[str] = []
    cursor, more = "", True
    while more:
        piece = logs.after(tmp_path, 3, cursor, bytes_max=1000, ended=True)
        assert sum(len(line) + 1 for line in piece.lines) <= 1001
        found += piece.lines
        cursor, more = piece.cursor, piece.more
    assert found == lines


@pytest.mark.parametrize("count", [0, 1, 5, 12, 100])
def test_the_tail_goes_over_files(tmp_path: Path, count: int) -> None:
    lines = [str(k) for k in range(20)]
    (tmp_path / "rank-0.log.1").write_text("\n".join(lines[:10]) + "\n")
    (tmp_path / "rank-0.log").write_text("\n".join(lines[10:]) + "\n")
    piece = logs.tail(tmp_path, 0, lines=count, bytes_max=1 << 20)
    assert list(piece.lines) == (lines[-count:] if count else [])
    assert logs.after(tmp_path, 0, piece.cursor, bytes_max=1 << 20, ended=False).lines == ()


def test_evidence_is_bounded_whatever_a_rank_wrote(tmp_path: Path) -> None:
    (tmp_path / "rank-1.log").write_text("x" * 100_000 + "\n" + "y" * 5000 + "\nValueError: the end\n\n")
    found = collect(tmp_path, 1)
    assert found.error == "ValueError: the end"
    assert len(found.last_lines) <= 20 and all(len(line) <= 300 for line in found.last_lines)
    (tmp_path / "error-1.json").write_text('{"message": {"message": "from the file"}}')
    assert collect(tmp_path, 1).error == "from the file"
    (tmp_path / "error-1.json").write_text("[1, 2")
    assert collect(tmp_path, 1).error == "ValueError: the end"
    assert collect(tmp_path, 2).error == ""


# ---------------------------------------------------------------- slots and history


def test_slots_of_gpus_are_never_shared() -> None:
    slots = Slots(4, ("A", "B", "C", "D"))
    assert slots.gpus(slots.take(("x", 1), 3)) == ("A", "B", "C")
    with pytest.raises(InputError, match=r"x/1"):
        slots.take(("y", 1), 2)
    slots.release(("x", 1))
    slots.keep(("z", 1), (1,))
    assert slots.gpus(slots.take(("y", 1), 3)) == ("A", "C", "D")


def test_slots_on_cpus_are_numbers_only() -> None:
    slots = Slots(2, ())
    assert slots.take(("x", 1), 2) == (0, 1)
    assert len(slots.take(("y", 1), 3)) == 3
    assert slots.gpus((0, 1)) == ()


def test_old_attempts_go_and_are_remembered_by_number(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "node")
    folder.make()
    for job, number in [("a", 1), ("a", 2), ("a", 3), ("b", 1), ("c", 1), ("c", 2)]:
        path = folder.attempt(job, number)
        path.mkdir(parents=True)
        (path / "rank-0.log").write_text("x" * 100)
        if (job, number) != ("c", 2):
            (path / "forgotten").touch()
    (folder.job("b") / "workdir-1234").mkdir()
    os.utime(folder.attempt("b", 1), (1, 1))  # the oldest job

    clean(folder, History(attempts=2, jobs=10, bytes=1 << 20), frozenset({("c", 2)}))
    left = {(job, number) for job, number, _ in folder.attempts()}
    assert left == {("a", 2), ("a", 3), ("b", 1), ("c", 1), ("c", 2)}
    assert (folder.removed("a"), folder.removed("b")) == (1, 0)

    clean(folder, History(attempts=2, jobs=2, bytes=1 << 20), frozenset({("c", 2)}))
    left = {(job, number) for job, number, _ in folder.attempts()}
    assert left == {("a", 2), ("a", 3), ("c", 1), ("c", 2)}
    assert folder.removed("b") == 1 and not list(folder.job("b").glob("workdir-*"))

    clean(folder, History(attempts=2, jobs=2, bytes=0), frozenset({("c", 2)}))
    assert {(job, number) for job, number, _ in folder.attempts()} == {("c", 2)}


@pytest.mark.parametrize("name", ["..", "a/b", "", ".hidden", "x" * 200])
def test_a_job_cannot_name_a_folder_elsewhere(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError):
        Folder(tmp_path).attempt(name, 1)


# ---------------------------------------------------------------- what only the node knows


def test_secrets_and_sources_are_read_here(tmp_path: Path) -> None:
    (tmp_path / "env").write_text("# comment\nexport A=1\n\nB='two words'\n")
    (tmp_path / "key").write_text("s3cret\n")
    env = secrets.resolve(
        (EnvSource(source="file", name=str(tmp_path / "env")), EnvSource(source="env", name="NCCL_*")),
        {
            "KEY": SecretRef(source="file", name=str(tmp_path / "key")),
            "TOK": SecretRef(source="env", name="T"),
        },
        {"NCCL_DEBUG": "INFO", "OTHER": "x", "T": "tok"},
    )
    assert env == {"A": "1", "B": "two words", "NCCL_DEBUG": "INFO", "KEY": "s3cret", "TOK": "tok"}


def test_a_bad_source_is_named_but_never_its_value(tmp_path: Path) -> None:
    (tmp_path / "env").write_text("A=1\npassword hunter2\n")
    with pytest.raises(InputError, match=re.escape(f"{tmp_path / 'env'}:2")) as refused:
        secrets.resolve((EnvSource(source="file", name=str(tmp_path / "env")),), {}, {})
    assert "hunter2" not in str(refused.value)
    for reference in (
        SecretRef(source="kubernetes", name="nowhere", key="k"), SecretRef(source="file", name="/no/such")
    ):  # fmt: skip
        with pytest.raises(InputError, match="secret KEY"):
            secrets.resolve((), {"KEY": reference}, {})


# ---------------------------------------------------------------- runs


def command(tmp_path: Path, *words: str, **changes: Any) -> CommandRun:
    (tmp_path / "train.py").write_text(changes.pop("text", "import torch\n"))
    return CommandRun(command=words, workdir=str(tmp_path), ship="none", **changes)


def test_a_script_is_forked_warm_unless_there_is_no_use_in_it(tmp_path: Path) -> None:
    environ = {"PATH": os.environ["PATH"], "RANK": "9"}
    warm = recipe(command(tmp_path, "python", "train.py", "--lr", "1"), tmp_path, environ)
    assert (warm.argv, warm.python, warm.cold_reason) == (("train.py", "--lr", "1"), True, "")
    assert warm.modules and "RANK" not in warm.env
    assert recipe(command(tmp_path, "python", "train.py", warm="never"), tmp_path, environ).modules == ()
    plain = recipe(command(tmp_path, "python", "train.py", text="print(1)\n"), tmp_path, environ)
    assert plain.modules == () and "torch" in plain.cold_reason
    native = recipe(command(tmp_path, "sh", "-c", "true"), tmp_path, environ)
    assert (native.argv, native.python, native.modules) == (("sh", "-c", "true"), False, ())
    preload = recipe(command(tmp_path, "python", "train.py", preload=("json",)), tmp_path, environ)
    assert preload.modules[-1] == "json"


def test_the_hook_can_be_turned_off(tmp_path: Path) -> None:
    with_it = recipe(command(tmp_path, "python", "train.py"), tmp_path, {"PYTHONPATH": "/agents"})
    assert with_it.env["PYTHONPATH"].startswith("/agents:") and "KEEPSTEP_BEACON_CODE" in with_it.env
    for changes in ({"hook": False}, {"env": {"KEEPSTEP_HOOK": "0"}}):
        without = recipe(
            command(tmp_path, "python", "train.py", **changes), tmp_path, {"PYTHONPATH": "/agents"}
        )
        assert without.env["PYTHONPATH"] == "/agents" and "KEEPSTEP_BEACON_CODE" not in without.env


def test_the_jobs_own_variables_win_over_the_agents(tmp_path: Path) -> None:
    run = command(
        tmp_path, "python", "train.py", env={"A": "job", "PATH": "/usr/bin:/bin"},
        secrets={"S": SecretRef(source="env", name="HELD")},
    )  # fmt: skip
    made = recipe(run, tmp_path, {"A": "agent", "B": "agent", "HELD": "hunter2", "KEEPSTEP_TOKEN": "x"})
    assert (made.env["A"], made.env["B"], made.env["S"]) == ("job", "agent", "hunter2")
    assert "KEEPSTEP_TOKEN" not in made.env and "hunter2" not in repr(made)


def test_every_run_that_the_spec_can_say_is_read(tmp_path: Path) -> None:
    spec = load(TINY, base_dir=tmp_path)
    run = to_dict(spec)["run"]
    read = read_run(run)
    assert isinstance(read, LlamaRun) and read == spec.run
    launch = Launch(
        job="tiny-abcd", attempt=2, name="tiny", world_size=2, nodes=("a",), node_rank=0, ranks=(0, 1),
        run=run, layout={"dp": 1, "pp": 1, "cp": 1, "tp": 2}, replicas=2, checkpoint={"dir": "/c", "keep": 3},
        restore=(1, 60), lineage=((1, 0, 0), (2, 1, 60)),
    )  # fmt: skip
    document = job_document(launch, read)
    assert document["virtual_dp"] == 2 and document["layout"]["dp"] == 1
    assert document["restore"] == {"attempt": 1, "step": 60}
    assert document["lineage"] == [[1, 0, 0], [2, 1, 60]]
    assert document["batch"] == {"global_tokens": 512, "seq": 64, "micro_batch": 1, "stages": []}
    json.dumps(document, allow_nan=False)
    with pytest.raises(InputError, match="dance"):
        read_run({"kind": "dance"})
    with pytest.raises(InputError, match="command"):
        read_run({"kind": "command", "command": "not a list"})


# ---------------------------------------------------------------- where the controller is


def test_a_token_to_join_with_is_exchanged_once(tmp_path: Path) -> None:
    asked: list[dict[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            answer = b'{"credential": "ks_agent_1"}' if len(asked) == 1 else b'{"error": "joined already"}'
            self.send_response(200 if len(asked) == 1 else 409)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        settings = AgentSettings(dir=tmp_path, node="n1", controllers=(url,), token="ks_join_x")  # noqa: S106
        (endpoint,) = endpoints(settings, None)
        assert endpoint.joins and endpoint.here and "ks_join" not in repr(endpoint)
        credential = join(endpoint, "n1")
        assert credential == "ks_agent_1" and asked == [{"token": "ks_join_x", "node": "n1"}]
        with pytest.raises(Unauthorized, match="409"):
            join(endpoint, "n1")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    store_credential(tmp_path / "credential", credential)
    assert (tmp_path / "credential").stat().st_mode & 0o777 == 0o600
    (endpoint,) = endpoints(settings, credential)
    assert not endpoint.joins and endpoint.token == credential
    with pytest.raises(Unreachable):
        join(Endpoint(url, "ks_join_x"), "n1")


def test_the_endpoints_file_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "controller.json"
    settings = AgentSettings(dir=tmp_path, endpoint_file=path)
    with pytest.raises(Unreachable, match="announced"):
        endpoints(settings, None)
    for port in (1, 2):
        path.write_text(json.dumps({"url": f"http://127.0.0.1:{port}", "token": f"t{port}", "more": 1}))
        (endpoint,) = endpoints(settings, "an older credential")
        assert (endpoint.url, endpoint.token) == (f"http://127.0.0.1:{port}", f"t{port}")
        assert endpoint.socket == f"ws://127.0.0.1:{port}/api/v1/agents/socket"
    path.write_text('{"url": "http://127')
    with pytest.raises(Unreachable):
        endpoints(settings, None)
    assert (
        Endpoint("https://keep.example/step/", "t").socket == "wss://keep.example/step/api/v1/agents/socket"
    )
    for nothing in (
        AgentSettings(dir=tmp_path),
        AgentSettings(dir=tmp_path, controllers=("ftp://x",), token="t"),  # noqa: S106
    ):
        with pytest.raises(InputError):
            endpoints(nothing, None)


def test_addresses_of_this_machine() -> None:
    assert host.training_address("http://127.0.0.1:80", None, None) == ("127.0.0.1", "lo")
    assert host.training_address("http://127.0.0.1:80", "10.1.2.3", "ib0") == ("10.1.2.3", "ib0")
    assert host.training_address("", None, "lo") == ("127.0.0.1", "lo")
    assert host.node_status().memory_total_bytes > host.node_status().agent_memory_bytes > 1 << 20
