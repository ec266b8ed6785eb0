"""open_clip's reader of task tars with joint texts: what it skips is left to it, and nothing else is read."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from open_clip_train.data import tarfile_to_samples_nothrow
from support import data
from support.tars import write_tar

from arf_plugin.anchors.task import scan_task_ids
from arf_plugin.data.captions import open_captions
from arf_plugin.data.prompts import ClassIndices, ClassPrompts
from arf_plugin.data.texts import JoinedSamples, TaskTexts
from arf_plugin.errors import MissingCaptionError, TaskDataError

PHOTO = data.image(1)
PROMPTS = ClassPrompts(["cat", "dog"], ["a {c}"])


def joined(tmp_path: Path, members: list[tuple[str, bytes]], texts: TaskTexts) -> list[dict]:
    path = write_tar(tmp_path / "x.tar", members)
    return list(JoinedSamples(tarfile_to_samples_nothrow, texts)(iter([{"url": str(path)}])))


def test_a_text_that_a_class_prompt_replaces_is_not_decoded(tmp_path):
    members = [("0.png", PHOTO), ("0.cls", b"1"), ("0.txt", "Straße".encode("latin-1"))]
    (sample,) = joined(tmp_path, members, TaskTexts(PROMPTS, None))
    assert sample["txt"] == b"a dog"


def test_a_text_that_is_needed_and_not_utf8_is_left_to_open_clip(tmp_path):
    latin = "Straße".encode("latin-1")
    members = [("0.png", PHOTO), ("0.txt", latin), ("1.png", PHOTO), ("1.txt", b"fine")]
    for prompts in (None, PROMPTS):  # plain mixing
        found = joined(tmp_path, members, TaskTexts(prompts, None))
        assert [sample["txt"] for sample in found] == [latin, b"fine"]


def test_samples_that_open_clip_skips_are_handed_on_as_they_are(tmp_path):
    members = [
        *(
            ("0.cls", b"nonsense"),
            ("1.txt", b"alone"),
            ("2.png", PHOTO),
            ("3.json", b""),
            ("README.md", b"x"),
        ),
        *(("d/._4.png", b"apple"), ("d/4.png", PHOTO), ("d/4.cls", b"0")),
    ]
    for texts in (TaskTexts(PROMPTS, None), TaskTexts(ClassIndices(2), None, mix=False)):
        found = joined(tmp_path, members, texts)
        assert [sample["__key__"] for sample in found] == ["0", "1", "2", "3", "README", "d/", "d/4"]
        whole = [sample["__key__"] for sample in found if "png" in sample and "txt" in sample]
        assert whole == ["d/4"]


def test_only_image_and_text_are_handed_on(tmp_path):
    others = [
        ("0.pyd", b"x"),
        ("0.json", b""),
        ("0.cls", b"0"),
        ("0.jpg", b""),
        ("0.webp", b"broken"),
        ("0.mp4", b"x"),
    ]
    (sample,) = joined(tmp_path, [("0.png", PHOTO), *others, ("0.txt", b"own")], TaskTexts(None, None))
    assert sorted(sample) == ["__key__", "__url__", "jpg", "txt"], "open_clip takes jpg before png"


def test_a_class_that_is_no_index_names_the_sample(tmp_path):
    with pytest.raises(TaskDataError, match=r"Sample x/0: cls is b?'3\.9', expected a class index"):
        joined(tmp_path, [("0.png", PHOTO), ("0.cls", b"3.9")], TaskTexts(PROMPTS, None))


@pytest.mark.parametrize("word", ["__url__", "__key__"])
def test_members_that_overwrite_webdatasets_notes_have_no_id(tmp_path, word):
    members = [(f"0.{word}", b"other/1"), ("0.png", PHOTO), ("0.txt", b"own")]
    if word == "__key__":  # the next member begins a sample of its own
        assert [s.get("txt") for s in joined(tmp_path, members, TaskTexts(None, None))] == [None, b"own"]
        return
    with pytest.raises(TaskDataError, match="has a member named like webdataset's own notes"):
        joined(tmp_path, members, TaskTexts(None, None))


NAMES = ["stra\udcdfe", "größe", "a b\n\x1b[31m", "\udcff" * 40, "漢字" * 60]


@pytest.mark.parametrize("encoding", ["utf-8", "gnu"])
def test_a_scan_and_the_trainer_give_the_same_ids_to_names_of_any_bytes(tmp_path, encoding):
    path = tmp_path / "gr\udcf6\udcdfe.tar"
    form = tarfile.PAX_FORMAT if encoding == "utf-8" else tarfile.GNU_FORMAT
    write_members(path, NAMES, form)
    ids = scan_task_ids(str(path)).ids
    assert len(ids) == len(NAMES) and all(identity.startswith("gr\\xf6\\xdfe/") for identity in ids)
    data.write_captions(tmp_path / "set", {identity: f"caption of {n}" for n, identity in enumerate(ids)})
    texts = TaskTexts(PROMPTS, open_captions(str(tmp_path / "set")))
    found = JoinedSamples(tarfile_to_samples_nothrow, texts)(iter([{"url": str(path)}]))
    assert [sample["txt"] for sample in found] == [
        f"a cat\0caption of {n}".encode() for n in range(len(NAMES))
    ]


IDS = """
import sys
from open_clip_train.data import tarfile_to_samples_nothrow
from arf_plugin.anchors.ids import sample_id
from arf_plugin.anchors.task import scan_task_ids
from arf_plugin.data.texts import JoinedSamples, TaskTexts
class Texts(TaskTexts):
    def __call__(self, identity, cls, text):
        return identity
url = sys.argv[1]
joined = [s["txt"].decode() for s in JoinedSamples(tarfile_to_samples_nothrow, Texts(None, None))(iter([{"url": url}]))]
print(ascii((scan_task_ids(url).ids, joined)))
"""


@pytest.mark.parametrize("form", ["gnu", "pax"])
def test_ids_are_the_same_under_every_locale(tmp_path, form):
    folder = tmp_path / "gr\udcf6sse"
    folder.mkdir()
    path = folder / "größe.tar"
    write_members(path, ["größe", "stra\udcdfe"], tarfile.GNU_FORMAT if form == "gnu" else tarfile.PAX_FORMAT)
    expected = ascii((["größe/größe", "größe/stra\\xdfe"],) * 2)
    for number, locale in enumerate(
        (
            {"LC_ALL": "C.UTF-8"},
            {"LC_ALL": "C"},
            {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
            {"LC_ALL": "POSIX", "PYTHONUTF8": "0"},
        )
    ):
        env = {**os.environ, **locale, "ARF_CACHE_DIR": str(tmp_path / f"cache-{number}")}
        done = subprocess.run(
            [sys.executable, "-c", IDS, os.fsencode(path)],
            capture_output=True,
            text=True,
            env=env,
            check=False,
        )
        assert done.stdout.strip() == expected, (locale, done.stdout + done.stderr)


def write_members(path, names, form):
    with tarfile.open(path, "w", format=form, errors="surrogateescape") as tar:
        for name in names:
            for ext, content in (("png", PHOTO), ("cls", b"0")):
                info = tarfile.TarInfo(f"{name}.{ext}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def test_a_missing_caption_still_ends_the_run(tmp_path):
    data.write_captions(tmp_path / "set", {"x/1": "a caption"})
    texts = TaskTexts(PROMPTS, open_captions(str(tmp_path / "set")))
    with pytest.raises(MissingCaptionError, match="x/0"):
        joined(tmp_path, [("0.png", PHOTO), ("0.cls", b"0")], texts)
    damaged = [("0.png", PHOTO[:100]), ("0.cls", b"0"), ("1.png", PHOTO), ("1.cls", b"1")]
    assert [s["txt"] for s in joined(tmp_path, damaged, texts)] == [b"a dog\0a caption"]
