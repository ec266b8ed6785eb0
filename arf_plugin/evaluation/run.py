"""Evaluates checkpoints and mixtures of one model on several sets, decoding each image once for all of them."""

from __future__ import annotations

import copy
import datetime
import functools
import importlib.metadata
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from arf_plugin.console import progress
from arf_plugin.errors import EvaluationError
from arf_plugin.evaluation import batches
from arf_plugin.evaluation.candidates import Candidate, build, known_digest, weights_digest
from arf_plugin.evaluation.distributed import Processes
from arf_plugin.evaluation.head import Head
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
                net, preprocess, tokenizer = loaded or build(
                    model, None, place, settings=way, cache_dir=cache_dir
                )
                del loaded
                size = models_at_once or processes.share(_how_many_fit(net, place, processes.local_world))
                groups = [mine[start : start + size] for start in range(0, len(mine), size)]
                work = [[task for task in todo if task.candidate in group] for group in groups]
                expected += sum(dataset.images for part in work for dataset in _sets_of(part))
                bar.total = expected
                as_classifier = functools.partial(
                    Classifier,
                    tokenizer=tokenizer,
                    device=place,
                    amp=precision == "amp",
                    shown=processes.first,
                )
                share: dict[str, Any] = {"workers": workers, "device": place, "processes": processes}
                share |= {"preprocess": preprocess, "batch_size": batch_size, "advance": bar.update}
                for part in work:
                    for record in _measured(part, net, as_classifier, share):
                        results.add(record)
        if expected and processes.first:
            rate = expected / (time.monotonic() - started)
            print(f"evaluate: {expected} images, {rate:.1f} images/s", file=sys.stderr)
        return [results.take(task.record) for task in tasks]


class _Task(NamedTuple):
    """One measurement: a candidate, a set, and the record without its scores."""

    candidate: Candidate
    dataset: EvaluationSet
    record: EvalRecord


def _sets_of(tasks: Sequence[_Task]) -> list[EvaluationSet]:
    return list({task.dataset.name: task.dataset for task in tasks}.values())


def _measured(
    tasks: Sequence[_Task],
    model: torch.nn.Module,
    as_classifier: Callable[[torch.nn.Module, Head | None], Classifier],
    share: Mapping[str, Any],
) -> Iterator[EvalRecord]:
    """Yields the records of tasks whose models are in memory together, set by set; `share` is how to read images."""
    candidates = list(dict.fromkeys(task.candidate for task in tasks))
    loaded = {candidate: as_classifier(*each) for candidate, each in _load_all(candidates, model)}

    def prepare(dataset: EvaluationSet) -> Callable[[torch.Tensor, torch.Tensor], list[Predictions]]:
        here = [loaded[task.candidate] for task in tasks if task.dataset is dataset]
        weights = [classifier.weights(dataset) for classifier in here]
        return lambda images, target: [
            c.predict(images, target, w) for c, w in zip(here, weights, strict=True)
        ]

    for dataset, parts in batches.shared(_sets_of(tasks), prepare, **share):
        here = [task for task in tasks if task.dataset is dataset]
        for task, answers in zip(here, zip(*parts, strict=True), strict=True):
            found = joined(answers)
            yield {
                **task.record,
                "metrics": measure(found, len(dataset.classnames)),
                "classifier": "head" if loaded[task.candidate].uses_head(dataset) else "zero-shot",
                "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
                "right": packed((found.target == found.predicted).numpy()),
            }


def _load_all(
    candidates: Sequence[Candidate], model: torch.nn.Module
) -> Iterator[tuple[Candidate, tuple[torch.nn.Module, Head | None]]]:
    """A model per candidate; the last one takes the given model's own memory."""
    for candidate in candidates:
        own = model if candidate is candidates[-1] else copy.deepcopy(model)
        yield candidate, (own, candidate.load(own))


def _how_many_fit(model: torch.nn.Module, device: torch.device, processes: int) -> int:
    """How many copies of a model fit in half of the memory that is free, at least one."""
    import torch

    size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _free_memory() // processes
    return max(1, int(free / 2 / max(size, 1)))


def _free_memory() -> int:
    """Bytes of main memory that can be had without swapping."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # no Linux
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


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
    file = candidate.checkpoint is not None
    found: EvalRecord = {
        "checkpoint": candidate.title if file else candidate.name or model,
        "digest": candidate.digest() if file else weights_digest(own[0]),
        "original": candidate.original_name or (str(candidate.original) if candidate.original else None),
        "original_digest": known_digest(candidate.original),
        "alpha": candidate.alpha,
        "pretrained": None if file else pretrained,
    }
    if candidate.merge:
        found |= {"merge": str(candidate.merge), "runs": list(map(str, candidate.runs))}
    return found


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
