"""Grid folders to report on: one of made-up rows, whose averages are known, and one that was really trained."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from arf_plugin.evaluation.records import packed
from support import data, grids
from support.tars import write_tar
from support.trainer import Trainer

SUITE = """\
description: made up
sets:
  id: {sources: [{webdataset: id}]}
  shift/a: {sources: [{webdataset: a}]}
  shift/b: {sources: [{webdataset: b}]}
  unseen: {sources: [{webdataset: unseen}]}
averages:
  ID: {kind: id, of: [id]}
  shift: {kind: shift, of: ["shift/*"]}
  zero-shot: {kind: zero-shot, of: [unseen]}
  seen: {kind: class-split, of: [id]}
  held out: {kind: class-split, of: [unseen]}
  H: {kind: class-split, harmonic: [seen, held out]}
"""
IMAGES = {"id": 400, "shift/a": 100, "shift/b": 100, "unseen": 200}
HOSTILE = (
    "<script>alert(1)</script><img src=x onerror=alert(2)> & \"quoted\" 'text' {{ 7 * 7 }} $\\frac{1}{2}$"
)


def row(checkpoint: str, name: str, top1: float, alpha: float | None = None, **more: object) -> dict:
    """One result row; `more` replaces fields."""
    ended = {"original": "runs/before-0/weights.pt", "original_digest": "before"} if alpha is not None else {}
    return {
        "format": 1, "suite": "made-up", "set": name, "split": "test", "checkpoint": checkpoint,
        "digest": "before" if "before" in checkpoint else checkpoint, "original": None, "original_digest": None,
        "alpha": alpha, "model": "tiny", "images": IMAGES.get(name, 100), "expected_images": None, "classes": 4,
        "metrics": {"top1": top1, "ece": top1 / 10}, "headline": "top1", "device": "cpu", "precision": "fp32",
        "batch_size": 8, "versions": {"torch": "2"}, "time": "2025-01-31T12:00:00+00:00", **ended, **more,
    }  # fmt: skip


def bits(right: Sequence[bool], name: str) -> dict:
    """Fields of a row that says which images were right."""
    share = 100 * sum(right) / len(right)
    metrics = {"top1": share, "ece": share / 10}
    return {
        "metrics": metrics,
        "images": len(right),
        "data": f"images of {name}",
        "right": packed(np.array(right)),
    }


class Made:
    """A grid folder of made-up rows, with a suite file beside it.

    Args:
        folder: where to write.
        arms: name -> kind.
    """

    def __init__(self, folder: Path, arms: Mapping[str, str] | None = None, **grid: object) -> None:
        self.folder = folder
        self.arms = arms or {"before": "before", "flyp": "baseline", "arf": "arf"}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "made-up.yaml").write_text(SUITE)
        listed = [
            {"name": name, "label": name.upper(), "kind": kind, "what": ""}
            for name, kind in self.arms.items()
        ]
        content = {
            "arms": listed,
            "reference": "flyp",
            "suite": f"{folder}/made-up.yaml",
            "seeds": [0, 1, 2],
            **grid,
        }
        (folder / "grid.json").write_text(json.dumps(content))
        self.rows: list[dict] = []

    def measure(self, arm: str, seed: int, alpha: float | None = None, **top1: float) -> None:
        """Adds rows: sets by keyword, with ``shift_a`` for ``shift/a``."""
        for name, value in top1.items():
            self.rows.append(row(f"runs/{arm}-{seed}/weights.pt", name.replace("_", "/"), value, alpha))

    def add_run(self, arm: str, seed: int, log: str = "", **info: object) -> Path:
        """Adds a run's folder."""
        folder = self.folder / "runs" / f"{arm}-{seed}"
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(json.dumps({"arm": arm, "seed": seed, "command": [], **info}))
        if log:
            (folder / "out.log").write_text(log)
        return folder

    def write(self) -> Path:
        """Writes the rows; returns the folder."""
        (self.folder / "results.jsonl").write_text("".join(json.dumps(each) + "\n" for each in self.rows))
        return self.folder

    def usual(self) -> Made:
        """Three seeds of FLYP and ARF; ARF is far ahead on shift, level on ID."""
        self.measure("before", 0, id=50, shift_a=40, shift_b=20, unseen=30)
        for seed, wobble in enumerate((-1.0, 0.0, 1.0)):
            flyp = {"id": 60 + wobble, "shift_a": 35 + wobble, "shift_b": 15 + wobble, "unseen": 20}
            arf = {"id": 60 - wobble, "shift_a": 55 + wobble, "shift_b": 35, "unseen": 21 + wobble / 10}
            for arm, ends in (("flyp", flyp), ("arf", arf)):
                self.measure(arm, seed, **ends)
                for alpha in (0.25, 0.5, 0.75):
                    start = {"id": 50, "shift_a": 40, "shift_b": 20, "unseen": 30}
                    bulge = 20 * alpha * (1 - alpha)
                    mixed = {name: (1 - alpha) * start[name] + alpha * ends[name] + bulge for name in ends}
                    self.measure(arm, seed, alpha, **mixed)
        return self


def step(epoch: int, seen: int, size: int = 64, **terms: float) -> str:
    """A line of the trainer's log, as open_clip 3.3 writes it; the sum is added."""
    terms = {**terms, "loss": sum(terms.values())}
    losses = " ".join(f"{name.capitalize()}: {value:#.5g} ({value:#.5g})" for name, value in terms.items())
    digits = math.ceil(math.log10(size + 1))
    return (
        f"2025-01-31,12:00:00 | INFO | Train Epoch: {epoch} [{seen:>{digits}}/{size} ({100 * seen / size:.0f}%)] "
        f"Data (t): 0.003 Batch (t): 0.323, 194.036/s, 194.036/s/gpu LR: 0.000500 Logit Scale: 15.933 {losses}\n"
    )


def write_pair_shards(anchors: Path, pairs: list[dict], per_shard: int = 5) -> None:
    """Writes pairs with records; each dict has `queries` {id: cosine} and `text`, and may have `image`."""
    for first in range(0, len(pairs), per_shard):
        members = []
        for number, pair in enumerate(pairs[first : first + per_shard], first):
            queries = pair.get("queries", {})
            record = {
                "pool_key": f"key{number}", "pool_shard": "pool-00", "queries": list(queries),
                "query_count": len(queries), "query_similarities": list(queries.values()),
                "similarity": max(queries.values(), default=None),
            }  # fmt: skip
            members += [
                (f"{number:09d}.png", pair.get("image", data.image(1000 + number))),
                (f"{number:09d}.txt", pair.get("text", f"pair {number}").encode()),
                (f"{number:09d}.json", json.dumps(record).encode()),
            ]
        write_tar(anchors / "pairs" / f"{first // per_shard:06d}.tar", members)


def train_grid(folder: Path, world: grids.World, train: Trainer, seeds: tuple[int, ...] = (0, 1)) -> Path:
    """Trains FLYP and ARF with the real trainer, measures them, and leaves a grid folder as `arf ablate` does.

    The runs are forks of one process (``Trainer.forked``), which takes a second each in place of ten.
    """
    from safetensors.torch import load_file, save_file

    from arf_plugin.evaluation.candidates import Candidate
    from arf_plugin.evaluation.run import evaluate
    from arf_plugin.evaluation.sets import find_sets

    clip = f"local-dir:{world.folder}/clip"
    arms = {"before": "before", "flyp": "baseline", "arf": "arf"}
    before = folder / "runs" / "before-0" / "weights.safetensors"
    before.parent.mkdir(parents=True)
    save_file(load_file(world.folder / "clip" / "open_clip_model.safetensors"), before)
    (before.parent / "run.json").write_text(
        json.dumps({"arm": "before", "seed": 0, "checkpoint": before.name})
    )
    texts = (
        "--arf-classnames",
        world.folder / "classnames.txt",
        "--arf-templates",
        world.folder / "templates.txt",
    )
    candidates = [Candidate(before)]
    for arm, more in (("flyp", ()), ("arf", ("--arf-anchors", world.folder / "anchors"))):
        for seed in seeds:
            name = f"{arm}-{seed}"
            flags = (
                *("--train-data", world.task, "--dataset-type", "webdataset"),
                *("--train-num-samples", 24, "--seed", seed),
            )
            flags = (*flags, "--epochs", 2, *texts, *more)
            done = train.forked(*flags, name=name, model=clip)
            run = folder / "runs" / name
            run.mkdir()
            shutil.copy(done.folder / "out.log", run)
            shutil.copy(done.folder / "checkpoints" / "epoch_2.pt", run / "weights.pt")
            command = ["torchrun", "-m", "--", "open_clip_train.main", *map(str, flags)]
            info = {
                "arm": arm,
                "seed": seed,
                "command": command,
                "checkpoint": "weights.pt",
                "steps": 6,
                "seconds": 1.5,
            }
            info["anchors"] = str(world.folder / "anchors") if more else None
            (run / "run.json").write_text(json.dumps(info))
            candidates.append(Candidate(run / "weights.pt"))
            candidates += [Candidate(run / "weights.pt", before, alpha) for alpha in (0.25, 0.5, 0.75)]
    sets = find_sets(world.folder / "sets" / "test")
    evaluate(candidates, clip, sets, suite="drawings", out=folder / "results.jsonl", workers=0)
    listed = [
        {"name": name, "label": name.upper(), "kind": kind, "what": f"{name}, trained"}
        for name, kind in arms.items()
    ]
    grid = {
        "name": "tiny", "arms": listed, "reference": "flyp", "suite": f"{world.folder}/drawings.yaml",
        "seeds": list(seeds), "data": {"task": world.task}, "anchors": str(world.folder / "anchors"),
    }  # fmt: skip
    (folder / "grid.json").write_text(json.dumps(grid))
    return folder
