"""What came of a fit: the mixture of start and fine-tuned model that validation data choose, and what it has kept.

Along the line from the starting weights to the fine-tuned ones (WiSE-FT), own classes are measured on validation data,
and what is kept by `arf_plugin.fit.kept` and on the sets to keep. The alpha with the highest sum of both, each as a
difference to *before* in points, is taken; with a bound on what may be lost, the best of those within it. Test images
are measured at the end and choose nothing.
"""

from __future__ import annotations

import json
import shutil
import statistics
from pathlib import Path
from typing import Any, Protocol

from arf_plugin.console import text_table
from arf_plugin.errors import FitError
from arf_plugin.files import replacing, write_json
from arf_plugin.fit.settings import FitSettings

WORDS = {"ahead": "better", "behind": "worse", "level": "no difference that images this few can show"}
FEWEST = 20  # pairs of the pool that retrieval is measured on
ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)


class Fit(Protocol):
    """What is read of a fit: its settings, its folders, and the checkpoints of its runs."""

    settings: FitSettings
    out: Path

    @property
    def task(self) -> Path:
        """Folder of task data."""
        ...

    @property
    def anchors(self) -> Path | None:
        """The anchor set, or None."""
        ...

    @property
    def pool(self) -> str:
        """The pool's tars."""
        ...

    @property
    def has_pairs(self) -> bool:
        """Whether there is a pool."""
        ...

    def say(self, line: str, /) -> object:
        """Tells the user a line."""
        ...

    def finished(self, name: str) -> Path | None:
        """The last checkpoint of a run, or None."""
        ...


def measure(fit: Fit, arms: list[str]) -> dict[str, Any]:
    """Measures, chooses, writes ``best/`` and ``best.pt``.

    Args:
        fit: The fit, its runs finished.
        arms: Names of what was trained; the first is the one that is chosen from.

    Returns:
        What ``results.json`` holds.
    """
    import torch

    from arf_plugin.anchors.task import expand_urls
    from arf_plugin.evaluation.candidates import Candidate, build, find_original
    from arf_plugin.evaluation.run import evaluate
    from arf_plugin.evaluation.sets import find_sets
    from arf_plugin.fit.kept import KeptPairs, scores, set_aside
    from arf_plugin.pipeline.execution import pick_device

    settings, architecture = fit.settings, fit.settings.architecture
    original = _original(fit, find_original)
    (val,) = find_sets(fit.task / "val")
    kept_sets = [found for folder in settings.keep for found in find_sets(Path(folder))]
    tests = find_sets(fit.task / "test") if (fit.task / "test").is_dir() else []
    runs = {name: [_finished(fit, f"{name}-{seed}") for seed in range(settings.seeds)] for name in arms}
    mixtures = {
        (name, seed, alpha): Candidate(path, original, alpha)
        for name, some in runs.items()
        for seed, path in enumerate(some)
        for alpha in ALPHAS
    }
    records = evaluate(
        list(mixtures.values()),
        architecture,
        _named(val, kept_sets),
        out=fit.out / "records.jsonl",
        device=settings.device,
    )
    own = {(r["checkpoint"], r["alpha"], r["set"]): r["metrics"]["top1"] for r in records}

    pairs: dict[str, dict[str, float]] = {}
    if fit.has_pairs:
        tar = fit.out / "kept.tar"
        if not tar.is_file():
            set_aside(expand_urls(fit.pool), str(fit.anchors) if fit.anchors else None, tar)
        device = pick_device(settings.device, 0)
        model, preprocess, tokenizer = build(architecture, None, device)
        known = KeptPairs(tar, preprocess, tokenizer)
        start = None
        enough = len(known.pairs) >= FEWEST
        if not enough:
            fit.say(
                f"        {len(known.pairs)} pairs of the pool are no anchors: too few to measure what is kept"
            )
        for key, candidate in sorted(mixtures.items(), key=lambda item: item[0][2]) if enough else ():
            if key[2] == 0.0 and start is not None:
                pairs[_name(*key)] = pairs[_name(arms[0], 0, 0.0)]
                continue
            candidate.load(model)
            features = known.features(model.eval(), torch.device(device))
            start = start or features
            pairs[_name(*key)] = scores(features, start)
        del model

    points = {
        key: _points(key, mixtures[key], own, val.name, [s.name for s in kept_sets], pairs)
        for key in mixtures
    }
    chosen = {name: _choose(points, name, settings.seeds, settings.max_forget) for name in arms}
    best_arm = arms[0]
    best_seed = max(range(settings.seeds), key=lambda seed: points[best_arm, seed, chosen[best_arm]]["own"])
    _write_best(fit, mixtures[best_arm, best_seed, chosen[best_arm]])
    rows = {"before": _mean([points[best_arm, 0, 0.0]])}
    for name in arms:
        for title, alpha in ((name, 1.0), (f"{name}, alpha {chosen[name]:g}", chosen[name])):
            rows[title] = _mean([points[name, seed, alpha] for seed in range(settings.seeds)])
    measured = list(records)
    if tests:
        shown = {"before": [mixtures[best_arm, 0, 0.0]]}
        for name in arms:
            for title, alpha in ((name, 1.0), (f"{name}, alpha {chosen[name]:g}", chosen[name])):
                shown[title] = [mixtures[name, seed, alpha] for seed in range(settings.seeds)]
        for title, some in shown.items():
            found = evaluate(
                some, architecture, tests, out=fit.out / "test-records.jsonl", device=settings.device
            )
            measured += found
            rows[title]["test"] = statistics.fmean(record["metrics"]["top1"] for record in found)
    forgot = rows["before"]["kept"] - rows[f"{best_arm}, alpha {chosen[best_arm]:g}"]["kept"]
    return {
        "rows": rows,
        "verdicts": {
            name: _verdicts(measured, [mixtures[name, seed, chosen[name]] for seed in range(settings.seeds)])
            for name in arms
        },
        "alpha": chosen[best_arm],
        "best": f"{best_arm}-{best_seed}",
        "forgot": None if forgot != forgot else forgot,
        "images": {"val": val.images, **{one.name: one.images for one in (*kept_sets, *tests)}},
        "seeds": settings.seeds,
        "retrieval": pairs,
    }


def table(found: dict[str, Any]) -> str:
    """The end of a fit for the console: before, fine-tuned, chosen; with differences to before."""
    rows = found["rows"]
    columns = [
        name for name in rows["before"] if name != "kept" and rows["before"][name] == rows["before"][name]
    ]
    before = rows["before"]
    lines = [
        [
            title,
            *(
                f"{row[c]:.3f}" if c == "cka" else _cell(row[c], before[c], title == "before")
                for c in columns
            ),
        ]
        for title, row in rows.items()
    ]
    return text_table(["percent (difference)", *columns], lines)


def _verdicts(records: list[dict[str, Any]], chosen: list[Any]) -> dict[str, Any]:
    """The chosen mixtures of an arm against the model before, by image; see :mod:`arf_plugin.evaluation.verdicts`."""
    from arf_plugin.evaluation.verdicts import compare, single

    def of(candidate: Any, alpha: float) -> dict[str, dict[str, Any]]:
        return {
            r["set"]: r
            for r in records
            if (r["checkpoint"], r["alpha"]) == (str(candidate.checkpoint), alpha)
        }

    before = {None: of(chosen[0], 0.0)}
    found = compare(
        {seed: of(one, one.alpha) for seed, one in enumerate(chosen)}, before, single(before[None])
    )
    return {name: verdict.as_json() for name, verdict in found.verdicts.items()}


def verdict(found: dict[str, Any]) -> str:
    """What a layperson understands: a sentence, and whether each difference is more than chance."""
    lines = [_sentence(found)]
    for name, one in next(iter(found["verdicts"].values())).items():
        low, high = one["interval95"]
        lines.append(
            f"  {name}: {one['difference']:+.1f} points, 95 % interval {low:+.1f} to {high:+.1f}, "
            f"p = {one['corrected']:.2g} ({one['images']} images): {WORDS[one['verdict']]}"
        )
    return "\n".join(lines)


def _sentence(found: dict[str, Any]) -> str:
    before, best = found["rows"]["before"], list(found["rows"].values())[2]
    gained = best["own"] - before["own"]
    text = f"On your own classes the model went from {before['own']:.1f} to {best['own']:.1f} % ({gained:+.1f} points)."
    if found["forgot"] is None:
        return f"{text} What it has forgotten was not measured: that takes --keep, or more pairs."
    forgot = found["forgot"]
    if forgot <= 0.05:
        return f"{text} It forgot nothing that was measured ({-forgot:+.1f} points)."
    return f"{text} Of what it could do before it lost {forgot:.1f} points."


def _cell(value: float, before: float, first: bool) -> str:
    return f"{value:.1f}" if first else f"{value:.1f} ({value - before:+.1f})"


def _named(val: Any, kept: list[Any]) -> list[Any]:
    names = [one.name for one in kept]
    if val.name in names or len(set(names)) < len(names):
        raise FitError(
            f"Two sets have the same name ({', '.join([val.name, *names])}). Rename a folder of --keep."
        )
    return [val, *kept]


def _original(fit: Fit, find_original: Any) -> Path:
    """The starting weights as a file."""
    model = fit.settings.model
    if model.startswith("local-dir:"):
        folder = Path(model.removeprefix("local-dir:"))
        for name in ("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "model.safetensors"):
            if (folder / name).is_file():
                return folder / name
        raise FitError(f"{folder} holds no weights of its own (open_clip_model.safetensors).")
    found: Path = find_original(model)
    return found


def _finished(fit: Fit, name: str) -> Path:
    path = fit.finished(name)
    if path is None:
        raise FitError(f"The run {name} has not come to its end. Run the same command again.")
    return path


def _name(arm: str, seed: int, alpha: float) -> str:
    return f"{arm}-{seed}@{alpha:g}"


def _points(
    key: tuple[str, int, float], candidate: Any, own: dict[Any, float], val: str, kept: list[str],
    pairs: dict[str, dict[str, float]],
) -> dict[str, float]:  # fmt: skip
    name = str(candidate.checkpoint)
    found = {"own": own[name, candidate.alpha, val]}
    retrieval = pairs.get(_name(*key))
    abilities = []
    if retrieval is not None:
        found |= retrieval
        abilities.append(retrieval["r@1"])
    for one in kept:
        found[one] = own[name, candidate.alpha, one]
        abilities.append(found[one])
    found["kept"] = statistics.fmean(abilities) if abilities else float("nan")
    return found


def _mean(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.fmean(row[name] for row in rows) for name in rows[0]}


def _choose(points: dict[Any, dict[str, float]], arm: str, seeds: int, most: float | None) -> float:
    """The alpha of an arm; of equal ones the one nearer 0.5, as WiSE-FT's authors advise, then the smaller."""
    means = {alpha: _mean([points[arm, seed, alpha] for seed in range(seeds)]) for alpha in ALPHAS}
    before = means[0.0]
    within = [a for a in ALPHAS if most is None or not means[a]["kept"] < before["kept"] - most]

    def worth(alpha: float) -> tuple[float, float, float]:
        kept = means[alpha]["kept"] - before["kept"]
        return round(means[alpha]["own"] + (kept if kept == kept else 0.0), 9), -abs(alpha - 0.5), -alpha

    return max(within, key=worth)


def _write_best(fit: Fit, candidate: Any) -> None:
    """Writes ``best.pt``, and ``best/`` in open_clip's ``local-dir:`` layout."""
    import open_clip
    from safetensors.torch import save_file

    from arf_plugin.evaluation.checkpoints import open_checkpoint
    from arf_plugin.evaluation.interpolation import interpolate_files

    interpolate_files(candidate.original, candidate.checkpoint, candidate.alpha, fit.out / "best.pt")
    folder, model = fit.out / "best", fit.settings.architecture
    folder.mkdir(exist_ok=True)
    weights = {
        name: tensor.contiguous() for name, tensor in open_checkpoint(fit.out / "best.pt").weights.items()
    }
    with replacing(folder / "open_clip_model.safetensors") as temporary:
        save_file(weights, str(temporary))
    if model.startswith("local-dir:"):
        shutil.copyfile(
            Path(model.removeprefix("local-dir:")) / "open_clip_config.json", folder / "open_clip_config.json"
        )
        return
    from open_clip.pretrained import get_pretrained_cfg

    _, at, tag = fit.settings.model.rpartition("@")
    known = get_pretrained_cfg(model, tag) if at else {}
    cfg = {name: known[name] for name in ("mean", "std", "interpolation", "resize_mode") if known.get(name)}
    write_json(
        folder / "open_clip_config.json",
        {"model_cfg": open_clip.get_model_config(model), "preprocess_cfg": cfg},
    )


def as_json(found: dict[str, Any]) -> str:
    """The results for machines."""
    return json.dumps(found, indent=2, ensure_ascii=False)
