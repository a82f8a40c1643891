"""Who is who in /proc, the marker, and what is noted before a kill."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from keepstep.agent.rank import kill, lines, marker, processes, protocol
from keepstep.agent.rank.processes import Process
from keepstep.core import beacon
from shims import until

_SLEEPER = [sys.executable, "-I", "-S", "-c", "import time; time.sleep(600)"]


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(_SLEEPER, env={protocol.MARKER: "j/1/n"}) as child:
        yield child
        child.kill()


def test_the_beacon_page_is_cores() -> None:
    assert protocol.BEACON_PAGE == beacon.PAGE


def test_descendants_are_found_whatever_their_depth() -> None:
    tree = {1: 0, 2: 1, 3: 2, 4: 3, 5: 1, 6: 0}
    table = {pid: Process(pid, parent, "S", pid) for pid, parent in tree.items()}
    assert [process.pid for process in processes.descendants(2, table)] == [3, 4]
    assert [process.pid for process in processes.descendants(1, table)] == [2, 5, 3, 4]
    assert processes.descendants(6, table) == []


def test_a_name_with_parentheses_and_spaces_is_read() -> None:
    Path("/proc/self/comm").write_text("a) S (b")
    try:
        assert processes.itself().parent == os.getppid()
    finally:
        Path("/proc/self/comm").write_text("python")


def test_a_number_used_again_is_another_process(sleeper: subprocess.Popen[bytes]) -> None:
    process = processes.read(sleeper.pid)
    assert process is not None
    earlier = Process(process.pid, process.parent, process.state, process.start_ticks - 1)
    assert processes.hold(earlier) is None
    assert not processes.send(earlier, signal.SIGKILL)
    assert not processes.is_alive(earlier.pid, earlier.start_ticks)
    assert sleeper.poll() is None
    assert processes.send(process, signal.SIGKILL)
    assert sleeper.wait() == -signal.SIGKILL
    assert not processes.send(process, signal.SIGKILL)


def test_a_zombie_is_dead() -> None:
    child = subprocess.Popen([sys.executable, "-I", "-S", "-c", ""])
    try:
        zombie = until(lambda: (found := processes.read(child.pid)) and found.state == "Z" and found)
        assert zombie
        assert not zombie.alive
    finally:
        child.wait()


def test_the_marker_is_found_whole_or_not_at_all(sleeper: subprocess.Popen[bytes]) -> None:
    until(lambda: marker.carries(sleeper.pid, "j/1/n"))
    assert not marker.carries(sleeper.pid, "j/1/")
    assert not marker.carries(sleeper.pid, "j/1/node")
    assert not marker.carries(os.getpid(), "j/1/n")
    assert not marker.carries(1 << 22, "j/1/n")


_OVERWRITE = """
import importlib.util, os, sys
here = sys.argv[1]
start = here + "/__init__.py"
spec = importlib.util.spec_from_file_location("side", start, submodule_search_locations=[here])
sys.modules["side"] = importlib.util.module_from_spec(spec)
from side import marker
marker.entitle(["python", "shim"])
print(marker.overwrite(sys.argv[2]), flush=True)
if os.fork() == 0:
    os.setsid()
    print(os.getpid(), flush=True)
    sys.stdin.read()
    os._exit(0)
os.wait()
"""


@pytest.mark.parametrize(("value", "fits"), [("job/12/node-7", True), ("j" * 160, True), ("j" * 161, False)])
def test_a_loaded_process_takes_its_marker_in_place(value: str, fits: bool) -> None:
    folder = str(Path(marker.__file__).parent)
    env = {"BEFORE": "1", protocol.MARKER: marker.PLACEHOLDER, "AFTER": "2"}
    words = [sys.executable, "-I", "-S", "-c", _OVERWRITE, folder, value]
    with subprocess.Popen(words, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == f"{fits}\n"
        escaped = int(child.stdout.readline())
        assert marker.carries(escaped, value) is fits
        block = Path(f"/proc/{escaped}/environ").read_bytes()
        assert block.startswith(b"BEFORE=1\0")
        assert b"\0AFTER=2\0" in block
        command = Path(f"/proc/{escaped}/cmdline").read_bytes()
        assert command.rstrip(b"\0") == b"python\0shim"


def test_only_files_of_libraries_are_taken_from_shared_memory() -> None:
    ours, kept = Path("/dev/shm/psm_keepstep_test"), Path("/dev/shm/keepstep-test-dataset")
    try:
        for path in (ours, kept):
            path.write_bytes(b"x")
        with ours.open("rb"), kept.open("rb"):
            assert [file.path for file in kill.shm_files(os.getpid())] == [str(ours)]
        assert kill.shm_files(os.getpid()) == set()
    finally:
        ours.unlink(missing_ok=True)
        kept.unlink(missing_ok=True)


def test_a_purge_ends_a_process_that_forks_all_the_time() -> None:
    text = "import os, time\nwhile True:\n    time.sleep(0.001)\n    os.fork() and os._exit(0)"
    words = [sys.executable, "-I", "-S", "-c", text]
    with subprocess.Popen(words, env={protocol.MARKER: "fork/1/n"}) as child:
        purge = kill.Purge()

        def left() -> int:
            return purge.round(marker.bearers(["fork/1/n"]))

        until(lambda: marker.carries(child.pid, "fork/1/n"))
        child.wait()  # the first of them; its children go on
        try:
            until(lambda: left() == 0)
            time.sleep(0.02)
            assert left() == 0
        finally:
            while left():
                pass


def test_a_socket_may_have_a_long_path(tmp_path: Path) -> None:
    folder = tmp_path / ("a" * 100) / ("b" * 100)
    folder.mkdir(parents=True)
    listener = lines.bind(folder / "it.sock")
    peer = lines.connect(folder / "it.sock")
    connection, _ = listener.accept()
    assert ((folder / "it.sock").stat().st_mode & 0o777) == 0o600
    for end in (listener, peer, connection):
        end.close()
    with pytest.raises(ConnectionRefusedError):
        lines.connect(folder / "it.sock")


def test_a_peer_that_does_not_read_is_dropped(tmp_path: Path) -> None:
    listener = lines.bind(tmp_path / "it.sock")
    silent = lines.connect(tmp_path / "it.sock")
    connection, _ = listener.accept()
    peer = lines.Peer(connection)
    for _ in range(64):
        peer.send({"filling": "x" * 100_000})
    assert not peer.open
    peer.close()
    silent.close()
    listener.close()


def test_a_peer_that_sends_nonsense_is_dropped(tmp_path: Path) -> None:
    listener = lines.bind(tmp_path / "it.sock")
    for words, requests in ((b'{"do": "status"}\n{"do"', 1), (b"GET / HTTP/1.1\n", 0), (b"[1]\n", 0)):
        client = lines.connect(tmp_path / "it.sock")
        peer = lines.Peer(listener.accept()[0])
        client.send(words)
        assert len(peer.read()) == requests
        assert peer.open is bool(requests)
        peer.close()
        client.close()
    listener.close()
