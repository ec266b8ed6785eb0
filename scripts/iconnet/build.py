"""Builds IconNet: download, draw, split, write. One command, resumable, the same bytes every time.

python scripts/iconnet/build.py --out data/iconnet            everything, about two minutes on two cores
python scripts/iconnet/build.py --out FOLDER --sets tabler lucide mdi --no-unrelated      a part, for a test
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import draw, write
from benchmarks.attribution import table
from benchmarks.contact import contact_sheet
from benchmarks.download import DownloadError, download
from benchmarks.files import Stage, read_json, unit_hash, write_json, write_text
from benchmarks.icons import check_license, load_icons, visible_names
from benchmarks.sources import Source
from emojinet import build as emojinet
from emojinet.sources import ALL_SOURCES as EMOJINET_SOURCES
from emojinet.sources import UNRELATED_SETS

from iconnet import concepts as listed
from iconnet import texts
from iconnet.names import Concepts, Drawing, read_drawings
from iconnet.sources import ICON_SETS
from iconnet.split import TASK_SETS, Classes, choose_classes, split

TASK_SHARDS = 4
PRETRAINING_SHARDS = 16
PRETRAINING_VARIANTS = 3  # texts per drawing
MIN_POOL_SETS = 2  # names of one set alone stay out of the pool
MIN_FINE_SETS = 2  # a fine class stands in so many sets of the test
CONTACT_ROWS = 60
# Rises whenever this package would write other bytes from the same sources.
FORMAT = 1


@dataclass(frozen=True)
class Content:
    """What is written.

    Attributes:
        classes: the concepts by part.
        places: the place of each drawing.
        pngs: the images by key.
        kinds: categories by name, for texts.
    """

    classes: Classes
    places: Mapping[Drawing, str]
    pngs: Mapping[str, bytes]
    kinds: Mapping[str, str]

    def at(self, *places: str) -> list[Drawing]:
        """The drawings at one of some places, in the order of a hash."""
        chosen = [drawing for drawing, place in self.places.items() if place in places]
        return sorted(chosen, key=lambda drawing: unit_hash("order", drawing.key))


def prepare(cache: Path, sources: Sequence[Source]) -> Content:
    """Downloads, reads names, splits and draws."""
    unpacked = download(tuple(sources), cache)
    for source in sources:
        check_license(unpacked, source)
    concepts = Concepts(listed.load(), listed.other_meanings())
    drawings = [
        drawing
        for source in sources
        for drawing in read_drawings(source.name, visible_names(unpacked, source), concepts)
    ]
    classes = choose_classes(drawings)
    places = split(drawings, concepts, classes)
    in_pool: dict[str, set[str]] = defaultdict(set)
    for drawing, place in places.items():
        if place == "pool":
            in_pool[drawing.name].add(drawing.set)
    places = {
        drawing: place
        for drawing, place in places.items()
        if place != "pool" or drawing.concept or len(in_pool[drawing.name]) >= MIN_POOL_SETS
    }
    pngs = {}
    for source in sources:
        documents = load_icons(unpacked, source)
        chosen = {drawing.icon: documents[drawing.icon] for drawing in places if drawing.set == source.name}
        digest = hashlib.sha256("\n".join(sorted(chosen)).encode()).hexdigest()[:10]
        path = draw.draw_set(
            f"{source.name}-{source.version}-{draw.SIZE}px-{digest}", chosen, cache / "drawn"
        )
        pngs |= {f"{source.name}_{icon}": png for icon, png in draw.read_set(path).items()}
    return Content(classes, without_copies(places, pngs), pngs, texts.categories(unpacked, sources))


def without_copies(places: Mapping[Drawing, str], pngs: Mapping[str, bytes]) -> dict[Drawing, str]:
    """Leaves out what shows nothing, and all but one of images that are equal; the task's go first, the pool's last."""
    seen: set[bytes] = set()
    kept = {}
    for drawing in sorted(
        places, key=lambda d: (places[d] == "pool", not places[d].startswith("task"), d.key)
    ):
        png = pngs.get(drawing.key)
        if png and png not in seen:
            seen.add(png)
            kept[drawing] = places[drawing]
    return kept


def write_task(out: Path, content: Content) -> None:
    """Writes the task's shards (images with `cls`, no text), the class names and the templates."""
    names = content.classes.fine_tuned
    for place, folder in (("task/train", "train"), ("validation/id", "validation")):
        records = [
            (d.key, {"png": content.pngs[d.key], "cls": str(names.index(d.concept)).encode()})
            for d in content.at(place)
        ]
        target = out / "task" / folder
        write.write_sizes(target, write.write_shards(target, "", records, TASK_SHARDS))
    write_text(out / "task" / "classnames.txt", "\n".join(names) + "\n")
    write_text(out / "task" / "templates.txt", "\n".join(texts.TEMPLATES) + "\n")


def write_pools(out: Path, content: Content, cache: Path, unrelated: bool) -> dict[str, int]:
    """Writes `pool/icons-NNN.tar`, `pool/unrelated-NNN.tar` (EmojiNet's) and the shards for pretraining.

    Returns:
        The number of pairs of each.
    """
    licenses = {source.name: source.license for source in ICON_SETS}
    pool = content.at("pool")
    groups = {
        "icons-": [
            write.pair(
                d.key,
                content.pngs[d.key],
                texts.caption(d, content.kinds),
                {"set": d.set, "license": licenses[d.set], "icon": d.icon},
            )
            for d in pool
        ]
    }
    if unrelated:
        # Not the sets that both benchmarks have.
        others = tuple(s for s in UNRELATED_SETS if s.name not in licenses)
        emoji, icons = emojinet.pool_records(*emojinet.prepare(cache, others))
        groups["unrelated-"] = write.shuffled(emoji + icons)
    write.write_pool(out / "pool", groups)
    records = [
        (
            f"{d.key}_{variant}",
            {"png": content.pngs[d.key], "txt": texts.caption(d, content.kinds, variant).encode()},
        )
        for d in pool
        for variant in range(PRETRAINING_VARIANTS)
    ]
    folder = out / "pretraining"
    write.write_sizes(folder, write.write_shards(folder, "", write.shuffled(records), PRETRAINING_SHARDS))
    return {prefix.rstrip("-"): len(members) for prefix, members in groups.items()}


def write_evaluation(out: Path, content: Content) -> dict[str, int]:
    """Writes validation and test folders: id, shift/<set>-<style>, zero_shot, zero_shot_fine.

    Returns:
        The number of images in each.
    """
    counts = {}
    for half in ("validation", "test"):
        tuned, zero_shot = content.classes.fine_tuned, content.at(f"{half}/zero_shot")
        held_out = content.classes.held_out if half == "test" else content.classes.validation
        sets: dict[str, list[Drawing]] = defaultdict(list)
        for drawing in content.at(f"{half}/shift"):
            sets[f"shift/{drawing.domain}"].append(drawing)
        wanted = {"id": (content.at(f"{half}/id"), tuned), "zero_shot": (zero_shot, held_out)}
        wanted |= {kind: (members, tuned) for kind, members in sorted(sets.items())}
        for kind, (members, names) in wanted.items():
            records = [(d.key, content.pngs[d.key], names.index(d.concept)) for d in members]
            counts[f"{half}/{kind}"] = write.write_evaluation_set(
                out / "evaluation" / half / kind, records, names, texts.TEMPLATES
            )
        fine = fine_classes(zero_shot)
        records = [
            (d.key, content.pngs[d.key], fine.index(texts.label(d)))
            for d in zero_shot
            if texts.label(d) in fine
        ]
        counts[f"{half}/zero_shot_fine"] = write.write_evaluation_set(
            out / "evaluation" / half / "zero_shot_fine", records, fine, texts.TEMPLATES
        )
    return counts


def fine_classes(drawings: Sequence[Drawing]) -> list[str]:
    """Concepts with their variants ("shopping cart plus") that stand in several sets, sorted."""
    sets: dict[str, set[str]] = defaultdict(set)
    for drawing in drawings:
        sets[texts.label(drawing)].add(drawing.set)
    return sorted(name for name, found in sets.items() if len(found) >= MIN_FINE_SETS)


def write_contact_sheets(out: Path, content: Content, sources: Sequence[Source]) -> None:
    """Writes `contact-NN.png`: all concepts, one plain drawing of each set."""
    plain = {}
    for drawing in sorted(content.places, key=lambda d: (d.variant, len(d.name), d.key), reverse=True):
        if drawing.concept:
            plain[drawing.set, drawing.concept] = content.pngs[drawing.key]
    parts = {"task": content.classes.fine_tuned, "held out": content.classes.held_out}
    parts["validation"] = content.classes.validation
    rows = [(concept, f"{concept} ({part})") for part, members in parts.items() for concept in members]
    for number, first in enumerate(range(0, len(rows), CONTACT_ROWS)):
        contact_sheet(
            out / f"contact-{number:02d}.png",
            rows[first : first + CONTACT_ROWS],
            [s.name for s in sources],
            plain,
        )


def attribution() -> str:
    """The text of ATTRIBUTION.md."""
    return "\n".join(
        [
            "# Attribution",
            "",
            "IconNet is built on the user's machine from the packages below; none of their drawings is part of",
            "this repository. Changes made to them: drawn from SVG as 64 x 64 pixel PNG images, black on white.",
            "Each image of the pool has its licence in the json beside it, and each key begins with its set's",
            "name. The unrelated images of the pool are EmojiNet's: see scripts/emojinet/ATTRIBUTION.md, which",
            "lies beside the data, too, as ATTRIBUTION-unrelated.md. The build compares each licence with the one",
            "in the package. `python scripts/iconnet/build.py --attribution` writes this file.",
            "",
            *table(ICON_SETS),
            "",
        ]
    )


def build(out: Path, cache: Path, sets: Sequence[str] = (), unrelated: bool = True) -> dict:
    """Builds the benchmark.

    Args:
        out: folder of the result.
        cache: folder of downloads and drawings, which EmojiNet's may be, too.
        sets: these icon sets alone; all without any.
        unrelated: add EmojiNet's emoji and icons to the pool.

    Returns:
        What is in it: counts of samples, classes.
    """
    sources = [s for s in ICON_SETS if not sets or s.name in sets]
    pinned = [s.integrity for s in (*sources, *(EMOJINET_SOURCES if unrelated else ()))]
    stage = Stage(
        out,
        "build",
        {
            "format": FORMAT,
            "sources": pinned,
            "names": [listed.load(), sorted(listed.other_meanings()), listed.GROUPS],
        },
    )
    summary_path = out / "iconnet.json"
    if stage.done:
        print(f"{out} is complete")
        return read_json(summary_path)
    content = prepare(cache, sources)
    write_task(out, content)
    pool = write_pools(out, content, cache, unrelated)
    evaluation = write_evaluation(out, content)
    write_contact_sheets(out, content, sources)
    write_text(out / "ATTRIBUTION.md", attribution())
    if unrelated:
        write_text(out / "ATTRIBUTION-unrelated.md", emojinet.attribution())
    summary = {
        "classes": {part: list(members) for part, members in vars(content.classes).items()},
        "sets": {s.name: {"license": s.license, "version": s.version} for s in sources},
        "drawings_per_set": dict(Counter(d.set for d in content.places)),
        "task": {
            "train": len(content.at("task/train")),
            "validation": len(content.at("validation/id")),
            "sets": list(TASK_SETS),
        },
        "pool": pool,
        "evaluation": evaluation,
        "fine_classes": {
            half: len(fine_classes(content.at(f"{half}/zero_shot"))) for half in ("validation", "test")
        },
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
        "--out", type=Path, default=Path("data/iconnet"), help="folder to write (default: %(default)s)"
    )
    parser.add_argument("--cache", type=Path, help="downloads and drawings (default: OUT/../emojinet-cache)")
    known = [s.name for s in ICON_SETS]
    parser.add_argument(
        "--sets", nargs="+", default=[], choices=known, metavar="SET", help="these sets alone"
    )
    parser.add_argument("--no-unrelated", action="store_true", help="no emoji and other icons in the pool")
    parser.add_argument(
        "--write",
        type=Path,
        metavar="FOLDER",
        help="also put the counts there, as iconnet.json (docs/figures)",
    )
    parser.add_argument(
        "--attribution", action="store_true", help="only write scripts/iconnet/ATTRIBUTION.md"
    )
    args = parser.parse_args()
    if args.attribution:
        write_text(Path(__file__).parent / "ATTRIBUTION.md", attribution())
        return 0
    try:
        cache = args.cache or args.out.parent / "emojinet-cache"
        summary = build(args.out, cache, args.sets, not args.no_unrelated)
        if args.write:
            write_json(args.write / "iconnet.json", summary)
    except DownloadError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps({key: value for key, value in summary.items() if key != "classes"}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
