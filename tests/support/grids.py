"""A world for tiny grids: task data, anchors, a pool, a CLIP, a suite with test and validation sets, and a config."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from support import building, data
from support.tars import write_tar

CLASSES = [f"{colour} {shape}" for colour, shape in zip(building.COLOURS, building.SHAPES * 2, strict=True)]

SUITE = """\
description: drawings
sets:
  id: {classes: 6, sources: [{webdataset: "{split}/{set}"}]}
  shift: {classes: 6, sources: [{webdataset: "{split}/{set}"}]}
averages:
  ID: {kind: id, of: [id]}
  shift: {kind: shift, of: [shift]}
"""

CONFIG = """\
name: tiny
model: local-dir:{world}/clip
task:
  data: "{task}"
  classnames: {world}/classnames.txt
  templates: {world}/templates.txt
trainer:
  device: cpu
  workers: 1
  epochs: 2
  batch-size: 8
  lr: 1e-3
  warmup: 1
  log-every-n-steps: 1
seeds: [0]
evaluation: {{suite: {world}/drawings.yaml, test: {world}/sets, validation: {world}/sets}}
wise: {{alphas: [0.5], by: ID}}
reference: flyp
anchors: {{hand-made: {world}/anchors}}
arms:
  - {{name: before, kind: before}}
  - {{name: flyp, label: FLYP, kind: baseline}}
  - {{name: arf, label: ARF, kind: arf, anchors: hand-made}}
"""


@dataclasses.dataclass(frozen=True)
class World:
    """Where everything is."""

    folder: Path
    task: str

    def config(self, more: str = "", text: str = CONFIG) -> Path:
        """Writes a config: the usual one, with arms (lines that begin with two spaces) after its own."""
        number = len(list(self.folder.glob("grid-*.yaml")))
        path = self.folder / f"grid-{number}.yaml"
        path.write_text(text.format(world=self.folder, task=self.task) + more)
        return path


def write_world(folder: Path) -> World:
    """Writes 3 task shards of 8 drawings, an anchor set of captions and 12 pairs, a pool, and sets of 12 drawings."""
    task = building.write_task(folder / "task", shards=3, per_shard=8)
    building.write_pool(folder / "pool", shards=2, per_shard=8)
    building.save_tiny_clip(folder / "clip")
    ids = [f"{shard:03d}/{shard * 8 + i:05d}" for shard in range(3) for i in range(8)]
    data.write_captions(folder / "anchors", {name: f"a caption of {name}" for name in ids})
    data.write_pairs(folder / "anchors", shards=2, per_shard=6)
    (folder / "classnames.txt").write_text("\n".join(CLASSES) + "\n")
    (folder / "templates.txt").write_text("a drawing of a {c}.\na {c}.\n")
    (folder / "drawings.yaml").write_text(SUITE)
    for split, start in (("test", 300), ("validation", 400)):
        for name, first in (("id", start), ("shift", start + 50)):
            root = folder / "sets" / split / name
            members = []
            for n in range(first, first + 12):
                members += [(f"{n}.jpg", building.drawing(n)), (f"{n}.cls", str(n % 6).encode())]
            write_tar(root / "test" / "0.tar", members)
            (root / "test" / "nshards.txt").write_text("1\n")
            (root / "classnames.txt").write_text("\n".join(CLASSES) + "\n")
            (root / "zeroshot_classification_templates.txt").write_text("a drawing of a {c}.\n")
    return World(folder, task)
