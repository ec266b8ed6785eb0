"""Task tars as samples with texts: what open_clip skips is skipped, and nothing else is read."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from support import data
from support.tars import write_tar

from arf_plugin.anchors.task import scan_task_ids
from arf_plugin.data.captions import open_captions
from arf_plugin.data.prompts import ClassIndices, ClassPrompts
from arf_plugin.data.task import TaskSamples
from arf_plugin.data.texts import TaskTexts
from arf_plugin.errors import MissingCaptionError, TaskDataError

PHOTO = data.image(1)
PROMPTS = ClassPrompts(["cat", "dog"], ["a {c}"])


def samples(tmp_path: Path, members: list[tuple[str, bytes]], texts: TaskTexts) -> list[dict]:
    path = write_tar(tmp_path / "x.tar", members)
    return in_order(TaskSamples(texts, lambda image: image.size), path)


def in_order(stage: TaskSamples, path: Path) -> list[dict]:
    """Samples of a tar in its own order."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("arf_plugin.data.task.shuffle_sizes", lambda: (1, 1, 1, 1))
        return list(stage(iter([{"url": str(path)}])))


def test_a_text_that_a_class_prompt_replaces_is_not_decoded(tmp_path):
    members = [("0.png", PHOTO), ("0.cls", b"1"), ("0.txt", "Straße".encode("latin-1"))]
    (sample,) = samples(tmp_path, members, TaskTexts(PROMPTS, None))
    assert sample["text"] == "a dog"


def test_a_text_that_is_needed_and_not_utf8_is_passed_over(tmp_path):
    latin = "Straße".encode("latin-1")
    members = [("0.png", PHOTO), ("0.txt", latin), ("1.png", PHOTO), ("1.txt", b"fine")]
    for prompts in (None, PROMPTS):  # plain mixing
        found = samples(tmp_path, members, TaskTexts(prompts, None))
        assert [sample["text"] for sample in found] == ["fine"]


def test_samples_that_open_clip_skips_are_passed_over(tmp_path):
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
    assert [s["text"] for s in samples(tmp_path, members, TaskTexts(PROMPTS, None))] == ["a cat"]
    assert [s["label"] for s in samples(tmp_path, members, TaskTexts(ClassIndices(2), None))] == [0]
    assert not samples(tmp_path, members, TaskTexts(None, None)), "a class is no text"


def test_only_image_and_text_are_read(tmp_path):
    others = [
        ("0.pyd", b"x"),
        ("0.json", b""),
        ("0.cls", b"0"),
        ("0.webp", b"broken"),
        ("0.mp4", b"x"),
    ]
    members = [("0.png", PHOTO), *others, ("0.txt", b"own")]
    (sample,) = samples(tmp_path, members, TaskTexts(None, None))
    assert sample == {"image": (32, 32), "text": "own"}
    jpeg = ("0.jpg", data.image(1, 16, "JPEG"))
    (sample,) = samples(tmp_path, [*members, jpeg], TaskTexts(None, None))
    assert sample["image"] == (16, 16), "open_clip takes jpg before png"


def test_a_class_that_is_no_index_names_the_sample(tmp_path):
    with pytest.raises(TaskDataError, match=r"Sample x/0: cls is b?'3\.9', expected a class index"):
        samples(tmp_path, [("0.png", PHOTO), ("0.cls", b"3.9")], TaskTexts(PROMPTS, None))


@pytest.mark.parametrize("word", ["__url__", "__key__"])
def test_members_that_overwrite_webdatasets_notes_have_no_id(tmp_path, word):
    members = [(f"0.{word}", b"other/1"), ("0.png", PHOTO), ("0.txt", b"own")]
    if word == "__key__":  # the next member begins a sample of its own
        assert [s["text"] for s in samples(tmp_path, members, TaskTexts(None, None))] == ["own"]
        return
    with pytest.raises(TaskDataError, match="has a member named like webdataset's own notes"):
        samples(tmp_path, members, TaskTexts(None, None))


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
    found = in_order(TaskSamples(texts, lambda image: image.size), path)
    assert [sample["caption_text"] for sample in found] == [f"caption of {n}" for n in range(len(NAMES))]


IDS = """
import sys
from arf_plugin.anchors.task import scan_task_ids
from arf_plugin.data import task
from arf_plugin.data.texts import TaskTexts
class Texts(TaskTexts):
    def __call__(self, identity, cls, text):
        return {"text": identity}
task.shuffle_sizes = lambda: (1, 1, 1, 1)
stage = task.TaskSamples(Texts(None, None), lambda image: image)
for url in sys.argv[1:]:
    print(ascii((scan_task_ids(url).ids, [s["text"] for s in stage(iter([{"url": url}]))])))
"""


@pytest.mark.process
def test_ids_are_the_same_under_every_locale(tmp_path):
    paths = []
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        folder = tmp_path / str(form) / "gr\udcf6sse"
        folder.mkdir(parents=True)
        paths.append(folder / "größe.tar")
        write_members(paths[-1], ["größe", "stra\udcdfe"], form)
    expected = ascii((["größe/größe", "größe/stra\\xdfe"],) * 2)
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for number, locale in enumerate(({"LC_ALL": "C.UTF-8"}, ascii_only)):
        env = {**os.environ, **locale, "ARF_CACHE_DIR": str(tmp_path / f"cache-{number}")}
        done = subprocess.run(
            [sys.executable, "-c", IDS, *map(os.fsencode, paths)],
            capture_output=True,
            text=True,
            env=env,
            check=False,
        )
        assert done.stdout.splitlines() == [expected] * 2, (locale, done.stdout + done.stderr)


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
        samples(tmp_path, [("0.png", PHOTO), ("0.cls", b"0")], texts)
    damaged = [("0.png", PHOTO[:100]), ("0.cls", b"0"), ("1.png", PHOTO), ("1.cls", b"1")]
    (sample,) = samples(tmp_path, damaged, texts)
    assert (sample["text"], sample["caption_text"]) == ("a dog", "a caption")
