"""The sorted captions: found again when they are the same, made again when not, and kept somewhere in any case."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import filelock
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support import data

from arf_plugin.anchors import mapped
from arf_plugin.data.captions import CaptionStore, open_captions
from arf_plugin.errors import CacheError

CAPTIONS = {f"s/{number}": f"caption {number}" for number in range(50)}


def texts(store: CaptionStore) -> dict[str, str]:
    return {identity: text for identity in CAPTIONS for text in store.get(identity)}


@pytest.fixture
def anchors(tmp_path):
    data.write_captions(tmp_path / "set", CAPTIONS)
    return str(tmp_path / "set")


@pytest.fixture
def no_variable(monkeypatch, tmp_path):
    """A user who has named no folder for caches."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.delenv("ARF_CACHE_DIR")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return tmp_path / "temporary" / f"arf-plugin-{os.getuid()}"


def test_captions_of_equal_size_and_time_are_others(anchors):
    """Identity is content: neither the size of a file nor its time of change says that it is the same."""
    file = Path(anchors) / "captions" / "part-00000.parquet"
    table = pa.table({"id": list(CAPTIONS), "caption": list(CAPTIONS.values())})
    pq.write_table(table, file, compression="none")
    before, times, size = open_captions(anchors), file.stat(), file.stat().st_size
    other = pa.array([text.replace("caption", "picture") for text in CAPTIONS.values()])
    pq.write_table(table.set_column(1, "caption", other), file, compression="none")
    assert file.stat().st_size == size
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    after = open_captions(anchors)
    assert before.get("s/1") == ["caption 1"] and after.get("s/1") == ["picture 1"]


def test_brackets_are_no_pattern(tmp_path):
    for folder, text in (("run[1]", "mine"), ("run1", "the neighbour's")):
        data.write_captions(tmp_path / folder, {"a/1": text})
    assert open_captions(str(tmp_path / "run[1]")).get("a/1") == ["mine"]
    (tmp_path / "run[2]").mkdir()
    assert open_captions(str(tmp_path / "run[2]")) is None


def test_a_name_that_is_no_utf8_finds_its_caption(tmp_path):
    data.write_captions(tmp_path, {"stra\\xdfe/1": "a street"})
    store = open_captions(str(tmp_path))
    assert store.get("stra\udcdfe/1") == ["a street"] and "stra\udcdfe/1" in store


def seal(path: Path) -> None:
    """Gives a file the checksum that it should have."""
    path.with_suffix(".crc32").write_text(f"{zlib.crc32(path.read_bytes()):08x}")


def plant(change, key: bool = True):
    """Puts another table into the cache, in the right form but for `change`."""

    def damage(path: Path) -> None:
        parts = mapped._mapped(path)
        columns = {
            name: pa.array(part[name].to_pylist(), part[name].type)
            for part in parts
            for name in part.schema.names
        }
        changed = change(columns)
        path.unlink()
        with pa.OSFile(str(path), "wb") as sink:
            for part in parts:
                table = pa.table(
                    {name: changed[name] for name in part.schema.names if name in changed} or changed
                )
                table = table.replace_schema_metadata(part.schema.metadata if key else None)
                with pa.ipc.new_stream(sink, table.schema) as writer:
                    writer.write_table(table)
        seal(path)

    return damage


def reversed_rows(columns):
    return {name: column.take(pa.array(range(len(column))[::-1])) for name, column in columns.items()}


def offsets_out_of_range(columns):
    column = columns["caption"]
    offsets = np.frombuffer(column.buffers()[1], np.int64).copy()
    offsets[1:-1] = 1 << 40
    buffers = [None, pa.py_buffer(offsets.tobytes()), column.buffers()[2]]
    return columns | {"caption": pa.Array.from_buffers(pa.large_string(), len(column), buffers)}


def no_text(columns):
    column = columns["caption"]
    buffers = [None, column.buffers()[1], pa.py_buffer(b"\xff" * column.buffers()[2].size)]
    return columns | {"caption": pa.Array.from_buffers(pa.large_string(), len(column), buffers)}


def file_in_the_way(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def link_in_the_way(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[: len(content) // 2] = os.urandom(len(content) // 2)
    path.write_bytes(content)
    seal(path)


def pipe_for_a_checksum(path: Path) -> None:
    path.with_suffix(".crc32").unlink()
    os.mkfifo(path.with_suffix(".crc32"))


DAMAGES = {
    "other captions": plant(lambda c: c | {"caption": pa.array(["evil"] * 50, pa.large_string())}, key=False),
    "not sorted": plant(reversed_rows),
    "digests of others": plant(lambda c: c | {"digest": pa.array(np.arange(50, dtype=np.uint64))}),
    "offsets": plant(offsets_out_of_range),
    "no UTF-8": plant(no_text),
    "rows beyond the end": plant(lambda c: c | {"row": pa.array(np.arange(50) + 1)}),
    "rows of others": plant(lambda c: c | {"row": pa.array(np.roll(c["row"], 1))}),
    "an index of fewer": plant(lambda c: c | {name: c[name][:49] for name in ("digest", "row")}),
    "gaps": plant(lambda c: c | {"caption": pa.nulls(50, pa.large_string())}),
    "other types": plant(lambda c: c | {"digest": pa.array(range(50))}),
    "no columns": plant(lambda c: {"x": [1]}),
    "no table": lambda path: (path.write_bytes(b"ARROW1"), seal(path)),
    "empty": lambda path: (path.write_bytes(b""), seal(path)),
    "half": lambda path: (path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]), seal(path)),
    "flipped": flipped,
    "checksum of bytes": lambda path: path.with_suffix(".crc32").write_bytes(b"\xff\xfe" * 1000),
    "checksum missing": lambda path: path.with_suffix(".crc32").unlink(),
    "checksum a pipe": pipe_for_a_checksum,
    "a pipe": file_in_the_way,
    "a link": link_in_the_way,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_what_is_not_sound_is_made_again(anchors, damage):
    path = open_captions(anchors).path
    damage(path)
    assert texts(open_captions(anchors)) == CAPTIONS
    assert path.is_file() and not path.is_symlink()
    assert not list(path.parent.glob(".incomplete-*"))


def test_a_damaged_file_is_refused_in_a_loader_worker(anchors):
    store = open_captions(anchors)
    store.path.write_bytes(b"ARROW1")
    with pytest.raises(CacheError, match="is no readable cache of captions"):
        CaptionStore(store.path)


def test_a_link_for_a_lock_is_not_followed(anchors, tmp_path):
    path = open_captions(anchors).path
    path.unlink()
    precious = tmp_path / "precious"
    precious.write_text("keep me")
    lock = path.with_suffix(".arrow.lock")
    lock.unlink(missing_ok=True)
    lock.symlink_to(precious)
    with pytest.raises(CacheError, match=r"is in the way, remove it.*ARF_CACHE_DIR"):
        open_captions(anchors)
    assert precious.read_text() == "keep me"


def test_a_sound_file_needs_no_lock_and_no_room(anchors):
    path = open_captions(anchors).path
    with filelock.FileLock(path.with_suffix(".arrow.lock")):
        assert texts(open_captions(anchors)) == CAPTIONS


def test_a_lock_that_is_never_given_back_ends_in_one_sentence(anchors, monkeypatch, caplog):
    path = open_captions(anchors).path
    path.unlink()
    acquire = filelock.FileLock.acquire
    monkeypatch.setattr(
        filelock.FileLock, "acquire", lambda self, timeout: acquire(self, timeout=timeout / 1e4)
    )
    other = filelock.FileLock(path.with_suffix(".arrow.lock"))
    acquire(other)
    with pytest.raises(CacheError, match=r"Another process has held .* for 30 minutes"):
        open_captions(anchors)
    other.release()


@pytest.mark.parametrize("place", ["/proc/1/nothing", "a file", "below a file"])
def test_a_folder_that_the_user_named_is_used_or_refused(anchors, tmp_path, monkeypatch, place):
    (tmp_path / "file").write_text("")
    place = {"a file": f"{tmp_path}/file", "below a file": f"{tmp_path}/file/cache"}.get(place, place)
    monkeypatch.setenv("ARF_CACHE_DIR", place)
    with pytest.raises(
        CacheError, match=r"There is no place for the sorted captions.*ARF_CACHE_DIR"
    ) as error:
        open_captions(anchors)
    assert place in str(error.value) and "\n" not in str(error.value)


def test_the_usual_folder_is_taken_where_it_works(anchors, no_variable, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert open_captions(anchors).path.is_relative_to(tmp_path / "home" / ".cache" / "arf-plugin")
    assert not no_variable.exists()


@pytest.mark.parametrize("home", ["/proc/1", None])
def test_without_a_usable_home_all_processes_share_a_private_folder(
    anchors, no_variable, monkeypatch, home, caplog
):
    if home is None:
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    else:
        monkeypatch.setenv("HOME", home)
    store = open_captions(anchors)
    assert store.path.is_relative_to(no_variable) and texts(store) == CAPTIONS
    assert no_variable.stat().st_mode & 0o777 == 0o700
    assert open_captions(anchors).path == store.path


@pytest.mark.parametrize("trap", ["link", "open to all", "a file", "another user's"])
def test_a_private_folder_that_is_not_private_is_refused(anchors, no_variable, tmp_path, monkeypatch, trap):
    monkeypatch.setenv("HOME", "/proc/1")
    (tmp_path / "other").mkdir()
    if trap == "link":
        no_variable.symlink_to(tmp_path / "other")
    elif trap == "open to all":
        no_variable.mkdir()
        no_variable.chmod(0o777)
    elif trap == "a file":
        no_variable.write_text("")
    else:
        if os.getuid():
            pytest.skip("only the administrator can make folders of others")
        no_variable.mkdir(mode=0o700)
        os.chown(no_variable, 12345, 12345)
    with pytest.raises(CacheError, match=r"it is not this user's alone.*ARF_CACHE_DIR"):
        open_captions(anchors)
    assert not list((tmp_path / "other").iterdir())


@pytest.mark.skipif(os.getuid() != 0, reason="only the administrator can give files to others")
def test_a_file_that_another_user_has_planted_is_not_believed(anchors):
    path = open_captions(anchors).path
    plant(lambda c: c | {"caption": pa.array(["evil"] * 50, pa.large_string())})(path)
    for file in (path, path.with_suffix(".crc32")):
        os.chown(file, 12345, 12345)
    assert texts(open_captions(anchors)) == CAPTIONS


FULL = """
import os, subprocess, sys
sys.path[:0] = {path!r}
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "none", {small!r}], check=True)
from arf_plugin.data.captions import open_captions
from arf_plugin.errors import CacheError
try:
    print("store", open_captions({anchors!r}).path)
except CacheError as error:
    print("refused", error)
"""


@pytest.mark.parametrize("named", [True, False])
def test_a_full_disk_is_named_or_got_around(anchors, no_variable, tmp_path, named):
    (tmp_path / "small").mkdir()
    small = str(tmp_path / "small")
    code = FULL.format(path=[p for p in sys.path if p], small=small, anchors=anchors)
    variables = {"ARF_CACHE_DIR": small} if named else {"HOME": small, "TMPDIR": str(no_variable.parent)}
    done = subprocess.run(
        ["unshare", "-rm", sys.executable, "-c", code],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    if named:
        assert (
            done.stdout.startswith("refused") and f"{small}/captions (No space left on device)" in done.stdout
        )
    else:
        assert done.stdout == f"store {next(no_variable.rglob('*.arrow'))}\n", done.stdout + done.stderr


KILLED = """
import os, sys
sys.path[:0] = {path!r}
from pathlib import Path
from arf_plugin.anchors import mapped
from arf_plugin.data import captions
step, real = int(sys.argv[1]), (Path.replace, mapped._crc32)
calls = 0
def count(call):
    def counted(*args):
        global calls
        calls += 1
        if calls == step:
            os._exit(9)
        return call(*args)
    return counted
Path.replace, mapped._crc32 = count(real[0]), count(real[1])
captions.open_captions({anchors!r})
"""


@pytest.mark.process
def test_a_kill_at_any_moment_leaves_nothing_that_is_believed(anchors):
    """Between any two steps that writing takes: the next start finds the right captions."""
    code = KILLED.format(path=[p for p in sys.path if p], anchors=anchors)
    for step in range(1, 6):
        for path in mapped.cache_folder().glob("captions/*"):
            path.unlink()
        status = subprocess.run([sys.executable, "-c", code, str(step)], check=False).returncode
        assert texts(open_captions(anchors)) == CAPTIONS
        assert not list((mapped.cache_folder() / "captions").glob(".incomplete-*"))
        if status == 0:
            break
    assert status == 0 and step > 3
