"""What a grid comes down to: one command per run, with its number of steps and the images it forwards."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from arf_plugin.ablation.config import COUNTS, Arm, Grid, command_words
from arf_plugin.ablation.launch import ARF, trainer
from arf_plugin.anchors.task import expand_urls
from arf_plugin.errors import TaskDataError
from arf_plugin.files import list_files
from arf_plugin.untrusted import read_json

MERGES = {"stock": "Model Stock", "soup": "uniform soup"}  # of an arm's seeds, and what tables call them
MISSING = "..."  # stands for what is not known before the anchors are built


@dataclass(frozen=True)
class Run:
    """One run: an arm, its flags complete, with a seed; or a candidate of an arm's choice.

    Attributes:
        folder: GRID.
        candidate: number of the candidate, from 0; None for a run of the grid itself.
        processes: torchrun's --nproc_per_node.
    """

    grid: Grid
    folder: Path
    arm: Arm
    seed: int
    candidate: int | None = None
    processes: int = 1

    @property
    def name(self) -> str:
        """ARM-SEED, or ARM.CANDIDATE-SEED."""
        middle = "" if self.candidate is None else f".{self.candidate}"
        return f"{self.arm.name}{middle}-{self.seed}"

    @property
    def path(self) -> Path:
        """The run's folder."""
        return self.folder / ("runs" if self.candidate is None else "candidates") / self.name

    @property
    def weights(self) -> Path:
        """The finished run's checkpoint: weights alone."""
        return self.path / "weights.pt"

    @property
    def listed(self) -> str:
        """What records call its checkpoint."""
        return str(self.weights.relative_to(self.folder))

    @property
    def anchors(self) -> Path | None:
        """The folder of its anchor set."""
        return None if self.arm.anchors is None else self.grid.anchors[self.arm.anchors].path

    @property
    def head(self) -> Run | None:
        """The run of the probe that it starts from."""
        name = self.arm.head
        return None if name is None else Run(self.grid, self.folder, self.grid.arm(name), self.seed)

    @property
    def original(self) -> Path:
        """What WiSE-FT mixes it with: the model before, with the probe's head where it has one."""
        return self.head.weights if self.head is not None else before(self.grid, self.folder).weights

    def count(self, flag: str) -> int:
        """A whole number of a flag, such as ``epochs``; open_clip's default without it."""
        values = self.arm.flags.get(flag)
        return int(values[0]) if values else COUNTS.get(flag, 1)

    @property
    def last_checkpoint(self) -> Path:
        """What the trainer leaves."""
        return self.path / "checkpoints" / f"epoch_{self.count('epochs')}.pt"

    def command(self) -> list[str]:
        """The command line, to be typed as it is."""
        grid, task = self.grid, self.grid.task
        model = ["--model", grid.model, *(("--pretrained", grid.pretrained) if grid.pretrained else ())]
        if self.arm.is_probe:
            words = [*ARF, "probe", *model, "--task-data", task.data]
            words += ["--classnames", task.classnames] if task.classnames else []
            words += ["--seed", str(self.seed), "--out", str(self.weights)]
            return words + command_words(self.arm.flags)
        data, samples = self._train_data()
        words = [*trainer(self.processes), *model, "--train-data", data, "--dataset-type", "webdataset"]
        words += ["--train-num-samples", str(samples)] if samples else []
        if self.arm.mix is not None:
            words += ["--dataset-resampled", "--train-data-upsampling-factors", self._upsampling()]
        words += ["--logs", str(self.path.parent), "--name", self.name, "--resume", "latest"]
        words += ["--save-frequency", "1", "--delete-previous-checkpoint", "--seed", str(self.seed)]
        words += ["--arf-classnames", task.classnames] if task.classnames else []
        words += ["--arf-templates", task.templates] if task.templates and self.head is None else []
        if self.arm.mix is None and self.anchors is not None:
            words += ["--arf-anchors", str(self.anchors)]
        if self.head is not None:
            words += ["--arf-head", str(self.head.weights)]
        return words + command_words(self.arm.flags)

    def steps(self) -> int | None:
        """Optimizer steps, counted as open_clip does; 0 for a probe, None where the samples are not known."""
        if self.arm.is_probe or not self.arm.is_trained:
            return 0
        samples = self._train_data()[1]
        if samples is None:
            return None
        batches = math.ceil(samples / (self.count("batch-size") * self.processes))
        workers = max(1, self._task_workers())
        micro_batches = math.ceil(batches / workers) * workers
        return micro_batches // self.count("accum-freq") * self.count("epochs")

    def images(self) -> int | None:
        """Images that the run forwards through the trained model, pair anchors included."""
        steps = self.steps()
        if steps is None:
            return None
        anchored = math.ceil(steps / self.count("arf-every"))
        images = steps * self.count("batch-size") + anchored * self._pairs()
        return images * self.count("accum-freq") * self.processes

    def _pairs(self) -> int:
        """Pair anchors in a batch."""
        weight = self.arm.flags.get("arf-pair-weight")
        if self.arm.anchors is None or self.arm.mix is not None or (weight and float(weight[0]) == 0):
            return 0
        folder = self.anchors
        if folder is not None and folder.is_dir() and not _shards(folder):
            return 0
        return self.count("arf-pair-batch-size" if "arf-pair-batch-size" in self.arm.flags else "batch-size")

    def _task_workers(self) -> int:
        """Loader workers of the task data, which open_clip rounds the number of batches up to."""
        workers, batch, pairs = self.count("workers"), self.count("batch-size"), self._pairs()
        if not pairs:
            return workers
        wanted = self.arm.flags.get("arf-workers")
        share = int(wanted[0]) if wanted else min(max(round(workers * pairs / (batch + pairs)), 1), workers)
        return max(workers - share, min(workers, 1))

    def _train_data(self) -> tuple[str, int | None]:
        """`--train-data` and the samples of an epoch."""
        task = self.grid.task
        samples = task.samples or count_samples(task.data)
        if self.arm.mix is None:
            return task.data, samples
        shards = _shards(self.anchors) if self.anchors is not None else []
        pairs = "::".join(map(str, shards)) or f"{self.anchors}/pairs/{MISSING}.tar"
        # As many task samples as without mixing, so that `epochs` keeps its meaning.
        return f"{task.data}::{pairs}", None if samples is None else round(samples / (1 - self.arm.mix))

    def _upsampling(self) -> str:
        """Factors that make pairs the wanted share of the samples.

        open_clip draws shards by these weights and takes all samples of a shard, so a source's weight is its share over
        its number of samples, for each of its names between ``::``.
        """
        assert self.arm.mix is not None and self.anchors is not None
        task, shards = self.grid.task, _shards(self.anchors)
        own = task.samples or count_samples(task.data)
        pairs = count_samples("::".join(map(str, shards))) if shards else None
        if not own or not pairs:
            return MISSING
        task_sources = task.data.count("::") + 1
        weight_of_task = (1 - self.arm.mix) / own
        weights = [weight_of_task] * task_sources + [self.arm.mix / pairs] * len(shards)
        return "::".join(f"{weight / weight_of_task:.4g}" for weight in weights)


@dataclass(frozen=True)
class Merged:
    """The model that an arm's finished runs are merged into, in memory, when it is measured; methods: `MERGES`."""

    method: str
    runs: tuple[Run, ...]
    seed: ClassVar[int] = -1  # where tables have a run's

    @property
    def arm(self) -> Arm:
        """Stands for it in tables and records."""
        return merged_arm(self.runs[0].arm, self.method)

    @property
    def listed(self) -> str:
        """What records call it."""
        return f"merged/{self.arm.name}/{'-'.join(str(run.seed) for run in self.runs)}"


def merged_arm(arm: Arm, method: str) -> Arm:
    """What an arm's seeds, merged, are called and are."""
    update = {"name": f"{arm.name}+{method}", "label": f"{arm.label} + {MERGES[method]}"}
    return arm.model_copy(update={**update, "what": f"The seeds of {arm.label} merged: {MERGES[method]}."})


def merged(grid: Grid, finished: Sequence[Run]) -> list[Merged]:
    """What the grid merges: every mixable arm whose runs are all finished."""
    found = []
    for arm in grid.arms:
        own = tuple(run for run in finished if run.arm.name == arm.name and arm.is_mixable)
        if len(own) == len(grid.seeds):
            found += [Merged(method, own) for method in grid.merge]
    return found


def before(grid: Grid, folder: Path) -> Run:
    """The run that stands for the model before fine-tuning."""
    return Run(grid, folder, grid.before, grid.seeds[0])


def final_runs(
    grid: Grid,
    folder: Path,
    arms: Collection[str],
    seeds: Sequence[int],
    processes: int,
    settled: Mapping[str, Arm] | None = None,
) -> list[Run]:
    """The runs of the grid, seed by seed, probes first as others may need them; arms as the file has them.

    `settled` has arms with the flags that were chosen, by name.
    """
    ordered = [arm for arm in sorted(grid.arms, key=lambda arm: not arm.is_probe) if arm.name in arms]
    trained = [(settled or {}).get(arm.name, arm) for arm in ordered if arm.is_trained]
    return [Run(grid, folder, arm, seed, None, processes) for seed in seeds for arm in trained]


def candidate_runs(grid: Grid, folder: Path, arms: Collection[str], processes: int) -> list[Run]:
    """The runs that choices are made from: every candidate, with the first seed."""
    return [
        Run(grid, folder, arm.with_candidate(index), grid.seeds[0], index, processes)
        for arm in grid.arms
        if arm.choice is not None and arm.name in arms
        for index in range(len(arm.choice.over))
    ]


def _shards(anchors: Path) -> list[Path]:
    return list_files(anchors / "pairs", ".tar")


def count_samples(data: str) -> int | None:
    """Samples of task data, from ``sizes.json`` beside the shards or from the tars' headers (cached); None if missing.

    Raises:
        TaskDataError: a shard that is no tar.
    """
    from arf_plugin.anchors.scan import scan_shard

    total = 0
    for url in expand_urls(data):
        path = Path(url)
        sizes = path.parent / "sizes.json"
        if sizes.is_file():
            advice = "open_clip reads it, too: correct it, or remove it and the samples are counted."
            known = read_json(sizes, TaskDataError, advice=advice)
            if path.name in known:
                count = str(known[path.name])  # open_clip takes texts, too
                if not (count.isdecimal() and len(count) < 16):
                    raise TaskDataError(
                        f"{sizes}: '{path.name}' is {count[:40]!r}, expected a number. {advice}"
                    )
                total += int(count)
                continue
        if not path.is_file():
            return None
        total += len(scan_shard(url).keys)
    return total


def missing_inputs(runs: Sequence[Run]) -> list[str]:
    """Local files and folders that the runs need and that are not there."""
    wanted: list[str] = []
    for run in runs:
        task, model = run.grid.task, run.grid.model
        wanted += [url for url in expand_urls(task.data) if "://" not in url]
        wanted += [file for file in (task.classnames, task.templates) if file and file != "imagenet"]
        wanted += [model.removeprefix("local-dir:")] if model.startswith("local-dir:") else []
        if run.arm.anchors is not None and not run.grid.anchors[run.arm.anchors].is_built:
            wanted.append(str(run.anchors))
    return [path for path in dict.fromkeys(wanted) if not Path(path).exists()]
