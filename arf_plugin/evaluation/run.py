"""Evaluates checkpoints and mixtures of one model on several sets, decoding each image once for all of them."""

from __future__ import annotations

import datetime
import importlib.metadata
import itertools
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arf_plugin.console import progress
from arf_plugin.errors import EvaluationError
from arf_plugin.evaluation import batches
from arf_plugin.evaluation.candidates import Candidate, build, how_many_fit, load_all, weights_digest
from arf_plugin.evaluation.distributed import Processes
from arf_plugin.evaluation.metrics import Predictions, joined, measure
from arf_plugin.evaluation.records import FORMAT, EvalRecord, Results, packed
from arf_plugin.evaluation.run_settings import Settings
from arf_plugin.evaluation.sets import EvaluationSet
from arf_plugin.evaluation.zeroshot import PRECISIONS, Classifier

if TYPE_CHECKING:
    import torch

LIBRARIES = ("arf-plugin", "open_clip_torch", "torch", "clip-benchmark", "torchmetrics")


def evaluate(
    candidates: Sequence[Candidate | Path],
    model: str,
    sets: Sequence[EvaluationSet],
    *,
    suite: str | None = None,
    pretrained: str | None = None,
    out: Path | None = None,
    batch_size: int = 256,
    device: str = "auto",
    precision: str = "fp32",
    workers: int = 2,
    models_at_once: int | None = None,
    flags: Settings | None = None,
    cache_dir: str | None = None,
) -> list[EvalRecord]:
    """Measures every candidate on every set.

    Under torchrun the processes share the batches; all of them return the same records, and the first one writes.

    Args:
        candidates: checkpoints of `model`, and mixtures of them; ``Candidate(None)`` is the model with its own weights.
        model: open_clip model name, ``local-dir:`` folder or ``hf-hub:`` name.
        sets: opened sets, each with a name of its own.
        suite: the suite's name, kept in the records.
        pretrained: open_clip tag or file, for ``Candidate(None)``; of checkpoints, what they were made from.
        out: JSONL file that records are appended to as sets are finished; what it holds is not measured again.
        batch_size: images per forward.
        device: ``auto``, or a torch device.
        precision: "fp32", or "amp" as CLIP_benchmark has it by default (autocast: fp16 on a GPU, bf16 on the CPU).
        workers: processes that decode images.
        models_at_once: models in memory at a time; images are decoded once for each such group. By default, as many
            as half of the free memory holds.
        flags: how models see images and texts, where that is not to be as their runs had it; see
            :mod:`arf_plugin.evaluation.run_settings`. Images are decoded once for each way.
        cache_dir: where open_clip keeps what it downloads.

    Returns:
        A record per candidate and set, candidate by candidate; see :mod:`arf_plugin.evaluation.records`.

    Raises:
        EvaluationError: for checkpoints or sets that cannot be evaluated.
    """
    import torch

    from arf_plugin.pipeline.execution import pick_device

    if precision not in PRECISIONS:
        raise EvaluationError(f"precision is {precision!r}, expected one of {', '.join(PRECISIONS)}.")
    asked = list(dict.fromkeys(c if isinstance(c, Candidate) else Candidate(c) for c in candidates))
    _check(asked, sets)
    with Processes() as processes:
        place = pick_device(device, processes.local_rank)
        if place.type == "cuda":  # CLIP_benchmark names no number, only "cuda"
            torch.cuda.set_device(place)
        ways = _resolve(asked, model, pretrained, flags or Settings(), shown=processes.first)
        own = None
        if itself := next((candidate for candidate in asked if candidate.checkpoint is None), None):
            way = ways[itself]
            own = build(model, pretrained, place, own_weights=True, settings=way, cache_dir=cache_dir)
        frame: EvalRecord = {"format": FORMAT, "suite": suite, "model": model, "device": place.type}
        frame |= {"precision": precision, "batch_size": batch_size, "versions": versions()}
        tasks = []
        for candidate in asked:
            described = processes.share(describe(candidate, model, pretrained, own))
            described = {**frame, **described, "preprocess": ways[candidate].flags()}
            tasks += [_Task(candidate, dataset, {**described, **describe_set(dataset)}) for dataset in sets]
        results = Results(out, processes.share(Results.read(out)), writes=processes.first)
        todo = [task for task in tasks if not results.has(task.record)]
        # The model's own weights come first: loading the others overwrites them.
        left = sorted({task.candidate: 0 for task in todo}, key=lambda c: c.checkpoint is not None)
        expected, started = 0, time.monotonic()
        with progress("evaluate", "images", quiet=not processes.first) as bar:
            for way in dict.fromkeys(ways[candidate] for candidate in left):
                mine = [candidate for candidate in left if ways[candidate] == way]
                loaded = own if mine[0].checkpoint is None else None
                own = None  # its memory goes to the next model
                if loaded is None:
                    loaded = build(model, None, place, settings=way, cache_dir=cache_dir)
                runtime = _Runtime(*loaded, place, precision == "amp", batch_size, workers, processes)
                del loaded
                fitting = how_many_fit(runtime.model, place, processes.local_world)
                size = models_at_once or processes.share(fitting)
                groups = [mine[start : start + size] for start in range(0, len(mine), size)]
                work = [[task for task in todo if task.candidate in group] for group in groups]
                expected += sum(dataset.images for part in work for dataset in _sets_of(part))
                bar.total = expected
                for part in work:
                    for task, found, classifier in _predict(part, runtime, bar.update):
                        scores = measure(found, len(task.dataset.classnames))
                        told = {"metrics": scores, "classifier": classifier, "time": _now()}
                        told["right"] = packed((found.target == found.predicted).numpy())
                        results.add({**task.record, **told})
        if expected and processes.first:
            rate = expected / (time.monotonic() - started)
            print(f"evaluate: {expected} images, {rate:.1f} images/s", file=sys.stderr)
        return [results.take(task.record) for task in tasks]


@dataclass(frozen=True)
class _Task:
    """One measurement: a candidate, a set, and the record without its scores."""

    candidate: Candidate
    dataset: EvaluationSet
    record: EvalRecord


@dataclass(frozen=True)
class _Runtime:
    """What all measurements share."""

    model: torch.nn.Module
    preprocess: Callable[[Any], torch.Tensor]
    tokenizer: Any
    device: torch.device
    amp: bool
    batch_size: int
    workers: int
    processes: Processes


def _predict(
    tasks: Sequence[_Task], runtime: _Runtime, advance: Callable[[int], object]
) -> Iterator[tuple[_Task, Predictions, str]]:
    """Yields the predictions of tasks whose models are in memory together, set by set, and who made them."""
    candidates = list(dict.fromkeys(task.candidate for task in tasks))
    sets, processes = _sets_of(tasks), runtime.processes
    common = (runtime.tokenizer, runtime.device, runtime.amp, processes.first)
    classifiers = {
        candidate: Classifier(model, head, *common)
        for candidate, (model, head) in zip(candidates, load_all(candidates, runtime.model), strict=True)
    }
    plan = batches.plan([dataset.images for dataset in sets], runtime.batch_size)
    share = plan[processes.rank :: processes.world]
    stream = batches.decode(sets, share, runtime.preprocess, runtime.workers, runtime.device)
    for index, dataset in enumerate(sets):
        here = [task for task in tasks if task.dataset is dataset]
        weights = {task.candidate: classifiers[task.candidate].weights(dataset) for task in here}
        parts: dict[Candidate, list[tuple[int, Predictions]]] = {task.candidate: [] for task in here}
        mine = sum(batch.dataset == index for batch in share)
        for batch, images, target in itertools.islice(stream, mine):
            for candidate, part in parts.items():
                found = classifiers[candidate].predict(images, target, weights[candidate])
                part.append((batch.number, found))
            advance(len(target) * processes.world)
        for task in here:
            everyone = itertools.chain.from_iterable(processes.gather(parts[task.candidate]))
            in_order = [found for _, found in sorted(everyone, key=lambda numbered: numbered[0])]
            head = classifiers[task.candidate].uses_head(dataset)
            yield task, joined(in_order), "head" if head else "zero-shot"


def _sets_of(tasks: Sequence[_Task]) -> list[EvaluationSet]:
    return list({task.dataset.name: task.dataset for task in tasks}.values())


def _check(candidates: Sequence[Candidate], sets: Sequence[EvaluationSet]) -> None:
    names = [dataset.name for dataset in sets]
    for name in names:
        if names.count(name) > 1:
            raise EvaluationError(f"Two sets are called '{name}'. Name a folder above both with --data.")
    for candidate in candidates:
        candidate.check()
    for dataset in sets:
        if problem := dataset.truncated():
            warnings.warn(problem, stacklevel=3)


def _resolve(
    candidates: Sequence[Candidate], model: str, pretrained: str | None, flags: Settings, shown: bool
) -> dict[Candidate, Settings]:
    """How each candidate is to see images and texts; says where that is known from, unless all is left to the model."""
    found, said = {}, set()
    for candidate in candidates:
        found[candidate], run = candidate.resolve(model, flags, pretrained)
        text = found[candidate].flags()
        if run is not None and run.settings.given() and shown and (run.source, text) not in said:
            said.add((run.source, text))
            print(
                f"{candidate.checkpoint or pretrained}: measured with {text} ({run.source})", file=sys.stderr
            )
    return found


def describe(candidate: Candidate, model: str, pretrained: str | None = None, own: Any = None) -> EvalRecord:
    """A record's fields on a candidate; `own` is what :func:`build` returned, for the model's own weights."""
    if candidate.checkpoint is None:
        name, tag = candidate.name or model, pretrained
    else:
        name, tag = candidate.title, None
    original = candidate.original_name or (str(candidate.original) if candidate.original else None)
    merged = (
        {"merge": str(candidate.merge), "runs": list(map(str, candidate.runs))} if candidate.merge else {}
    )
    return {
        "checkpoint": name,
        "digest": candidate.digest() if candidate.checkpoint else weights_digest(own[0]),
        "original": original,
        "original_digest": candidate.original_digest(),
        "alpha": candidate.alpha,
        "pretrained": tag,
        **merged,
    }


def describe_set(dataset: EvaluationSet) -> EvalRecord:
    """A record's fields on a set."""
    return {
        "set": dataset.name,
        "split": dataset.split,
        "images": dataset.images,
        "expected_images": dataset.expected_images,
        "classes": len(dataset.classnames),
        "headline": dataset.metric,
        "prompts": dataset.prompts,
        "data": dataset.samples.digest,
    }


def versions() -> dict[str, str]:
    """Versions of the libraries that scores depend on."""
    found = {}
    for library in LIBRARIES:
        try:
            found[library.replace("-", "_")] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            found[library.replace("-", "_")] = "not installed"
    return found


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
