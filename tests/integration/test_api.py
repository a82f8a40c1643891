"""The API as strangers and mistakes meet it: a real controller without nodes."""

import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from cluster import Cluster
from keepstep.cli.client import Client
from keepstep.core.errors import NotFound, Unauthorized
from keepstep.wire import messages as wire
from scraping import complaints, missing, scraping
from specs import TINY


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("api") / "home", nodes=0, slots=1)
    yield cluster
    cluster.close()


def request(cluster: Cluster, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
    address = urlsplit(cluster.running.url)
    connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=30)
    sent = {"Authorization": f"Bearer {cluster.running.token}", **headers}
    try:
        connection.request(method, path, body, sent)
        answer = connection.getresponse()
        text = answer.read()
        return answer.status, json.loads(text) if text[:1] == b"{" else text
    finally:
        connection.close()


def with_role(cluster: Cluster, role: str) -> Client:
    secret = cluster.client.post("/tokens", {"name": f"{role}-{os.urandom(4).hex()}", "role": role})["secret"]
    return Client(url=cluster.running.url, token=secret)


def test_the_token_is_for_its_owner_only(cluster: Cluster) -> None:
    assert cluster.home.controller_file.stat().st_mode & 0o777 == 0o600
    assert cluster.home.path.stat().st_mode & 0o777 == 0o700
    assert cluster.running.token.encode() not in cluster.home.store_file.read_bytes()


@pytest.mark.parametrize("token", ["", "Bearer ", "Bearer nonsense", "Basic abc"])
def test_no_token_or_a_wrong_one_is_refused(cluster: Cluster, token: str) -> None:
    status, answer = request(cluster, "GET", "/api/v1/jobs", Authorization=token)
    assert status in {401, 403}
    assert answer["error"]["what"]
    assert "jobs" not in answer


def test_roles_bound_what_a_token_may(cluster: Cluster) -> None:
    viewer, submitter = with_role(cluster, "viewer"), with_role(cluster, "submitter")
    assert viewer.get("/jobs")["jobs"] == []
    with pytest.raises(Unauthorized, match="role viewer, and this needs submitter"):
        viewer.post("/jobs", {"spec": {}})
    with pytest.raises(Unauthorized, match="needs operator"):
        submitter.post("/nodes/a/cordon")
    with pytest.raises(Unauthorized, match="needs admin"):
        with_role(cluster, "operator").post("/tokens", {"name": "x", "role": "admin"})


def test_a_revoked_token_is_of_no_use(cluster: Cluster) -> None:
    made = cluster.client.post("/tokens", {"name": "leaver", "role": "viewer"})
    cluster.client.delete("/tokens/leaver")
    with pytest.raises(Unauthorized):
        Client(url=cluster.running.url, token=made["secret"]).get("/jobs")


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/api/v1/nothing", None, 404),
        ("GET", "/api/v1/jobs/none-such", None, 404),
        ("GET", "/api/v1/incidents/99", None, 404),
        ("GET", "/api/v1/jobs?limit=1000000", None, 422),
        ("GET", "/api/v1/events?limit=0", None, 422),
        ("POST", "/api/v1/jobs", b"{", 422),
        ("POST", "/api/v1/jobs", b'{"spec": {"name": 3}}', 422),
        ("POST", "/api/v1/jobs", b'{"spec": []}', 422),
        ("PUT", "/api/v1/bundles/xyz", b"abc", 422),
        ("PUT", "/api/v1/bundles/" + "0" * 64, b"abc", 422),
        ("POST", "/api/v1/jobs", b" " * (5 << 20), 413),
    ],
)
def test_mistakes_get_an_answer_that_says_what(
    cluster: Cluster, method: str, path: str, body: bytes | None, status: int
) -> None:
    got, answer = request(cluster, method, path, body, **{"Content-Type": "application/json"})
    assert got == status, answer
    assert answer["error"]["what"]
    assert cluster.client.healthy()


def test_a_job_for_a_pool_that_is_not_there_is_refused(cluster: Cluster) -> None:
    with pytest.raises(Exception, match="no pool 'moon'"):
        cluster.submit(TINY, "pool=moon")


def test_an_accepted_job_survives_a_kill_right_after_the_answer(cluster: Cluster) -> None:
    job = cluster.submit(TINY)
    cluster.kill_controller()
    cluster.start()
    assert cluster.job(job)["state"] == "queued"
    assert "needs 2 nodes" in cluster.wait(job, lambda told: "needs" in told["reason"])["reason"]
    cluster.client.post(f"/jobs/{job}/cancel")
    cluster.wait_state(job, "cancelled")


def socket_to(cluster: Cluster, token: str) -> ClientConnection:
    url = cluster.running.url.replace("http", "ws", 1) + "/api/v1/agents/socket"
    return connect(url, additional_headers={"Authorization": f"Bearer {token}"}, max_size=None, proxy=None)


def last_words(agent: ClientConnection) -> wire.FromController | None:
    """What the controller said last before it closed."""
    said = None
    try:
        while True:
            data = agent.recv(timeout=20)
            assert isinstance(data, bytes)
            said = wire.decode_from_controller(data)
    except ConnectionClosed:
        return said


@pytest.mark.parametrize("message", [b"", b"\xc1nonsense", b"x" * (5 << 20), b"\x80"], ids=len)
def test_nonsense_on_the_agents_socket_costs_only_that_connection(cluster: Cluster, message: bytes) -> None:
    with socket_to(cluster, cluster.running.token) as agent:
        with contextlib.suppress(ConnectionClosed):
            agent.send(message)
        said = last_words(agent)
        assert said is None or isinstance(said, wire.Refusal)
    assert cluster.client.healthy()


def test_a_nodes_credential_is_for_that_node_only(cluster: Cluster) -> None:
    secret = cluster.client.post("/tokens", {"name": "joiners", "join": True})["secret"]
    status, answer = request(
        cluster,
        "POST",
        "/api/v1/join",
        json.dumps({"token": secret, "node": "n1"}),
        **{"Content-Type": "application/json"},
    )
    assert status == 200, answer
    with socket_to(cluster, answer["credential"]) as agent:
        register = wire.Register(protocol=1, version="0", node="n2", instance="i", boot_id="b", slots=1)
        agent.send(wire.encode(register))
        said = last_words(agent)
        assert isinstance(said, wire.Refusal)
        assert "may not speak for node 'n2'" in said.what
        assert said.retry_after_s is None
    with pytest.raises(NotFound):
        cluster.client.get("/nodes/n2")
    status, answer = request(
        cluster,
        "POST",
        "/api/v1/join",
        json.dumps({"token": secret, "node": "n1"}),
        **{"Content-Type": "application/json"},
    )
    assert status == 409, "a second host with the same name must not take the first one's place"


def keepstep(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "keepstep.cli.main", *arguments],
        env={**os.environ, "KEEPSTEP_HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_second_controller_on_the_same_folder_is_refused(cluster: Cluster) -> None:
    done = keepstep(cluster.home.path, "controller", "--home", str(cluster.home.path), "--nodes", "0")
    assert done.returncode != 0
    assert f"{cluster.running.pid}" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = keepstep(tmp_path, "controller", "--home", str(tmp_path), "--nodes", "0", "--port", str(port))
    assert done.returncode == 2
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr
    assert "Traceback" not in done.stderr


def test_events_are_streamed_as_they_happen_and_resumed_from_the_last(cluster: Cluster) -> None:
    after = max((event["id"] for event in cluster.client.get("/events", limit=1000)["events"]), default=0)
    stream = cluster.client.events(after=after)
    job = cluster.submit(TINY)
    told = next(event for event in stream if event.data["job"] == job)
    assert told.kind == "submitted"
    again = next(event for event in cluster.client.events(after=told.id - 1) if event.data["job"] == job)
    assert again == told
    cluster.client.post(f"/jobs/{job}/cancel")
    assert next(event for event in stream if event.kind == "cancelled").data["job"] == job


def test_what_prometheus_scrapes(cluster: Cluster) -> None:
    job = cluster.submit(TINY)
    cluster.wait(job, lambda told: "needs" in told["reason"])
    status, text = request(cluster, "GET", "/metrics", Authorization="")
    assert status == 200
    assert b'keepstep_jobs{state="queued"} 1.0' in text
    cluster.client.post(f"/jobs/{job}/cancel")
    cluster.wait_state(job, "cancelled")


@pytest.mark.slow
@pytest.mark.skipif(bool(missing), reason=missing)
def test_a_real_prometheus_scrapes_a_controller(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.submit(TINY)
    cluster.wait(job, lambda told: "needs" in told["reason"])
    _, text = request(cluster, "GET", "/metrics", Authorization="")
    assert complaints(text.decode()) == []
    with scraping(tmp_path, f"{cluster.running.url}/metrics") as ask:
        assert ask('keepstep_jobs{state="queued"}') == 1
    cluster.client.post(f"/jobs/{job}/cancel")
    cluster.wait_state(job, "cancelled")


def test_the_api_describes_itself(cluster: Cluster) -> None:
    status, answer = request(cluster, "GET", "/api/openapi.json")
    assert status == 200
    assert {"/api/v1/jobs", "/api/v1/nodes", "/api/v1/incidents/{number}"} <= answer["paths"].keys()
