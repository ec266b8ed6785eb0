"""Files are found by name, written whole, and told apart by content."""

from __future__ import annotations

import os

import pytest

from arf_plugin import files
from arf_plugin.errors import CacheError


def test_names_are_no_patterns_and_hidden_files_are_none(tmp_path):
    for folder in ("run[1]", "run1"):
        (tmp_path / folder / "pairs").mkdir(parents=True)
        (tmp_path / folder / "pairs" / f"{folder}.tar").write_bytes(b"")
        (tmp_path / folder / "pairs" / ".incomplete-1@x@y@0.tar").write_bytes(b"")
    assert [p.name for p in files.list_files(tmp_path / "run[1]/pairs", ".tar")] == ["run[1].tar"]
    _, found = files.list_files_of(str(tmp_path / "run[1]"), "pairs", ".tar")
    assert [name.rsplit("/", 1)[-1] for name in found] == ["run[1].tar"]
    assert files.list_files(tmp_path / "none", ".tar") == []
    assert files.list_files_of(str(tmp_path / "none"), "pairs", ".tar")[1] == []


def test_temporary_names_cannot_be_guessed_nor_followed(tmp_path):
    names = set()
    for _ in range(2):
        with files.replacing(tmp_path / "a.json") as temporary:
            names.add(temporary.name)
            temporary.write_text("x")
    assert len(names) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_error_of_a_full_disk_names_the_file(tmp_path):
    with pytest.raises(OSError, match=r"No space.*a\.json"), files.replacing(tmp_path / "a.json"):
        raise OSError(28, "No space left on device")
    assert not any(tmp_path.iterdir())


def test_digest_follows_the_content(tmp_path):
    path, other = tmp_path / "a", tmp_path / "b"
    path.write_bytes(b"one")
    before = files.content_digest([path])
    assert before == files.content_digest([path]) == files.file_digest(path)
    stat = path.stat()
    path.write_bytes(b"two")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert files.content_digest([path]) != before
    path.write_bytes(b"one")
    other.write_bytes(b"one")
    assert files.content_digest([path]) == files.content_digest([other]) == before
    assert files.content_digest([path, other]) != before


def test_digest_without_trust_reads_every_byte(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_bytes(b"one")
    right = files.content_digest([path])
    for cached in (files.cache_folder() / "digests").iterdir():
        cached.write_text('{"sha256": "planted"}')
    assert files.content_digest([path]) == "planted"
    assert files.content_digest([path], trust_cache=False) == right


def test_no_home_is_one_sentence(monkeypatch):
    monkeypatch.delenv("ARF_CACHE_DIR")
    monkeypatch.setattr(files.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    with pytest.raises(CacheError, match="ARF_CACHE_DIR"):
        files.cache_folder()
    files.write_cache("digests", "0", {})
    assert files.read_cache("digests", "0") is None
