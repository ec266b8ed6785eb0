"""Class prompts, caption look-ups, and the joint text on its way through a tokenizer."""

from __future__ import annotations

import collections
import pickle

import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from support import data

from arf_plugin.anchors.features import caption_features
from arf_plugin.data.batch import collate
from arf_plugin.data.captions import open_captions
from arf_plugin.data.prompts import ClassIndices, ClassPrompts, choose, load_prompts
from arf_plugin.data.texts import TaskTexts
from arf_plugin.errors import AnchorSetError, FlagError, MissingCaptionError, TaskDataError


def test_templates_are_drawn_evenly_and_reproducibly():
    prompts = ClassPrompts(["cat"], [f"{number} {{c}}" for number in range(4)])
    drawn = [prompts(0, f"id{number}", seed=1, epoch=0) for number in range(4000)]
    counts = collections.Counter(drawn)
    assert set(counts) == {f"{number} cat" for number in range(4)}
    assert all(abs(count - 1000) < 150 for count in counts.values())
    assert drawn == [prompts(0, f"id{number}", seed=1, epoch=0) for number in range(4000)]
    for changed in ({"seed": 2, "epoch": 0}, {"seed": 1, "epoch": 1}):
        assert drawn != [prompts(0, f"id{number}", **changed) for number in range(4000)]


def test_a_sample_without_a_class_keeps_its_own_text_where_data_is_mixed():
    mixed = TaskTexts(ClassPrompts(["a", "b"], ["the {c}"]), None)
    assert mixed("s/1", b"1", "own") == {"text": "the b"} and mixed("s/2", None, "own") == {"text": "own"}
    with pytest.raises(TaskDataError, match="s/2 has no 'cls'"):
        TaskTexts(ClassIndices(2), None)("s/2", None, "own")


def test_labels_take_the_place_of_texts():
    texts = TaskTexts(ClassIndices(3), None)
    samples = [texts("s/1", b"2", "own"), texts("s/1", 1, None)]
    labels = collate(samples, tokenize=None)["label"]
    assert labels.dtype == torch.int64 and labels.tolist() == [2, 1]
    with pytest.raises(TaskDataError, match="expected a class index from 0 to 2"):
        texts("s/1", b"3", None)


@pytest.mark.parametrize("cls", [3, "x", b"\xff", None, -1, b"1.5"])
def test_a_class_that_is_no_index_is_named(cls):
    if cls is None:
        with pytest.raises(TaskDataError, match="s/1 has no 'cls'"):
            TaskTexts(ClassPrompts(["a", "b", "c"], ["{c}"]), None)("s/1", None, None)
        return
    with pytest.raises(TaskDataError, match=r"s/1: cls is .* expected a class index from 0 to 2"):
        ClassPrompts(["a", "b", "c"], ["{c}"])(cls, "s/1", 0, 0)


def test_imagenet_lists_by_name():
    prompts = load_prompts("imagenet", "imagenet")
    assert len(prompts.classnames) == 1000 and len(prompts.templates) == 80
    assert prompts.templates[0] == "a bad photo of a {c}."
    expected = {template("tench") for template in open_clip.OPENAI_IMAGENET_TEMPLATES}
    assert prompts(0, "x/0", 0, 0) in expected


def test_both_placeholders_are_understood(tmp_path):
    (tmp_path / "names").write_text("cat\ndog\n\n")
    (tmp_path / "templates").write_text("one {}\none {c}\n")
    prompts = load_prompts(str(tmp_path / "names"), str(tmp_path / "templates"))
    assert prompts.templates == ["one {c}", "one {c}"] and prompts(b"1", "x/0", 0, 0) == "one dog"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (None, "cannot be read"),
        ("", "the file is empty"),
        ("a\n\nb\n", "line 2 is empty"),
        (b"\xff\xfe", "cannot be read"),
    ],
)
def test_class_name_files_that_cannot_work(tmp_path, names, message):
    path = tmp_path / "names"
    if names is not None:
        path.write_bytes(names if isinstance(names, bytes) else names.encode())
    with pytest.raises(FlagError, match=message):
        load_prompts(str(path), "imagenet")


def test_several_captions_per_sample_in_file_order(tmp_path):
    (tmp_path / "captions").mkdir()
    table = {
        "id": ["a/1", "a/2", "a/1", "ü/3"],
        "caption": ["one", "two", "another", "naïve"],
        "score": [0.1, 0.2, 0.3, 0.4],
    }
    pq.write_table(pa.table(table), tmp_path / "captions" / "part-00000.parquet")
    data.write_captions(tmp_path, {"a/1": "late"}, "part-00001.parquet")
    store = open_captions(str(tmp_path))
    assert len(store) == 5
    assert store.get("a/1") == ["one", "another", "late"] and store.get("ü/3") == ["naïve"]
    assert store.get("a/9") == [] and "a/2" in store and "a/9" not in store
    assert pickle.loads(pickle.dumps(store)).get("a/2") == ["two"]


def test_captions_of_thousands_of_samples(tmp_path):
    captions = {f"shard-{number % 7}/{number}": f"caption {number}" for number in range(5000)}
    data.write_captions(tmp_path, captions)
    store = open_captions(str(tmp_path))
    assert {identity: store.get(identity) for identity in captions} == {k: [v] for k, v in captions.items()}


def test_the_cache_follows_changes_and_survives_damage(tmp_path):
    data.write_captions(tmp_path, {"a/1": "old"})
    first = open_captions(str(tmp_path))
    assert open_captions(str(tmp_path)).path == first.path
    first.path.write_bytes(first.path.read_bytes()[:-100])
    assert open_captions(str(tmp_path)).get("a/1") == ["old"]
    data.write_captions(tmp_path, {"a/1": "newer"})
    assert open_captions(str(tmp_path)).get("a/1") == ["newer"]


def test_prompts_and_captions_are_tokenized_apart(tmp_path):
    data.write_captions(tmp_path, {"a/1": "a grey cat on a mat", "a/2": "another text"})
    texts = TaskTexts(ClassPrompts(["cat"], ["a photo of a {c}."]), open_captions(str(tmp_path)))
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    batch = collate([texts("a/1", b"0", None), texts("a/2", b"0", None)], tokenizer)
    assert torch.equal(batch["text"], tokenizer(["a photo of a cat."] * 2))
    assert torch.equal(batch["caption_text"], tokenizer(["a grey cat on a mat", "another text"]))


def test_a_missing_caption_is_an_error_or_the_prompt(tmp_path):
    data.write_captions(tmp_path, {"a/1": "a caption"})
    store = open_captions(str(tmp_path))
    with pytest.raises(MissingCaptionError, match="No caption for task sample a/2"):
        TaskTexts(None, store)("a/2", None, "own")
    found = TaskTexts(None, store, "prompt")("a/2", None, "own")
    assert found == {"text": "own", "caption_text": "own"}


def test_the_feature_is_that_of_the_caption_that_was_drawn(tmp_path, model_configs):
    (tmp_path / "captions").mkdir()
    captions = {"id": ["a/1", "a/2", "a/1", "a/1"], "caption": ["one", "two", "three", "four"]}
    pq.write_table(pa.table(captions), tmp_path / "captions" / "part-00000.parquet")
    open_clip.add_model_config(model_configs)
    model = data.start_of("tiny-vit", tmp_path / "start.pt")
    data.write_features(tmp_path, model, "tiny-vit")
    store, features = open_captions(str(tmp_path)), caption_features(tmp_path)
    tokenize, drawn = open_clip.get_tokenizer("tiny-vit"), set()
    for seed in range(12):
        found = TaskTexts(None, store, seed=seed, features=features)("a/1", None, "own")
        with torch.no_grad():
            expected = model.encode_text(tokenize([found["caption_text"]]), normalize=True)[0].half().float()
        torch.testing.assert_close(found["caption_text_feature"], expected, rtol=0, atol=2e-3)
        assert found["caption_text_feature"] @ expected > 0.9999
        drawn.add(found["caption_text"])
    assert drawn == {"one", "three", "four"}


def test_captions_that_are_more_than_their_features_are_refused(tmp_path, model_configs):
    data.write_captions(tmp_path, {"a/1": "one"})
    open_clip.add_model_config(model_configs)
    data.write_features(tmp_path, data.start_of("tiny-vit", tmp_path / "start.pt"), "tiny-vit")
    features = caption_features(tmp_path)
    data.write_captions(tmp_path, {"a/1": "more"}, "part-00001.parquet")
    with pytest.raises(AnchorSetError, match="A caption of a/1 has no features"):
        TaskTexts(None, open_captions(str(tmp_path)), features=features)("a/1", None, "own")


def test_choose_is_uniform_and_trivial_for_one_option():
    assert choose(1, "anything") == 0
    counts = collections.Counter(choose(3, "x", number) for number in range(3000))
    assert all(abs(counts[option] - 1000) < 120 for option in range(3))
