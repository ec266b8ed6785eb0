"""What a step of each arm of a grid costs, in units of a plain open_clip step; for scripts/emojinet/frontier.py.

    python scripts/emojinet/step_cost.py runs/ablation/frontier          a few minutes; nothing else should run

Steps of all arms run in turn on one model, with batches ready in memory, so the ratios are compute alone and hold
where the grid's own runs were disturbed. A plain step has class prompts alone, with untrimmed texts. Writes
GRID/cost.json.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    here = Path(__file__).resolve().parent.parent
    sys.path[:0] = [str(here), str(here / "bench")]

from benchmarks.files import read_json, write_json

from arf_plugin.ablation.launch import cpu_threads

PLAIN = "plain"


def costs(grid: Mapping[str, Any], rounds: int) -> dict[str, dict[str, float]]:
    """Times a step of every trained arm.

    Args:
        grid: GRID/grid.json.
        rounds: timed rounds; each runs every arm's step, or cycle of steps, once.

    Returns:
        Arm -> median, least and largest ratio of its step's time to the plain step's of the same round.
    """
    from common import interleave
    from variants import StepBench, Variant

    from arf_plugin.hooks.model import freeze_batch_norm

    arms = [arm for arm in grid["arms"] if arm["kind"] != "before"]
    batch_size = int(arms[0]["flags"]["batch-size"])
    logging.disable(logging.INFO)
    bench = StepBench(grid["model"], batch_size, lengths=longest_texts(grid, batch_size))
    freeze_batch_norm(bench.core)
    variants = {PLAIN: Variant(PLAIN)}
    for arm in arms:
        flags = arm["flags"]
        variants[arm["name"]] = Variant(
            arm["name"],
            pairs=int(flags.get("arf-pair-batch-size", batch_size)) / batch_size if arm["anchors"] else None,
            trim=True,
            every=int(flags.get("arf-every", 1)),
        )
    seconds = interleave({name: bench.step(variant) for name, variant in variants.items()}, rounds)
    found = {}
    for name, variant in variants.items():
        ratios = [a / b / variant.every for a, b in zip(seconds[name], seconds[PLAIN], strict=True)]
        found[name] = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
    return found


def longest_texts(grid: Mapping[str, Any], batch_size: int) -> list[int]:
    """Tokens of the longest prompt, caption and pair text of a batch: medians over many drawn at random."""
    import random

    import open_clip
    import pyarrow.parquet as pq

    from arf_plugin.anchors.task import expand_urls
    from arf_plugin.data.trim import TextTrimmer

    tokenize = open_clip.get_tokenizer(grid["model"])
    anchors = Path(grid["anchors"])
    folder = Path(expand_urls(grid["data"]["task"])[0]).parents[1]
    classes, templates = (
        (folder / f"{name}.txt").read_text().splitlines() for name in ("classnames", "templates")
    )
    prompts = [template.replace("{c}", name) for name in classes for template in templates]
    captions = [
        text
        for path in anchors.glob("captions/*.parquet")
        for text in pq.read_table(path)["caption"].to_pylist()
    ]
    drawn, medians = random.Random(0), []
    for texts in (prompts, captions, list(pair_texts(anchors))):
        tokens = tokenize(texts)
        ends = (TextTrimmer(tokens.shape[1]).ends(tokens) + 1).tolist()
        medians.append(round(statistics.median(max(drawn.choices(ends, k=batch_size)) for _ in range(200))))
    return medians


def pair_texts(anchors: Path) -> list[str]:
    """Texts of an anchor set's pairs."""
    import tarfile

    texts = []
    for path in sorted(anchors.glob("pairs/*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".txt"):
                    content = tar.extractfile(member)
                    texts.append(content.read().decode() if content is not None else "")
    return texts


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("grid", type=Path, help="folder of `arf ablate emojinet-frontier[-vit]`")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds (default: 15)")
    args = parser.parse_args()
    if not (args.grid / "grid.json").is_file():
        parser.error(f"{args.grid} has no grid.json; run scripts/emojinet/ablate.sh {args.grid.name} first")
    os.environ.update(cpu_threads(1))  # as the grid's runs have it: several side by side
    found = costs(read_json(args.grid / "grid.json"), args.rounds)
    write_json(args.grid / "cost.json", found)
    for name, cost in sorted(found.items(), key=lambda item: item[1]["median"]):
        print(f"{name:<20}{cost['median']:6.3f}  ({cost['min']:.3f} to {cost['max']:.3f})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
