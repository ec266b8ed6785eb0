"""Builds EmojiNet: download, draw, join, split, write. One command, resumable, the same bytes every time.

python scripts/emojinet/build.py --out data/emojinet           everything, about 1.5 minutes on two cores
python scripts/emojinet/build.py --out data/emojinet-fast --fast    a smaller pool, for a smoke run
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter, defaultdict
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import draw, write
from benchmarks.contact import contact_sheet
from benchmarks.download import DownloadError, download
from benchmarks.files import Stage, unit_hash, write_json, write_text
from benchmarks.icons import load_icons, visible_names
from benchmarks.sources import Source

from emojinet import texts
from emojinet.attribution import attribution
from emojinet.classes import CLASS_NAMES, GROUPS, held_out_classes
from emojinet.join import Concept, join
from emojinet.sources import ALL_SOURCES, EMOJI_SETS, NAMES, UNRELATED_SETS
from emojinet.split import MONO_VENDORS, Sample, split

TASK_SHARDS = 4
# Texts per drawing in pretraining: a small pool seen many times is learned by heart if each image has one text only.
PRETRAINING_VARIANTS = 5
PRETRAINING_SHARDS = 16
# A smoke run's pool: every eighth unrelated icon of these sets.
FAST_UNRELATED = ("flat-color-icons",)
# Rises whenever this package would write other bytes from the same sources.
FORMAT = 1


def draw_all(
    unpacked: Path, cache: Path, vendors: dict[str, dict[str, str]], unrelated: tuple[Source, ...]
) -> dict:
    """Draws every icon that is needed.

    Returns:
        For each set, PNGs by icon name.
    """
    images = {}
    for source in (*EMOJI_SETS, *unrelated):
        documents = load_icons(unpacked, source)
        wanted = vendors[source.name].values() if source.name in vendors else visible_names(unpacked, source)
        chosen = {icon: documents[icon] for icon in wanted}
        path = draw.draw_set(
            f"{source.name}-{source.version}-{draw.SIZE}px-{len(chosen)}", chosen, cache / "drawn"
        )
        images[source.name] = draw.read_set(path)
    return images


def write_task(
    out: Path, samples: list[Sample], pngs: dict[str, bytes], class_numbers: dict[str, int]
) -> None:
    """Writes the training and validation shards of the task: images with `cls` and no text."""
    for place, folder in (("task/train", "train"), ("validation/id", "validation")):
        records = [
            (s.key, {"png": pngs[s.key], "cls": str(class_numbers[s.subgroup]).encode()})
            for s in sorted(samples, key=lambda s: unit_hash("order", s.key))
            if s.place == place
        ]
        write.write_sizes(
            out / "task" / folder, write.write_shards(out / "task" / folder, "", records, TASK_SHARDS)
        )


def pool_records(
    samples: list[Sample],
    pngs: dict[str, bytes],
    concepts: dict[str, Concept],
    unrelated: dict[str, dict[str, bytes]],
) -> tuple[list[write.Record], list[write.Record]]:
    """The pool's emoji and its unrelated icons, as image, text and licence, each in the order of a hash."""
    licenses = {source.name: source.license for source in ALL_SOURCES}
    emoji = [
        write.pair(
            s.key,
            pngs[s.key],
            texts.caption(concepts[s.code], s.vendor),
            {"set": s.vendor, "license": licenses[s.vendor], "concept": s.code},
        )
        for s in samples
        if s.place == "pool"
    ]
    icons = [
        write.pair(
            f"{vendor}_{icon}",
            png,
            texts.icon_caption(icon, vendor),
            {"set": vendor, "license": licenses[vendor], "icon": icon},
        )
        for vendor, drawn in unrelated.items()
        for icon, png in drawn.items()
    ]
    return write.shuffled(emoji), write.shuffled(icons)


def prepare(
    cache: Path, unrelated_sets: tuple[Source, ...]
) -> tuple[list[Sample], dict[str, bytes], dict[str, Concept], dict[str, dict[str, bytes]]]:
    """Downloads, joins, splits and draws.

    Args:
        cache: folder of downloads and drawings.
        unrelated_sets: the sets of unrelated icons to take.

    Returns:
        Every emoji's place, their PNGs by key, all concepts by code, and the unrelated icons' PNGs by set and name.
    """
    unpacked = download((*EMOJI_SETS, *NAMES, *unrelated_sets), cache)
    concepts, vendors = join(unpacked)
    vendors = {
        vendor: {code: icon for code, icon in icons.items() if concepts[code].group in GROUPS}
        for vendor, icons in vendors.items()
    }
    images = draw_all(unpacked, cache, vendors, unrelated_sets)
    samples = [s for s in split(concepts, vendors) if s.icon in images[s.vendor]]
    pngs = {s.key: images[s.vendor][s.icon] for s in samples}
    return samples, pngs, concepts, {s.name: images[s.name] for s in unrelated_sets}


def write_pretraining(
    out: Path, samples: list[Sample], pngs: dict[str, bytes], concepts: dict[str, Concept]
) -> None:
    """Writes the pool's emoji for pretraining: each drawing several times, with another text each time."""
    records = [
        (
            f"{s.key}_{variant}",
            {"png": pngs[s.key], "txt": texts.caption(concepts[s.code], s.vendor, variant).encode()},
        )
        for s in samples
        if s.place == "pool"
        for variant in range(PRETRAINING_VARIANTS)
    ]
    records.sort(key=lambda record: unit_hash("order", record[0]))
    folder = out / "pretraining"
    write.write_sizes(folder, write.write_shards(folder, "", records, PRETRAINING_SHARDS))


def write_evaluation(
    out: Path,
    samples: list[Sample],
    pngs: dict[str, bytes],
    concepts: dict[str, Concept],
    names: dict[str, list[str]],
) -> dict[str, int]:
    """Writes validation and test folders: id, shift/<vendor>, zero_shot, zero_shot_fine.

    Returns:
        The number of images in each.
    """
    counts = {}
    for half in ("validation", "test"):
        sets: dict[str, list[Sample]] = defaultdict(list)
        for s in samples:
            part, _, kind = s.place.partition("/")
            if part == half:
                sets[f"shift/{s.vendor}" if kind == "shift" else kind].append(s)
        for kind, members in sorted(sets.items()):
            classes = names["held_out" if kind == "zero_shot" else "fine_tuned"]
            records = [(s.key, pngs[s.key], classes.index(s.subgroup)) for s in members]
            class_names = [CLASS_NAMES[c] for c in classes]
            counts[f"{half}/{kind}"] = write.write_evaluation_set(
                out / "evaluation" / half / kind, records, class_names, texts.TEMPLATES
            )
        fine = sorted({s.code for s in sets["zero_shot"]})
        records = [(s.key, pngs[s.key], fine.index(s.code)) for s in sets["zero_shot"]]
        counts[f"{half}/zero_shot_fine"] = write.write_evaluation_set(
            out / "evaluation" / half / "zero_shot_fine",
            records,
            [concepts[c].label for c in fine],
            texts.TEMPLATES,
        )
    return counts


def build(out: Path, cache: Path, fast: bool = False) -> dict:
    """Builds the benchmark.

    Args:
        out: folder of the result.
        cache: folder of downloads and drawings; may be shared between results.
        fast: leave most of the unrelated icons out.

    Returns:
        What is in it: counts of samples, classes, licences.
    """
    unrelated_sets = tuple(s for s in UNRELATED_SETS if not fast or s.name in FAST_UNRELATED)
    stage = Stage(
        out, "build", {"format": FORMAT, "fast": fast, "sources": [s.integrity for s in ALL_SOURCES]}
    )
    summary_path = out / "emojinet.json"
    if stage.done:
        print(f"{out} is complete")
        return json.loads(summary_path.read_text())
    samples, pngs, concepts, unrelated = prepare(cache, unrelated_sets)
    held_out = held_out_classes({c.subgroup: c.group for c in concepts.values()})
    names = {"held_out": held_out, "fine_tuned": [c for c in CLASS_NAMES if c not in held_out]}
    write_task(out, samples, pngs, {c: n for n, c in enumerate(names["fine_tuned"])})
    write_text(out / "task" / "classnames.txt", "\n".join(CLASS_NAMES[c] for c in names["fine_tuned"]) + "\n")
    write_text(out / "task" / "templates.txt", "\n".join(texts.TEMPLATES) + "\n")
    emoji, icons = pool_records(samples, pngs, concepts, unrelated)
    write.write_pool(out / "pool", {"emoji-": emoji, "icons-": icons})
    write_pretraining(out, samples, pngs, concepts)
    evaluation = write_evaluation(out, samples, pngs, concepts, names)
    write_text(out / "ATTRIBUTION.md", attribution())
    rows = sorted({s.code for s in samples}, key=lambda code: unit_hash("contact", code))[:40]
    contact_sheet(
        out / "contact.png",
        [(code, concepts[code].label) for code in rows],
        [s.name for s in EMOJI_SETS],
        {(s.vendor, s.code): pngs[s.key] for s in samples},
    )
    summary = {
        "concepts": len({s.code for s in samples}),
        "drawings": len(samples),
        "drawings_per_vendor": dict(Counter(s.vendor for s in samples)),
        "mono": list(MONO_VENDORS),
        "classes": {part: [CLASS_NAMES[c] for c in members] for part, members in names.items()},
        "task": {place: sum(s.place == place for s in samples) for place in ("task/train", "validation/id")},
        "pool": {
            "emoji": sum(s.place == "pool" for s in samples),
            "unrelated": len(icons),
        },
        "evaluation": evaluation,
    }
    write_json(summary_path, summary)
    stage.finish()
    return summary


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("data/emojinet"), help="folder to write (default: %(default)s)"
    )
    parser.add_argument("--cache", type=Path, help="downloads and drawings (default: OUT/../emojinet-cache)")
    parser.add_argument("--fast", action="store_true", help="a smaller pool, for a smoke run")
    parser.add_argument(
        "--attribution", action="store_true", help="only write scripts/emojinet/ATTRIBUTION.md"
    )
    args = parser.parse_args()
    if args.attribution:
        write_text(Path(__file__).parent / "ATTRIBUTION.md", attribution())
        return 0
    try:
        summary = build(args.out, args.cache or args.out.parent / "emojinet-cache", args.fast)
    except DownloadError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(summary, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
