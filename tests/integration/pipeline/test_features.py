"""``arf features`` on sets made by hand, with a real, tiny CLIP."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from support import data
from support.building import drawing, folder_bytes, save_tiny_clip
from support.building_fixtures import Inputs
from support.tars import write_tar

from arf_plugin.anchors.features import (
    caption_features,
    changes_since,
    pair_features,
    read_header,
    weights_digest,
)
from arf_plugin.data.captions import open_captions

CAPTIONS = {
    "part-00000.parquet": [("t/1", "a cat"), ("t/0", "a red dog"), ("t/1", "one more cat")],
    "part-00001.parquet": [("t/2", "a tree"), ("t/1", "the third of them")],
}


def write_set(folder: Path) -> Path:
    """Three tars of four pairs, five captions of three samples: made by hand, without a manifest."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    data.write_pairs(folder, shards=3, per_shard=4)
    (folder / "captions").mkdir()
    for name, rows in CAPTIONS.items():
        ids, captions = zip(*rows, strict=True)
        pq.write_table(pa.table({"id": ids, "caption": captions}), folder / "captions" / name)
    return folder


@pytest.fixture
def anchors(tmp_path: Path) -> Path:
    return write_set(tmp_path / "A")


def features(anchors: Path) -> dict[str, bytes]:
    return folder_bytes(anchors / "features") | {"manifest": (anchors / "anchors.json").read_bytes()}


def test_one_command_gives_a_set_made_by_hand_what_a_bare_forward_gives(arf, inputs: Inputs, anchors: Path):
    out, _ = arf("features", anchors, "--model", inputs.clip, "--batch-size", 3, "--json")
    summary = json.loads(out)
    assert (summary["pairs"], summary["captions"], summary["rejected"]) == (12, 5, 0)
    model, _, preprocess = open_clip.create_model_and_transforms(inputs.clip)
    tokenizer = open_clip.get_tokenizer(inputs.clip)
    model.eval()
    header = read_header(anchors)
    assert header is not None
    assert header.weights_sha256 == weights_digest(model.state_dict()) == summary["weights_sha256"]
    assert (header.dim, header.precision, header.preprocessing["size"]) == (32, "float32", [32, 32])
    assert changes_since(anchors, header) == []
    number = 0
    for shard in sorted((anchors / "pairs").iterdir()):
        found = pair_features(anchors, shard.as_uri(), header)
        assert found.image.dtype == found.text.dtype == np.float16 and len(found.keys) == 4
        for row, key in enumerate(found.keys):
            assert key == f"{number:06d}"
            image = preprocess(Image.open(io.BytesIO(data.image(data.pair_seed(number)))))
            with torch.inference_mode():
                expected = model.encode_image(image[None], normalize=True)[0].numpy()
                expected_text = model.encode_text(tokenizer([data.pair_text(number)]), normalize=True)[0]
            np.testing.assert_allclose(found.image[row], expected, atol=1e-3)
            np.testing.assert_allclose(found.text[row], expected_text.numpy(), atol=1e-3)
            number += 1
    assert number == 12
    captions, store = caption_features(anchors), open_captions(str(anchors))
    assert store is not None and len(captions) == len(store) == 5
    for identity in ("t/0", "t/1", "t/2"):
        with torch.inference_mode():
            expected = model.encode_text(tokenizer(store.get(identity)), normalize=True).numpy()
        np.testing.assert_allclose(captions.get(identity), expected, atol=1e-3)
    assert captions.get("t/9").shape == (0, 32)


def test_what_cannot_be_decoded_has_no_row_and_is_named(arf, inputs: Inputs, anchors: Path):
    members = [("a.jpg", drawing(1)), ("a.txt", b"a shape"), ("b.jpg", drawing(2)[:200]), ("b.txt", b"cut off"),
               ("c.jpg", drawing(3)), ("c.txt", b"caf\xe9"), ("ß.jpg", drawing(4)), ("ß.txt", b"t")]  # fmt: skip
    write_tar(anchors / "pairs/odd.tar", members)
    command = ("features", anchors, "--model", inputs.clip)
    _, err = arf(*command, status=1)
    assert "rejected 2 of 21" in err and "odd/b" in err and "--max-bad-fraction" in err
    arf(*command, "--max-bad-fraction", 0.2)
    assert pair_features(anchors, "odd.tar").keys == ["a", "ß"]
    out, _ = arf("check", anchors, "--json", status=1)  # cut images are errors of the pairs themselves
    assert json.loads(out)["features"]["pairs"] == 14


@pytest.mark.parametrize("ranks", [2, 3])
def test_several_ranks_give_the_bytes_of_one(
    arf, inputs: Inputs, anchors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int
):
    other = write_set(tmp_path / "B")
    arf("features", anchors, "--model", inputs.clip)
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    for rank in reversed(range(ranks)):
        monkeypatch.setenv("RANK", str(rank))
        arf("features", other, "--model", inputs.clip)
    assert features(other) == features(anchors)


KILLED = """
import os, sys
sys.path[:0] = {path!r}
from pathlib import Path
import open_clip, pyarrow, torch
from arf_plugin.anchors.features import read_header
from arf_plugin.cli.main import main
from arf_plugin.errors import AnchorSetError
torch.set_num_threads(1)
calls, replace = 0, Path.replace
def counted(*args):
    global calls
    calls += 1
    if calls == 3 + start // 4:  # later and later, as the end writes several files at once
        os._exit(9)
    return replace(*args)
for start in range(40):
    child = os.fork()
    if not child:
        Path.replace = counted
        os._exit(main(["features", {anchors!r}, "--model", {model!r}]))
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        state = "finished" if read_header({anchors!r}) else "nothing"
    except AnchorSetError as cause:
        assert "are not finished" in str(cause), cause
        state = "unfinished"
    print(status, state)
    if status != 9:
        break
"""


@pytest.mark.slow
def test_a_kill_before_any_file_takes_its_name_ends_with_the_same_bytes(
    arf, inputs: Inputs, anchors: Path, tmp_path: Path
):
    """Starts are killed where their third, fourth ... file would take its name; the next one goes on from there."""
    other = write_set(tmp_path / "B")
    arf("features", anchors, "--model", inputs.clip)
    code = KILLED.format(path=[p for p in sys.path if p], anchors=str(other), model=inputs.clip)
    done = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True)
    states = done.stdout.splitlines()
    assert states[-1] == "0 finished" and states.count("9 unfinished") >= 4, states
    assert features(other) == features(anchors)


def test_what_has_changed_is_noticed_and_done_again_and_the_rest_is_kept(
    arf, inputs: Inputs, anchors: Path, tmp_path: Path
):
    command = ("features", anchors, "--model", inputs.clip)
    arf(*command)
    whole = features(anchors)
    out, _ = arf("check", anchors, "--json")
    assert (json.loads(out)["features"]["pairs"], json.loads(out)["warnings"]) == (12, [])

    # Other images in a tar of the same size: only its content tells.
    first, second = (anchors / f"pairs/{n:06d}.tar" for n in (0, 1))
    before = first.read_bytes()
    assert len(before) == len(second.read_bytes())
    first.write_bytes(second.read_bytes())
    os.utime(first, ns=(1, 1))
    shutil.copy(anchors / "captions/part-00001.parquet", anchors / "captions/part-00002.parquet")
    (anchors / "pairs/000002.tar").rename(tmp_path / "away.tar")
    out, _ = arf("check", anchors)
    for expected in (
        "of the 2 files of pairs, 1 have changed since (first: 000000.tar), 1 are gone (first: 000002.tar)",
        "of the 3 files of captions, 1 have no features (first: part-00002.parquet)",
    ):
        assert expected in out
    times = {path: path.stat().st_mtime_ns for path in (anchors / "features").rglob("*.parquet")}
    arf(*command)
    assert read_header(anchors) is not None
    again = {path.name for path, time in times.items() if path.exists() and path.stat().st_mtime_ns != time}
    assert again == {"000000.parquet", "captions.parquet"}, "what has not changed is kept"
    assert not (anchors / "features/pairs/000002.parquet").exists()
    out, _ = arf("check", anchors, "--full")
    assert "features     of 8 pairs and 7 captions by local-dir:clip" in out and "since" not in out

    first.write_bytes(before)
    (tmp_path / "away.tar").rename(anchors / "pairs/000002.tar")
    (anchors / "captions/part-00002.parquet").unlink()
    arf(*command)
    assert features(anchors) == whole
    (anchors / "captions/part-00001.parquet").unlink()  # nothing is left to do but to say so
    arf(*command)
    header = read_header(anchors)
    assert header is not None and header.rows("captions") == 3 and changes_since(anchors, header) == []


def test_another_model_is_refused_unless_the_work_is_dropped(
    arf, inputs: Inputs, anchors: Path, tmp_path: Path
):
    arf("features", anchors, "--model", inputs.clip)
    other = save_tiny_clip(tmp_path / "other", seed=5)
    _, err = arf("features", anchors, "--model", other, status=1)
    assert "model.weights" in err and "--restart" in err
    before = read_header(anchors)
    arf("features", anchors, "--model", other, "--restart")
    after = read_header(anchors)
    assert before is not None and after is not None and before.weights_sha256 != after.weights_sha256


def test_a_dry_run_writes_nothing(arf, inputs: Inputs, anchors: Path):
    before = folder_bytes(anchors)
    out, _ = arf("features", anchors, "--model", inputs.clip, "--dry-run", "--json")
    assert json.loads(out)["shards"] == 5
    assert folder_bytes(anchors) == before


def test_refusals(arf, inputs: Inputs, anchors: Path, tmp_path: Path):
    def refused(expected: str, *more: object):
        _, err = arf("features", *more, "--model", inputs.clip, status=1)
        assert expected in err, err

    (tmp_path / "empty").mkdir()
    refused("holds no pairs/*.tar and no captions/*.parquet", tmp_path / "empty")
    refused("holds no pairs/*.tar", tmp_path / "absent")
    refused("is remote", "memory://anchors")
    write_tar(anchors / "pairs/twice.tar", [("a.jpg", drawing(1)), ("a.txt", b"t"), ("b.txt", b"t"),
                                            ("b.jpg", drawing(1)), ("a.jpg", drawing(2)), ("a.txt", b"t")])  # fmt: skip
    refused("has the key 'a' more than once", anchors)
    (anchors / "anchors.json").write_text(json.dumps({"format_version": 1, "pairs": {"incomplete": True}}))
    refused("pairs are not finished", anchors)
