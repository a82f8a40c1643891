"""A working folder as one archive that is named by its content.

The same files give the same bytes: names are sorted, times, owners and all permissions but "executable" are
dropped. What does not belong on other machines is left out (see ignore.py); what looks like a secret stops
the packing, since a bundle is kept and handed out.
"""

import gzip
import hashlib
import io
import os
import stat
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from keepstep.core.bundles import LIMIT_BYTES, MOST_FILES, stays_inside
from keepstep.core.errors import InputError
from keepstep.spec.ignore import Ignore
from keepstep.spec.scalars import size_text

IGNORE_FILE = ".keepstepignore"
_SECRETIVE = (
    ".env", ".env.*", "id_rsa", "id_dsa", "id_ecdsa", "id_ed25519", "*.key", "*.pem", "*.p12", "*.pfx",
    ".netrc", ".pypirc", ".git-credentials", ".htpasswd", "kubeconfig", "credentials.json",
    "service-account*.json",
)  # fmt: skip
_HARMLESS = (".env.example", ".env.sample", ".env.template", ".env.dist")
_PERHAPS = ("*.pem", "*.key")  # a certificate is no secret: looked into
_MOST_NAMED = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    sha256: str  # of data
    data: bytes  # tar.gz
    files: int
    bytes: int  # of the files, unpacked
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Item:
    name: str  # relative, with /
    path: Path
    kind: str  # file, folder, link
    size: int
    executable: bool


def pack(workdir: Path, *, limit_bytes: int = LIMIT_BYTES, checkpoint_dir: Path | None = None) -> Bundle:
    """InputError if it is no folder, is too large, cannot be read, or has secrets in it."""
    if not workdir.is_dir():
        raise InputError(
            "no such folder", where=str(workdir), next="Name the folder to ship with run.workdir."
        )
    ignore = _ignore(workdir, checkpoint_dir)
    warnings: list[str] = []
    items = sorted(
        _items(workdir, ignore, warnings), key=lambda item: item.name.encode(errors="surrogateescape")
    )
    _refuse_secrets(workdir, items, ignore)
    _refuse_size(workdir, items, limit_bytes)
    raw = io.BytesIO()
    total = 0
    with (
        gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0, compresslevel=6) as packed,
        tarfile.open(fileobj=packed, mode="w|", format=tarfile.PAX_FORMAT, errors="surrogateescape") as tar,
    ):
        for item in items:
            total += _add(tar, item)
            if total > limit_bytes:  # it grew while it was read
                _refuse_size(workdir, items, 0)
    data = raw.getvalue()
    return Bundle(
        sha256=hashlib.sha256(data).hexdigest(),
        data=data,
        files=sum(item.kind == "file" for item in items),
        bytes=total,
        warnings=tuple(warnings),
    )


def _ignore(workdir: Path, checkpoint_dir: Path | None) -> Ignore:
    file = workdir / IGNORE_FILE
    text = file.read_text(errors="replace") if file.is_file() else ""
    also = []
    if checkpoint_dir is not None and checkpoint_dir.absolute().is_relative_to(workdir.absolute()):
        inside = checkpoint_dir.absolute().relative_to(workdir.absolute()).as_posix()
        also = [f"/{inside}/"] if inside != "." else []
    return Ignore.of(text, also=also)


def _items(root: Path, ignore: Ignore, warnings: list[str]) -> Iterator[_Item]:
    count = 0
    folders = [root]
    while folders:
        for entry in _listed(folders.pop()):
            path = Path(entry.path)
            name = path.relative_to(root).as_posix()
            is_folder = entry.is_dir(follow_symlinks=False)
            if ignore.leaves_out(name, folder=is_folder):
                continue
            item = _item(entry, path, name, warnings)
            if item is None:
                continue
            count += 1
            if count > MOST_FILES:
                next_ = f"Leave folders out with {IGNORE_FILE}, or use ship: none."
                raise InputError(
                    "too many files to ship", where=str(root), why=f"over {MOST_FILES:,}", next=next_
                )
            if is_folder:
                folders.append(path)
            yield item


def _listed(folder: Path) -> list["os.DirEntry[str]"]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        next_ = f"Make it readable, or leave it out with {IGNORE_FILE}."
        raise InputError("cannot be read", where=str(folder), why=error.strerror or "", next=next_) from None


def _item(entry: "os.DirEntry[str]", path: Path, name: str, warnings: list[str]) -> _Item | None:
    status = entry.stat(follow_symlinks=False)
    if stat.S_ISLNK(status.st_mode):
        target = os.readlink(path)  # noqa: PTH115 - as it is written
        if not stays_inside(name, target):
            warnings.append(f"{name}: left out, a link that leaves the folder ({target})")
            return None
        return _Item(name, path, "link", 0, executable=False)
    if stat.S_ISDIR(status.st_mode):
        return _Item(name, path, "folder", 0, executable=False)
    if not stat.S_ISREG(status.st_mode):
        warnings.append(f"{name}: left out, neither a file, a folder nor a link")
        return None
    return _Item(name, path, "file", status.st_size, executable=bool(status.st_mode & 0o100))


def _add(tar: tarfile.TarFile, item: _Item) -> int:
    info = tarfile.TarInfo(item.name)
    match item.kind:
        case "folder":
            info.type, info.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(info)
            return 0
        case "link":
            info.type, info.mode, info.linkname = tarfile.SYMTYPE, 0o777, os.readlink(item.path)  # noqa: PTH115
            tar.addfile(info)
            return 0
    try:
        content = item.path.read_bytes()
    except OSError as error:
        next_ = f"Make it readable, or leave it out with {IGNORE_FILE}."
        raise InputError(
            "cannot be read", where=str(item.path), why=error.strerror or "", next=next_
        ) from None
    info.size, info.mode = len(content), 0o755 if item.executable else 0o644
    tar.addfile(info, io.BytesIO(content))
    return len(content)


def _refuse_size(root: Path, items: list[_Item], limit_bytes: int) -> None:
    total = sum(item.size for item in items)
    if total <= limit_bytes:
        return
    largest = sorted(items, key=lambda item: -item.size)[:_MOST_NAMED]
    named = ", ".join(f"{item.name} ({_rounded(item.size)})" for item in largest if item.size)
    next_ = (
        f"Largest: {named}. Leave them out with {IGNORE_FILE}, or use ship: none where nodes see this folder."
    )
    what = f"too large to ship: {_rounded(total)} in {len(items):,} files"
    raise InputError(what, where=str(root), why=f"at most {size_text(limit_bytes)}", next=next_)


def _refuse_secrets(root: Path, items: list[_Item], ignore: Ignore) -> None:
    found = [
        item.name
        for item in items
        if item.kind == "file" and _secretive(item) and not ignore.wants(item.name)
    ]
    if not found:
        return
    named = ", ".join(found[:_MOST_NAMED]) + (
        f" and {len(found) - _MOST_NAMED} more" if found[_MOST_NAMED:] else ""
    )
    next_ = (
        f"Add it to {IGNORE_FILE}, and say under run.secrets where nodes find it; "
        f"or, if it is harmless, add the line  !/{found[0]}"
    )
    why = "bundles are kept and handed out"
    raise InputError(f"looks like secrets, not shipped: {named}", where=str(root), why=why, next=next_)


def _secretive(item: _Item) -> bool:
    name = item.path.name
    if name in _HARMLESS or not any(fnmatch(name, pattern) for pattern in _SECRETIVE):
        return False
    if any(fnmatch(name, pattern) for pattern in _PERHAPS):
        try:
            with item.path.open("rb") as stream:
                return b"PRIVATE KEY" in stream.read(65_536)
        except OSError:
            return True
    return True


def _rounded(count: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"
