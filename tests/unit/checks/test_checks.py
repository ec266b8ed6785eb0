"""One set of rules: every rule finds what it is there for, and `arf check` and the trainer say the same of it.

One module, because each rule has its example here.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.building import drawing
from support.tars import write_tar

from arf_plugin.anchors.features import (
    Embedded,
    FeatureHeader,
    PairFeatures,
    write_header,
    write_pair_features,
)
from arf_plugin.anchors.pairs import read_pairs
from arf_plugin.checks.inputs import Inputs, Run, StartingModel
from arf_plugin.checks.report import check_anchor_set
from arf_plugin.checks.rules import RULES, findings
from arf_plugin.data.dealing import dealt_shards
from arf_plugin.data.startup import check_inputs
from arf_plugin.errors import AnchorSetError, ArfError, FlagError
from arf_plugin.files import content_digest

Change = Callable[["Made"], None]


class Made:
    """Good inputs in a folder: two task shards of 4 samples with cls and txt, captions for all, 8 pairs in two tars."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.anchors = folder / "A"
        self.classes: list[str] | None = ["cat", "dog"]
        self.texts_known = True
        self.run = Run(
            batch_size=2, task_workers=2, pair_workers=2, pair_batch=2, workers=4, samples=8, lr=1e-5
        )
        self.data = f"{folder}/{{0..1}}.tar"
        self.missing_caption = "error"
        self.caption_weight = 1.0
        self.pair_loss = "contrastive"
        self.starting: StartingModel | ArfError | None = None
        for shard in range(2):
            self.shard(shard, range(4 * shard, 4 * shard + 4))
            members = []
            for i in range(4 * shard, 4 * shard + 4):
                members += [(f"p{i}.jpg", drawing(100 + i)), (f"p{i}.txt", b"a pair")]
            write_tar(self.anchors / f"pairs/{shard}.tar", members)
        self.captions({f"{i // 4}/{i}": "a caption" for i in range(8)})

    def shard(self, number: int, samples: range, label: Callable[[int], str] = lambda i: str(i % 2)) -> None:
        members = []
        for i in samples:
            members += [(f"{i}.jpg", drawing(i)), (f"{i}.cls", label(i).encode()), (f"{i}.txt", b"a text")]
        write_tar(self.folder / f"{number}.tar", members)

    def captions(self, said: dict[str, str]) -> None:
        (self.anchors / "captions").mkdir(parents=True, exist_ok=True)
        pq.write_table(
            pa.table({"id": list(said), "caption": list(said.values())}), self.anchors / "captions/a.parquet"
        )

    def features(self) -> None:
        """Features of the pairs, as a model with the digest of 64 zeros would give them."""
        embedded = {}
        for path in sorted(self.anchors.glob("pairs/*.tar")):
            keys, vectors = [pair.key for pair in read_pairs(str(path))], np.eye(4, 8, dtype=np.float16)
            write_pair_features(
                self.anchors, path, PairFeatures(keys, vectors[: len(keys)], vectors[: len(keys)])
            )
            size, sha256 = path.stat().st_size, content_digest([path])
            embedded[path.name] = Embedded(bytes=size, sha256=sha256, rows=len(keys))
        header = {
            "model": "m",
            "weights_sha256": "0" * 64,
            "precision": "float32",
            "preprocessing": {},
            "dim": 8,
        }
        write_header(self.anchors, FeatureHeader(**header, pairs=embedded, captions={}))
        self.pair_loss = "feature"
        self.starting = StartingModel("m", "0" * 64, 8, True, (("a pair", 1.0),))

    def csv(self, rows: dict[str, list[object]]) -> None:
        for i in range(8):
            (self.folder / f"{i}.jpg").write_bytes(drawing(i))
        self.data = str(self.folder / "task.csv")
        pd.DataFrame(rows).to_csv(self.data, sep="\t", index=False)

    def images(self) -> list[object]:
        return [str(self.folder / f"{i}.jpg") for i in range(8)]

    def inputs(self, training: bool) -> Inputs:
        return Inputs(
            anchors=str(self.anchors),
            caption_weight=self.caption_weight,
            missing_caption=self.missing_caption,
            pair_loss=self.pair_loss,
            starting=self.starting,
            train_data=self.data,
            classes=self.classes,
            texts_known=self.texts_known,
            run=self.run,
            training=training,
        )


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return Made(tmp_path / "made")


def no_set(made):
    made.anchors = made.folder / "none"


def a_misspelt_tar(made):
    made.data = f"{made.folder}/O.tar"


def unknown_manifest(made):
    (made.anchors / "anchors.json").write_text('{"format_version": 99}')


def half_a_build(made):
    (made.anchors / "anchors.json").write_text('{"format_version": 1, "pairs": {"incomplete": true}}')


def a_file_too_many(made):
    written = {f"{i}.tar": (made.anchors / f"pairs/{i}.tar").stat().st_size for i in range(1)}
    (made.anchors / "anchors.json").write_text(
        json.dumps({"format_version": 1, "pairs": {"written": written}})
    )


def too_many_pair_workers(made):
    made.run = replace(made.run, pair_workers=3)


def too_many_task_workers(made):
    made.run = replace(made.run, task_workers=3)


def caption_without_text(made):
    made.captions({"0/0": " "})


def cut_tar(made):
    (made.folder / "1.tar").write_bytes((made.folder / "1.tar").read_bytes()[:3000])


def id_in_two_shards(made):
    write_tar(made.folder / "x/0.tar", [("0.jpg", drawing(0)), ("0.cls", b"0")])
    made.data += f"::{made.folder}/x/0.tar"


def csv_image_missing(made):
    made.csv({"filepath": made.images(), "cls": [0] * 8})
    (made.folder / "5.jpg").unlink()


def csv_image_is_a_folder(made):
    made.csv({"filepath": made.images(), "cls": [0] * 8})
    (made.folder / "5.jpg").unlink()
    (made.folder / "5.jpg").mkdir()


def csv_image_truncated(made):
    made.csv({"filepath": made.images(), "cls": [0] * 8})
    (made.folder / "5.jpg").write_bytes(drawing(5)[:200])


def no_text_at_all(made):
    made.classes, made.run = None, replace(made.run, task_workers=1)
    write_tar(made.folder / "0.tar", [("0.jpg", drawing(0)), ("0.cls", b"0")])
    made.data = f"{made.folder}/0.tar"


def csv_without_class(made):
    made.csv({"filepath": made.images(), "title": ["a"] * 8})


def csv_with_empty_class(made):
    made.csv({"filepath": made.images(), "cls": [0, None, *[1] * 6]})


def label_beyond(made):
    made.shard(1, range(4, 8), lambda i: "2")


def label_with_fraction(made):
    made.shard(1, range(4, 8), lambda i: "0.9")


def label_is_a_name(made):
    made.shard(1, range(4, 8), lambda i: "cat")


def labels_from_one(made):
    for shard in range(2):
        made.shard(shard, range(4 * shard, 4 * shard + 4), lambda i: str(1 + i % 2))


def csv_label_with_fraction(made):
    made.csv({"filepath": made.images(), "cls": [0.0, 1.0, 0.9, *[1.0] * 5]})


def csv_label_is_a_name(made):
    made.csv({"filepath": made.images(), "cls": ["0", "1", "cat", *["1"] * 5]})


def caption_missing(made):
    made.captions({f"{i // 4}/{i}": "a caption" for i in range(7)})


def captions_of_other_data(made):
    made.captions({"x/1": "a caption"})


def less_than_a_batch_in_a_worker(made):
    made.run = replace(made.run, batch_size=5)


def csv_shorter_than_a_batch(made):
    made.csv({"filepath": made.images(), "cls": [0] * 8})
    made.caption_weight, made.run = 0.0, replace(made.run, batch_size=9)


def accumulation_of_more_than_an_epoch(made):
    made.run = replace(made.run, accum_freq=5)


def nothing_usable(made):
    made.classes = None
    write_tar(made.folder / "0.tar", [("0.jpg", drawing(0)[:99]), ("0.txt", b"t"), ("1.jpg", drawing(1))])
    made.data, made.caption_weight = f"{made.folder}/0.tar", 0.0
    made.run = replace(made.run, task_workers=1)


def no_features(made):
    made.pair_loss = "feature"


def features_of_other_pairs(made):
    made.features()
    write_tar(made.anchors / "pairs/1.tar", [("a.jpg", drawing(0)), ("a.txt", b"another")])


def features_of_other_weights(made):
    made.features()
    made.starting = replace(made.starting, digest="1" * 64)


def features_of_another_size(made):
    made.features()
    made.starting = replace(made.starting, dim=16)


def features_of_another_transform(made):
    made.features()
    made.starting = replace(made.starting, cosines=(("a pair", 1.0), ("1.tar, pair p6, image", 0.998)))


def features_that_cannot_be_compared(made):
    made.features()
    made.starting = AnchorSetError("a pair is gone")


def pair_without_text(made):
    write_tar(made.anchors / "pairs/1.tar", [("a.jpg", drawing(0))])


ERRORS: list[tuple[str, Change, str]] = [
    ("anchor-set", no_set, "does not exist"),
    ("task-files", a_misspelt_tar, r"O\.tar does not exist"),
    ("whole", unknown_manifest, "format_version 99"),
    ("whole", half_a_build, "pairs are not finished"),
    ("whole", a_file_too_many, r"no part of what was built: 1\.tar"),
    ("pair-workers", too_many_pair_workers, "2 pair shards for 3 loader workers"),
    ("task-workers", too_many_task_workers, "2 task shards for 3 loader workers"),
    ("captions", caption_without_text, "caption is ' '"),
    ("task-data", cut_tar, r"1\.tar is cut off"),
    ("task-data", id_in_two_shards, "'0/0' occurs twice"),
    ("csv-images", csv_image_missing, r"1 of 8 image files .* cannot be opened \(No such file"),
    ("csv-images", csv_image_is_a_folder, r"1 of 8 image files .*5\.jpg is no file"),
    ("csv-images", csv_image_truncated, r"1 of 8 image files .*5\.jpg cannot be decoded"),
    ("texts", no_text_at_all, "they have 'cls'"),
    ("texts", csv_without_class, "no column 'cls'"),
    ("texts", csv_with_empty_class, "row 2: column 'cls' is empty"),
    (
        "labels",
        label_beyond,
        r"Sample 1/4: cls is '2' \(and 3 more samples have such\), expected .* from 0 to 1",
    ),
    ("labels", label_with_fraction, "cls is '0.9'"),
    ("labels", label_is_a_name, "cls is 'cat'"),
    ("labels", labels_from_one, "counted from 1"),
    ("labels", csv_label_with_fraction, "cls is '0.9'"),
    ("labels", csv_label_is_a_name, "cls is 'cat'"),
    ("coverage", caption_missing, "No caption for task sample 1/7"),
    ("coverage", captions_of_other_data, "cover none of the 8"),
    (
        "batches",
        less_than_a_batch_in_a_worker,
        "gets 1 task shards .* with 4 usable samples, less than a batch",
    ),
    ("batches", csv_shorter_than_a_batch, "less than one batch of --batch-size 9"),
    ("batches", accumulation_of_more_than_an_epoch, "fewer than --accum-freq 5"),
    ("batches", nothing_usable, "pass over every sample"),
    ("pairs", pair_without_text, "pair a: has no txt"),
    ("features", no_features, "has no features of its pairs, .*arf features"),
    ("features", features_of_other_pairs, r"of the 2 files of pairs, 1 have changed since \(first: 1.tar\)"),
    ("starting-model", features_of_other_weights, "other weights than .*m, SHA-256 0000.*m, SHA-256 1111"),
    ("starting-model", features_of_another_size, "have 8 dimensions .* those of m 16"),
    ("starting-model", features_of_another_transform, "pair p6, image: its feature .* cosine of 0.99800"),
    ("starting-model", features_that_cannot_be_compared, "a pair is gone"),
]


def test_good_inputs_have_no_findings(made):
    assert list(findings(made.inputs(training=False))) == []
    assert check_inputs(made.inputs(training=True)) == 8


@pytest.mark.parametrize(("rule", "change", "said"), ERRORS, ids=[change.__name__ for _, change, _ in ERRORS])
def test_both_reporters_say_the_same_error(made, rule, change, said):
    change(made)
    if change.__name__.startswith("csv") and made.caption_weight:
        made.captions({str(path): "a caption" for path in made.images()})
    report = check_anchor_set(made.inputs(training=False))
    with pytest.raises(ArfError, match=f"(?s){said}") as caught:
        check_inputs(made.inputs(training=True))
    assert str(caught.value).replace(f"--arf-anchors {made.anchors}", str(made.anchors)) == report.errors[0]


def test_features_are_reported_and_weights_cast_to_16_bits_known_by_their_features(made):
    made.features()
    made.starting = replace(made.starting, exact=False, digest="1" * 64, cosines=(("a pair", 0.991),))
    assert check_inputs(made.inputs(training=True)) == 8
    report = check_anchor_set(made.inputs(training=False))
    assert not report.errors and report.features["pairs"] == 8 and report.features["dim"] == 8
    assert "features     of 8 pairs and 0 captions by m (000000000000), D 8" in report.lines()
    made.pair_loss = "contrastive"
    (made.anchors / "pairs/0.tar").unlink()
    assert "1 are gone (first: 0.tar)" in check_anchor_set(made.inputs(training=False)).warnings[-1]


def test_every_rule_with_a_check_has_an_error_here():
    warns = {"schedule", "task-images"}
    assert {rule.id for rule in RULES if rule.check} - warns == {rule for rule, _, _ in ERRORS}
    assert len({rule.id for rule in RULES}) == len(RULES)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lr": 5e-4, "pretrained": True}, "--lr 0.0005 is a rate for training from scratch"),
        ({"warmup": 10_000}, "--warmup 10000 is not shorter than the run of 4 steps"),
        ({"samples": 80}, "an epoch shows each 10 times"),
        ({"pair_batch": 16}, "8 pairs for batches of 16"),
    ],
)
def test_what_would_spoil_a_run_is_warned_of(made, caplog, changes, said):
    made.run = replace(made.run, **changes)
    with caplog.at_level(logging.WARNING):
        check_inputs(made.inputs(training=True))
    assert said in caplog.text


def test_a_label_once_read_by_pandas_as_a_float_is_a_whole_number(made):
    made.csv({"filepath": made.images(), "cls": [0.0, 1.0] * 4})
    made.captions({str(path): "a caption" for path in made.images()})
    assert check_inputs(made.inputs(training=True)) == 8


def test_a_stray_image_is_skipped_as_open_clip_does(made, caplog):
    members = [m for i in range(100) for m in ((f"{i}.jpg", drawing(i)), (f"{i}.cls", b"0"))]
    write_tar(made.folder / "0.tar", [*members, ("cover.jpg", drawing(1))])
    made.data, made.caption_weight = f"{made.folder}/0.tar", 0.0
    made.run = replace(made.run, task_workers=1)
    assert check_inputs(made.inputs(training=True)) == 100
    assert "1 of 101 images have neither 'cls' nor 'txt' (first: 0/cover)" in caplog.text


def test_ids_need_not_be_unique_where_nothing_is_joined(made):
    made.csv({"filepath": made.images() * 2, "cls": [0, 1] * 8})
    made.caption_weight = 0.0
    assert check_inputs(made.inputs(training=True)) == 16
    made.data = f"{made.folder}/0.tar::{made.folder}/0.tar"
    assert check_inputs(made.inputs(training=True)) == 8


def test_an_image_that_looks_whole_and_does_not_decode_needs_no_caption(made, caplog):
    damaged = bytearray(drawing(7, "PNG", 64))
    damaged[60:90] = b"\0" * 30
    members = [(f"{i}.jpg", drawing(i)) for i in range(4, 7)] + [("7.png", bytes(damaged))]
    write_tar(
        made.folder / "1.tar", [m for i, one in enumerate(members, 4) for m in (one, (f"{i}.cls", b"0"))]
    )
    caption_missing(made)
    check_inputs(made.inputs(training=True))
    assert "1 task images have no caption and cannot be decoded, first: 1/7" in caplog.text
    assert check_anchor_set(made.inputs(training=False)).errors == []


@pytest.mark.parametrize(("shards", "world", "workers"), [(7, 1, 2), (8, 2, 2), (600, 2, 3), (3000, 1, 4)])
def test_shards_are_dealt_out_as_open_clip_does(shards, world, workers):
    from open_clip_train.data import (
        _SHARD_SHUFFLE_INITIAL,
        _SHARD_SHUFFLE_SIZE,
        SharedEpoch,
        detshuffle2,
    )

    for epoch in (0, 3):
        stage = detshuffle2(
            bufsize=_SHARD_SHUFFLE_SIZE, initial=_SHARD_SHUFFLE_INITIAL, seed=5, epoch=SharedEpoch(epoch)
        )
        order = list(stage.run(iter(range(shards))))
        expected = [order[rank::world][worker::workers] for rank in range(world) for worker in range(workers)]
        assert dealt_shards(shards, 5, epoch, world, workers) == expected
    assert dealt_shards(shards, -1, 0, world, workers) is None


def test_a_file_of_weights_that_open_clip_would_pass_over(parse, tmp_path):
    (tmp_path / "w.pt").write_bytes(b"")
    with pytest.raises(FlagError, match="would pass over --pretrained"):
        parse(
            *("--train-data", "x.tar", "--arf-anchors", "A", "--model", "local-dir:M"),
            *("--pretrained", tmp_path / "w.pt"),
        )
