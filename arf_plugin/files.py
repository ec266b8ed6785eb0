"""Files: found by name and never by pattern, written whole or not at all, told apart by what they contain."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from arf_plugin.errors import CacheError, did_you_mean
from arf_plugin.untrusted import read_json

TEMPORARY = ".incomplete-"
_check: ContextVar[Callable[[], None] | None] = ContextVar("check", default=None)


def not_there(path: str) -> str:
    """Says that nothing is at a path, and what was probably meant."""
    parent = Path(path).absolute()
    while not parent.exists():
        missing, parent = parent.name, parent.parent
    beside = sorted(one.name for one in (parent.iterdir() if parent.is_dir() else ()) if one.name[0] != ".")
    meant = did_you_mean(missing, beside)
    shown = "This folder" if parent == Path.cwd() else str(parent)
    holds = "" if meant else f" {shown} holds: {', '.join(beside[:5]) or 'nothing'}."
    return f"{path} does not exist.{meant}{holds}"


@contextmanager
def checked(check: Callable[[], None]) -> Iterator[None]:
    """Has `replacing` call ``check`` before a file takes its name, which an error of ``check`` prevents."""
    token = _check.set(check)
    try:
        yield
    finally:
        _check.reset(token)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path`` that takes its name once the block has succeeded.

    Two processes may write the same file at once: each has a temporary name of its own, which nobody can guess and
    lay a link at. The file is there and empty; writers open it by its name.

    Raises:
        OSError: with the name of the file that could not be written, on a full disk, too.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(
            f"{TEMPORARY}{os.getpid()}@{socket.gethostname()}@{secrets.token_hex(6)}@{path.name[-60:]}"
        )
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        try:
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            if (check := _check.get()) is not None:
                check()
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as cause:
        if cause.filename is None and cause.errno is not None:  # of a write: the system does not say where
            raise OSError(cause.errno, cause.strerror, str(path)) from cause
        raise


def list_files(folder: Path, suffix: str) -> list[Path]:
    """Files directly in a folder whose names end in ``suffix``, by name; empty if there is no such folder.

    No name is taken for a pattern. Hidden files, those of killed processes among them, are left out.
    """
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if not entry.is_dir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [folder / name for name in names if name.endswith(suffix) and not name.startswith(".")]


def list_files_of(url: str, folder: str, suffix: str) -> tuple[Any, list[str]]:
    """As `list_files`, for a folder of an anchor set that may be an fsspec URL: its file system, and paths in it."""
    import fsspec

    fs, root = fsspec.core.url_to_fs(url)
    return fs, sorted(sizes_in(fs, f"{root.rstrip('/')}/{folder}", suffix))


def sizes_in(fs: Any, folder: str, suffix: str) -> dict[str, int]:
    """Sizes in bytes, by path, of the files directly in a folder of an fsspec file system; see `list_files`."""
    try:
        entries = fs.ls(folder, detail=True)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    sizes = {e["name"].rstrip("/"): int(e["size"] or 0) for e in entries if e["type"] != "directory"}
    hidden = {name for name in sizes if name.rsplit("/", 1)[-1].startswith(".")}
    return {name: sizes[name] for name in sizes if name.endswith(suffix) and name not in hidden}


def cache_folder() -> Path:
    """Returns the folder for what can be derived again: ``ARF_CACHE_DIR``, else ``~/.cache/arf-plugin``.

    Raises:
        CacheError: there is neither the variable nor a home.
    """
    if given := os.environ.get("ARF_CACHE_DIR"):
        return Path(given)
    try:
        return Path.home() / ".cache" / "arf-plugin"
    except RuntimeError as cause:
        raise CacheError(
            "This user has no home folder, so there is no place for caches. Set ARF_CACHE_DIR."
        ) from cause


def read_cache(kind: str, key: str, type_: type = dict) -> Any:
    """Finds a value in the cache; None if it is not there or damaged.

    Args:
        kind: folder of the cache.
        key: a digest of all that the value depends on.
        type_: type of the value.
    """
    with contextlib.suppress(CacheError):
        return read_json(cache_folder() / kind / f"{key[:40]}.json", CacheError, type_)


def write_cache(kind: str, key: str, value: Any) -> None:
    """Puts a value into the cache; one that cannot be written costs time, and no correctness."""
    with contextlib.suppress(CacheError, OSError):
        write_json(cache_folder() / kind / f"{key[:40]}.json", value)


def stat_key(path: Path) -> list[int]:
    """What changes when a file is written again or another takes its place: size, times in nanoseconds, inode.

    The time of the last change of the inode is among them, which no program can set.

    Raises:
        OSError: it is missing.
    """
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def known_stat(path: Path) -> list[int] | None:
    """`stat_key`; None if the file is missing, or has a name that none can have."""
    try:
        return stat_key(path)
    except (OSError, ValueError):
        return None


def content_digest(
    paths: Sequence[Path], *, trust_cache: bool = True, advance: Callable[[int], object] | None = None
) -> str:
    """Returns one SHA-256 over the contents of files, in order; names and places are no part of it.

    It is computed once and then found in the cache for as long as no file's `stat_key` changes.

    Args:
        paths: the files.
        trust_cache: False reads every byte, whatever the cache says.
        advance: called with the number of bytes of each block that is read.

    Raises:
        OSError: one cannot be read.
    """
    key = digest(["content-1", [[str(path.absolute()), *stat_key(path)] for path in paths]])
    known = (read_cache("digests", key) or {}).get("sha256") if trust_cache else None
    if isinstance(known, str):
        return known
    found = [file_digest(path, advance) for path in paths]
    value = found[0] if len(found) == 1 else digest(found)
    write_cache("digests", key, {"sha256": value})
    return value


def remove_incomplete(folder: Path, *, all_hosts: bool = True) -> None:
    """Removes what killed processes left behind in a folder.

    Args:
        folder: the folder; those below are left alone.
        all_hosts: removes every temporary file; otherwise only those of processes of this host that are gone, for
            folders that another stage may be writing to.
    """
    for path in folder.glob(f"{TEMPORARY}*"):
        pid, _, rest = path.name.removeprefix(TEMPORARY).partition("@")
        here = rest.startswith(f"{socket.gethostname()}@")
        if all_hosts or (here and not (pid.isdigit() and _is_alive(int(pid)))):
            path.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        return True
    return True


def write_json(path: Path, value: Any) -> None:
    """Writes JSON with sorted keys, so that equal values are equal bytes."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False)
    with replacing(path) as temporary:
        # What is no UTF-8 in a name is written as the escape that JSON has for it.
        temporary.write_bytes(text.encode("utf-8", "backslashreplace") + b"\n")


def digest(value: Any) -> str:
    """Returns the SHA-256 of a JSON value in hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path, advance: Callable[[int], object] | None = None) -> str:
    """Returns the SHA-256 of a file in hexadecimal, from its bytes and never from a cache."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sha.update(block)
            if advance is not None:
                advance(len(block))
    return sha.hexdigest()


def folder_digest(folder: Path) -> str:
    """Returns one SHA-256 over the names and contents of all files below a folder, hidden ones left out."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    return digest([[str(p.relative_to(folder)), file_digest(p)] for p in files])
