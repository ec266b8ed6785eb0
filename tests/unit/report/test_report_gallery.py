"""The anchor gallery: what it shows of an anchor set, and how it treats what it cannot trust."""

from __future__ import annotations

import base64
import io
import random

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from support import data
from support.report import HOSTILE, write_pair_shards
from support.tars import write_tar

from arf_plugin.errors import AnchorSetError
from arf_plugin.report.gallery import build_gallery, place_in_hash_order
from arf_plugin.report.images import thumbnail


def pairs_of(ids: list[str], count: int = 60, seed: int = 0) -> list[dict]:
    """Pairs that name up to four queries each."""
    rng = random.Random(seed)
    return [
        {"queries": {q: round(rng.random(), 4) for q in rng.sample(ids, min(len(ids), rng.randint(1, 4)))}}
        for _ in range(count)
    ]


def shown(gallery) -> dict:
    return {card.id: card for card in gallery.cards}


def test_cards_hold_captions_and_the_nearest_pairs(tmp_path, task):
    pairs = pairs_of(task.ids)
    write_pair_shards(tmp_path, pairs)
    data.write_captions(tmp_path, {name: f"caption of {name}" for name in task.ids})
    gallery = build_gallery(tmp_path, task.urls, data.CLASSNAMES, count=6)
    assert len(gallery.cards) == 6 and not gallery.loose
    for card in gallery.cards:
        near = sorted(
            (p["queries"][card.id], f"pair {n}") for n, p in enumerate(pairs) if card.id in p["queries"]
        )
        assert [(p.similarity, p.text) for p in card.pairs] == near[::-1][:6]
        assert card.captions == (f"caption of {card.id}",)
        assert card.label == data.CLASSNAMES[task.samples[card.id][1]]
        assert card.image.uri and all(pair.image.uri for pair in card.pairs)
    assert len({card.label for card in gallery.cards}) == 4  # spread over the classes


def test_memory_bounds_change_nothing(tmp_path, monkeypatch):
    """Following few queries finds the same cards, with all their pairs, as following every query."""
    ids = [f"s/{n}" for n in range(300)]
    write_pair_shards(tmp_path, pairs_of(ids, 400), per_shard=50)
    few = build_gallery(tmp_path, count=5)
    monkeypatch.setattr("arf_plugin.report.gallery.CANDIDATES", 1000)
    assert build_gallery(tmp_path, count=5) == few
    named = {query for pair in pairs_of(ids, 400) for query in pair["queries"]}
    assert [card.id for card in few.cards] == sorted(named, key=place_in_hash_order)[:5]


def test_without_task_data_there_are_captions_and_pairs(tmp_path, task):
    write_pair_shards(tmp_path, pairs_of(task.ids))
    data.write_captions(tmp_path, dict.fromkeys(task.ids, "c"))
    assert all(card.image is None and card.captions and card.pairs for card in build_gallery(tmp_path).cards)


def test_captions_alone(tmp_path, task):
    data.write_captions(tmp_path, dict.fromkeys(task.ids, "c"))
    gallery = build_gallery(tmp_path, task.urls)
    assert len(gallery.cards) == 12 and gallery.cards[0].image.uri and not gallery.cards[0].pairs


def test_random_pairs_are_shown_as_such(tmp_path):
    write_pair_shards(tmp_path, [{"queries": {}} for _ in range(30)])
    gallery = build_gallery(tmp_path)
    assert gallery.random and len(gallery.loose) == 12 and not gallery.cards
    assert all(pair.similarity is None for pair in gallery.loose)


def test_hand_made_pairs_need_no_records(tmp_path):
    data.write_pairs(tmp_path, shards=1, per_shard=3)
    gallery = build_gallery(tmp_path)
    assert not gallery.random and sorted(pair.text for pair in gallery.loose) == [
        data.pair_text(n) for n in range(3)
    ]


RECORDS = (
    *(
        b"",
        b"{",
        b"[1]",
        b"null",
        b"\xff\xfe",
        b'{"queries": 5}',
        b'{"queries": [3, null]}',
        b'{"queries": ["\\ud800"]}',
    ),
    b'{"queries": ["q"], "query_similarities": [1, 2]}',
    b'{"queries": ["q"], "query_similarities": ["x"]}',
)


@pytest.mark.parametrize("record", RECORDS)
def test_records_of_others_break_nothing(tmp_path, record):
    write_tar(tmp_path / "pairs" / "0.tar", [("a.png", data.image(1)), ("a.txt", b"t"), ("a.json", record)])
    gallery = build_gallery(tmp_path)
    assert len(gallery.cards) + len(gallery.loose) == 1 or b"3, null" in record


def test_an_image_that_is_none_is_said(tmp_path, task):
    pairs = [{"queries": {task.ids[0]: 0.5}, "image": b"<svg onload=alert(1)>"}]
    write_pair_shards(tmp_path, pairs)
    [pair] = build_gallery(tmp_path, task.urls).cards[0].pairs
    assert pair.image.uri is None and "not an image" in pair.image.problem


def test_csv_task_data(tmp_path):
    paths = []
    for n in range(4):
        path = tmp_path / f"{n}.png"
        path.write_bytes(data.image(n))
        paths.append(str(path))
    table = tmp_path / "train.csv"
    table.write_text("path,cls\n" + "".join(f"{path},{n % 2}\n" for n, path in enumerate(paths)))
    data.write_captions(tmp_path / "set", {path: f"caption {n}" for n, path in enumerate(paths)})
    gallery = build_gallery(tmp_path / "set", str(table), ["cat", "dog"], csv=("path", ","))
    assert {card.id: card.label for card in gallery.cards} == {
        path: ["cat", "dog"][n % 2] for n, path in enumerate(paths)
    }
    assert all(card.image.uri for card in gallery.cards)


def test_long_texts_are_cut(tmp_path, task):
    data.write_captions(tmp_path, dict.fromkeys(task.ids, "word " * 5000))
    assert all(len(card.captions[0]) == 240 for card in build_gallery(tmp_path).cards)


def test_damaged_captions_are_named(tmp_path):
    (tmp_path / "captions").mkdir()
    (tmp_path / "captions" / "part-0.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(AnchorSetError, match=r"part-0\.parquet is no readable parquet file"):
        build_gallery(tmp_path)


def test_damaged_pairs_are_named(tmp_path):
    write_pair_shards(tmp_path, pairs_of(["a"]))
    path = tmp_path / "pairs" / "000000.tar"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(AnchorSetError, match=r"000000\.tar is cut off or corrupt"):
        build_gallery(tmp_path)


def test_thumbnails_pass_nothing_on():
    """Comments, EXIF data and what stands behind the image stay behind."""
    text = PngInfo()
    text.add_text("comment", HOSTILE)
    buffer = io.BytesIO()
    picture = Image.open(io.BytesIO(data.image(3, 300)))
    exif = Image.Exif()
    exif[0x010E] = HOSTILE
    picture.save(buffer, "PNG", pnginfo=text, exif=exif)
    made = thumbnail(buffer.getvalue() + HOSTILE.encode())
    kind, content = made.uri.split(";base64,")
    passed = base64.b64decode(content)
    assert b"script" not in passed and b"Exif" not in passed
    with Image.open(io.BytesIO(passed)) as image:
        assert image.size == (made.width, made.height) == (96, 96)
        assert kind in ("data:image/png", "data:image/jpeg") and not set(image.info) & {"comment", "exif"}


@pytest.mark.parametrize("size", [(1, 1), (500, 2), (64, 64)])
@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "CMYK", "I;16"])
def test_thumbnails_of_all_kinds(size, mode):
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, "TIFF")
    made = thumbnail(buffer.getvalue())
    assert made.uri and max(made.width, made.height) <= 96 and min(made.width, made.height) >= 1
