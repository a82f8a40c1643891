"""Working folders that are shipped: packed here, unpacked there, nothing in between believed."""

import gzip
import io
import os
import socket
import tarfile
from pathlib import Path

import pytest

from keepstep.core.bundles import digest, extract, stays_inside
from keepstep.core.errors import InputError
from keepstep.spec.bundle import pack
from keepstep.spec.ignore import Ignore


@pytest.fixture
def work(tmp_path: Path) -> Path:
    folder = tmp_path / "work"
    (folder / "src").mkdir(parents=True)
    (folder / "train.py").write_text("print(1)\n")
    (folder / "src" / "model.py").write_text("x = 1\n")
    (folder / "run.sh").write_text("#!/bin/sh\n")
    (folder / "run.sh").chmod(0o700)
    return folder


def names(data: bytes) -> list[str]:
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as tar:
        return tar.getnames()


def unpacked(data: bytes, sha256: str, tmp_path: Path) -> Path:
    archive, target = tmp_path / "b.tar.gz", tmp_path / "nodes" / "b"
    archive.write_bytes(data)
    extract(archive, target, sha256=sha256)
    return target


def forged(tmp_path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> tuple[Path, str]:
    """An archive that `pack` would not make."""
    archive = tmp_path / "forged.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for info, content in members:
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return archive, digest(archive)


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def test_there_and_back(work: Path, tmp_path: Path) -> None:
    (work / "link").symlink_to("src/model.py")
    (work / "src" / "up").symlink_to("../train.py")
    (work / "empty").mkdir()
    bundle = pack(work)
    target = unpacked(bundle.data, bundle.sha256, tmp_path)
    assert (target / "train.py").read_text() == "print(1)\n"
    assert (target / "link").read_text() == "x = 1\n"
    assert (target / "src" / "up").is_symlink()
    assert (target / "empty").is_dir()
    assert os.access(target / "run.sh", os.X_OK)
    assert not os.access(target / "train.py", os.X_OK)
    assert (bundle.files, bundle.bytes) == (3, len("print(1)\n" + "x = 1\n" + "#!/bin/sh\n"))
    assert [path.name for path in target.parent.iterdir()] == ["b"], "nothing is left beside it"


def test_the_same_content_is_the_same_bundle(work: Path, tmp_path: Path) -> None:
    first = pack(work)
    other = tmp_path / "elsewhere" / "again"
    (other / "src").mkdir(parents=True, mode=0o700)
    for file in ("src/model.py", "run.sh", "train.py"):  # made in another order
        (other / file).write_bytes((work / file).read_bytes())
        os.utime(other / file, (1, 1))
    (other / "run.sh").chmod(0o755)
    (other / "train.py").chmod(0o600)
    assert pack(other).sha256 == first.sha256
    (other / "train.py").write_text("print(2)\n")
    assert pack(other).sha256 != first.sha256


def test_what_is_left_out_by_default(work: Path) -> None:
    for folder in (".git", "__pycache__", ".venv", "src/__pycache__", "out/checkpoints"):
        (work / folder).mkdir(parents=True)
        (work / folder / "x").write_text("x")
    (work / "src" / "a.pyc").write_text("x")
    packed = names(pack(work, checkpoint_dir=work / "out" / "checkpoints").data)
    assert packed == ["out", "run.sh", "src", "src/model.py", "train.py"]


def test_the_ignore_file(work: Path) -> None:
    (work / ".keepstepignore").write_text("# big\n*.bin\n!keep.bin\n/data/\nsrc/**/cache\n\n")
    (work / "src" / "deep" / "cache").mkdir(parents=True)
    (work / "data").mkdir()
    (work / "src" / "data").mkdir()
    for file in ("a.bin", "keep.bin", "src/b.bin", "data/x", "src/data/x", "src/deep/cache/x", "src/deep/y"):
        (work / file).write_text("x")
    packed = [name for name in names(pack(work).data) if name not in ("run.sh", "train.py", "src/model.py")]
    assert packed == ["keep.bin", "src", "src/data", "src/data/x", "src/deep", "src/deep/y"]


@pytest.mark.parametrize(
    ("pattern", "name", "folder", "out"),
    [
        ("*.log", "a.log", False, True),
        ("*.log", "deep/er/a.log", False, True),
        ("/a.log", "deep/a.log", False, False),
        ("logs/", "logs", False, False),
        ("logs/", "deep/logs", True, True),
        ("a/b", "a/b", False, True),
        ("a/b", "x/a/b", False, False),
        ("**/b", "x/a/b", False, True),
        ("a/**", "a/x/y", False, True),
        ("a/**/z", "a/z", False, True),
        ("a?c", "a/c", False, False),
        ("[ab].py", "b.py", False, True),
        ("[!ab].py", "b.py", False, False),
        ("[", "[", False, True),
        ("\\#x", "#x", False, True),
        ("x\\ ", "x ", False, True),
        ("a.c", "abc", False, False),
        ("*\n!a.py", "a.py", False, False),
    ],
)
def test_patterns(pattern: str, name: str, folder: bool, out: bool) -> None:
    assert Ignore.of(pattern).leaves_out(name, folder=folder) is out


def test_too_large_names_the_largest(work: Path) -> None:
    (work / "weights.bin").write_bytes(bytes(3 * 2**20))
    (work / "tokens.bin").write_bytes(bytes(2 * 2**20))
    with pytest.raises(InputError) as caught:
        pack(work, limit_bytes=2**20)
    told = str(caught.value)
    assert "5.0 MiB" in told
    assert "at most 1MiB" in told
    assert told.index("weights.bin (3.0 MiB)") < told.index("tokens.bin (2.0 MiB)")
    (work / ".keepstepignore").write_text("*.bin\n")
    assert pack(work, limit_bytes=2**20).files == 3


@pytest.mark.parametrize(
    "name", [".env", ".env.production", "id_rsa", "deploy.key", "server.pem", "sub/.netrc"]
)
def test_secrets_stop_the_packing(work: Path, name: str) -> None:
    (work / name).parent.mkdir(exist_ok=True)
    (work / name).write_text("-----BEGIN PRIVATE KEY-----\n")
    with pytest.raises(InputError, match="looks like secrets") as caught:
        pack(work)
    assert name in str(caught.value)
    (work / ".keepstepignore").write_text(f"{name}\n")
    assert name not in names(pack(work).data)
    (work / ".keepstepignore").write_text(f"!/{name}\n")
    assert name in names(pack(work).data), "somebody said that it is meant"


@pytest.mark.parametrize("name", [".env.example", "ca.pem", "environment.py", "keys.py"])
def test_what_is_no_secret_is_shipped(work: Path, name: str) -> None:
    (work / name).write_text("-----BEGIN CERTIFICATE-----\n")
    assert name in names(pack(work).data)


def test_links_that_leave_are_left_out_and_told(work: Path) -> None:
    (work / "data").symlink_to("/mnt/data")
    (work / "up").symlink_to("../other")
    (work / "round").symlink_to("src/../../work/train.py")
    (work / "loop").symlink_to("loop")
    bundle = pack(work)
    assert [warning.split(":")[0] for warning in sorted(bundle.warnings)] == ["data", "round", "up"]
    assert "loop" in names(bundle.data)


def test_sockets_and_pipes_are_left_out_and_told(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(work / "pipe")
    monkeypatch.chdir(work)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("sock")
    bundle = pack(work)
    assert len(bundle.warnings) == 2
    assert not {"pipe", "sock"} & set(names(bundle.data))


def test_names_that_are_no_text_survive(work: Path, tmp_path: Path) -> None:
    odd = os.fsdecode(b"caf\xe9.txt")
    (work / odd).write_text("x")
    (work / ("long" * 50 + ".txt")).write_text("y")
    bundle = pack(work)
    target = unpacked(bundle.data, bundle.sha256, tmp_path)
    assert (target / odd).read_text() == "x"
    assert (target / ("long" * 50 + ".txt")).read_text() == "y"


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        pack(tmp_path / "none")


@pytest.mark.parametrize(
    ("name", "target", "inside"),
    [
        ("a", "b", True), ("a", "../b", False), ("d/a", "../b", True), ("d/a", "../../b", False),
        ("a", "/etc/passwd", False), ("a", "b/../../c", False), ("a", "b/../c", False), ("a", "", False),
        ("a", ".", True), ("a", "..", False),
    ],
)  # fmt: skip
def test_where_links_lead(name: str, target: str, inside: bool) -> None:
    assert stays_inside(name, target) is inside


@pytest.mark.parametrize(
    ("members", "why"),
    [
        ([(member("../evil"), b"x")], "leaves the folder"),
        ([(member("/etc/evil"), b"x")], "leaves the folder"),
        ([(member("a/../../evil"), b"x")], "leaves the folder"),
        ([(member("out", tarfile.SYMTYPE, "/tmp"), b"")], "link that leaves"),
        ([(member("out", tarfile.SYMTYPE, "../.."), b"")], "link that leaves"),
        ([(member("hard", tarfile.LNKTYPE, "/etc/passwd"), b"")], "neither a file"),
        ([(member("null", tarfile.CHRTYPE), b"")], "neither a file"),
        ([(member("pipe", tarfile.FIFOTYPE), b"")], "neither a file"),
        ([(member("a"), b"1"), (member("a"), b"2")], "twice"),
        ([(member("a"), b"1"), (member("a/b"), b"2")], "beneath a file"),
        ([(member("l", tarfile.SYMTYPE, "d"), b""), (member("l/x"), b"2")], "twice"),
        ([(member("."), b"x")], "twice"),
        ([(member("big"), bytes(5000))], "larger than"),
    ],
)
def test_forged_archives_make_nothing(
    tmp_path: Path, members: list[tuple[tarfile.TarInfo, bytes]], why: str
) -> None:
    archive, sha256 = forged(tmp_path, *members)
    target = tmp_path / "nodes" / "b"
    with pytest.raises(InputError, match=why):
        extract(archive, target, sha256=sha256, limit_bytes=4096)
    assert not list(target.parent.iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["forged.tar.gz", "nodes"]


def test_damaged_archives(work: Path, tmp_path: Path) -> None:
    good = pack(work).data
    for index, data in enumerate((good[:-20], b"no gzip at all", good[:40] + b"\0" * 20 + good[60:], b"")):
        archive = tmp_path / f"{index}.tar.gz"
        archive.write_bytes(data)
        with pytest.raises(InputError):
            extract(archive, tmp_path / "t" / str(index), sha256=digest(archive))
        assert not (tmp_path / "t" / str(index)).exists()


def test_another_archive_than_the_one_named(work: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not the bundle"):
        unpacked(pack(work).data, "0" * 64, tmp_path)


def test_what_grows_without_end_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from keepstep.core import bundles

    monkeypatch.setattr(bundles, "MOST_FILES", 10)
    archive = tmp_path / "bomb.tar.gz"
    head = member("pax", tarfile.XHDTYPE)
    head.size = 50 * 2**20  # a header of 50 MiB, which tarfile would hold in memory
    with gzip.open(archive, "wb") as stream:
        stream.write(head.tobuf())
        stream.write(bytes(head.size))
    with pytest.raises(InputError, match="grows beyond"):
        extract(archive, tmp_path / "t", sha256=digest(archive), limit_bytes=4096)


def test_a_bundle_that_is_there_is_left_alone(work: Path, tmp_path: Path) -> None:
    bundle = pack(work)
    target = unpacked(bundle.data, bundle.sha256, tmp_path)
    (target / "made-by-a-rank").write_text("x")
    extract(tmp_path / "b.tar.gz", target, sha256=bundle.sha256)
    assert (target / "made-by-a-rank").exists()
