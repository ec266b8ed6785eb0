"""What came of a fit: the mixture of start and fine-tuned model that validation data choose, and what it has kept.

Along the line from the starting weights to the fine-tuned ones (WiSE-FT), own classes are measured on validation data,
and what is kept by `arf_plugin.fitting.kept` and on the sets to keep. The alpha with the highest sum of both, each as a
difference to *before* in points, is taken; with a bound on what may be lost, the best of those within it. Test images
are measured at the end and choose nothing.
"""

from __future__ import annotations

import functools
import json
import math
import shutil
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arf_plugin.console import text_table
from arf_plugin.errors import FitError
from arf_plugin.files import replacing, write_json
from arf_plugin.fitting.settings import FitSettings

if TYPE_CHECKING:
    from arf_plugin.anchors.pairs import RawPair
    from arf_plugin.evaluation.candidates import Candidate

WORDS = {"ahead": "better", "behind": "worse", "level": "no difference that images this few can show"}
ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)

Key = tuple[str, int, float]  # arm, seed, alpha
Scores = dict[str, float]


def measure(
    settings: FitSettings, runs: Mapping[str, Sequence[Path]], pairs: Sequence[RawPair]
) -> dict[str, Any]:
    """Measures, chooses, writes ``best/`` and ``best.pt``.

    Args:
        settings: Of the fit, whose runs are finished.
        runs: Checkpoints by arm, one per seed; the first arm is the one that is chosen from.
        pairs: What retrieval is measured on; none, if it is not.

    Returns:
        What ``results.json`` holds.
    """
    from arf_plugin.evaluation.candidates import Candidate
    from arf_plugin.evaluation.run import evaluate
    from arf_plugin.evaluation.sets import find_sets

    out, seeds = Path(settings.out), range(settings.seeds)
    original = _original(settings.model)
    (val,) = find_sets(out / "task" / "val")
    kept = [found for folder in settings.keep for found in find_sets(Path(folder))]
    tests = find_sets(out / "task" / "test") if (out / "task" / "test").is_dir() else []
    names = [one.name for one in (val, *kept)]
    if len(set(names)) < len(names):
        raise FitError(f"Two sets have the same name ({', '.join(names)}). Rename a folder of --keep.")
    mixtures = {
        (arm, seed, alpha): Candidate(path, original, alpha)
        for arm, paths in runs.items()
        for seed, path in enumerate(paths)
        for alpha in ALPHAS
    }
    measured = functools.partial(evaluate, model=settings.architecture, device=settings.device)
    records: list[Any] = measured(list(mixtures.values()), sets=[val, *kept], out=out / "records.jsonl")
    top1 = {(r["checkpoint"], r["alpha"], r["set"]): r["metrics"]["top1"] for r in records}
    retrieval = _retrieval(settings, mixtures, pairs) if pairs else {}
    with replacing(out / "retrieval.jsonl") as temporary, temporary.open("w", encoding="utf-8") as lines:
        of_val = {(r["checkpoint"], r["alpha"]): r for r in records if r["set"] == val.name}
        other = {"set": "image-text retrieval", "headline": "r@1", "images": len(pairs), "right": None}
        for key, mixture in mixtures.items() if pairs else ():  # for the report, as records
            same = of_val[str(mixture.checkpoint), mixture.alpha]
            lines.write(json.dumps({**same, **other, "metrics": retrieval[_name(key)]}) + "\n")
    points: dict[Key, Scores] = {}
    for key, mixture in mixtures.items():
        own, *abilities = (top1[str(mixture.checkpoint), mixture.alpha, name] for name in names)
        found = retrieval.get(_name(key), {})
        may_be_lost = [*abilities, found["r@1"]] if found else abilities
        mean = statistics.fmean(may_be_lost) if may_be_lost else math.nan
        points[key] = {"own": own, **found, **dict(zip(names[1:], abilities, strict=True)), "kept": mean}

    chosen = {arm: _choose(points, arm, settings) for arm in runs}
    first = next(iter(runs))
    best_seed = max(seeds, key=lambda seed: points[first, seed, chosen[first]]["own"])
    _write_best(settings, mixtures[first, best_seed, chosen[first]])
    shown: dict[str, list[Key]] = {"before": [(first, 0, 0.0)]}
    for arm, alpha in chosen.items():
        shown[arm] = [(arm, seed, 1.0) for seed in seeds]
        shown[f"{arm}, alpha {alpha:g}"] = [(arm, seed, alpha) for seed in seeds]
    rows = {title: _mean(points[key] for key in keys) for title, keys in shown.items()}
    for title, keys in shown.items() if tests else ():
        of_tests = measured([mixtures[key] for key in keys], sets=tests, out=out / "test-records.jsonl")
        records += of_tests
        rows[title]["test"] = statistics.fmean(record["metrics"]["top1"] for record in of_tests)
    forgot = rows["before"]["kept"] - rows[f"{first}, alpha {chosen[first]:g}"]["kept"]
    return {
        "rows": rows,
        "verdicts": {
            arm: _verdicts(records, [mixtures[arm, seed, alpha] for seed in seeds])
            for arm, alpha in chosen.items()
        },
        "alpha": chosen[first],
        "alphas": chosen,
        "best": f"{first}-{best_seed}",
        "forgot": None if math.isnan(forgot) else forgot,
        "images": {"val": val.images, **{one.name: one.images for one in (*kept, *tests)}},
        "seeds": settings.seeds,
        "retrieval": retrieval,
    }


def _retrieval(
    settings: FitSettings, mixtures: Mapping[Key, Candidate], pairs: Sequence[RawPair]
) -> dict[str, Scores]:
    """Scores of every mixture on pairs of the pool that no anchor uses."""
    from arf_plugin.evaluation.candidates import build
    from arf_plugin.fitting.kept import features, scores
    from arf_plugin.pipeline.execution import pick_device

    model, preprocess, tokenizer = build(settings.architecture, None, pick_device(settings.device))
    found: dict[str, Scores] = {}
    start = None
    for key, mixture in sorted(mixtures.items(), key=lambda item: item[0][2]):
        if key[2] == 0.0 and start is not None:  # all start alike
            found[_name(key)] = next(iter(found.values()))
            continue
        mixture.load(model)
        its = features(model.eval(), pairs, preprocess, tokenizer)
        start = start or its
        found[_name(key)] = scores(its, start)
    return found


def table(found: dict[str, Any]) -> str:
    """The end of a fit for the console: before, fine-tuned, chosen; with differences to before."""
    before = found["rows"]["before"]

    def cell(title: str, row: Scores, column: str) -> str:
        if column == "cka":
            return f"{row[column]:.3f}"
        change = "" if title == "before" else f" ({row[column] - before[column]:+.1f})"
        return f"{row[column]:.1f}{change}"

    columns = [name for name in before if name != "kept" and not math.isnan(before[name])]
    lines = [
        [title, *(cell(title, row, column) for column in columns)] for title, row in found["rows"].items()
    ]
    return text_table(["percent (difference)", *columns], lines)


def verdict(found: dict[str, Any]) -> str:
    """What a layperson understands: a sentence, and whether each difference is more than chance."""
    arm, chosen_alpha = found["best"].rpartition("-")[0], found["alpha"]
    chosen = found["rows"][f"{arm}, alpha {chosen_alpha:g}"]
    before, best = found["rows"]["before"]["own"], chosen["own"]
    said = (
        f"On your own classes the model went from {before:.1f} to {best:.1f} % ({best - before:+.1f} points)."
    )
    forgot = found["forgot"]
    if forgot is None:
        said += " What it has forgotten was not measured: that takes --keep, or more pairs."
    elif forgot <= 0.05:
        abilities = [name for name in chosen if name not in ("own", "test", "cka", "r@5", "kept")]
        lost = {name: found["rows"]["before"][name] - chosen[name] for name in abilities}
        fell = " and ".join(f"{name} fell by {less:.1f}" for name, less in lost.items() if less > 0.05)
        said += f" On average it forgot nothing that was measured ({-forgot:+.1f} points)"
        said += f", but {fell}." if fell else "."
    else:
        said += f" Of what it could do before it lost {forgot:.1f} points."
    lines = [said]
    for name, one in found["verdicts"][arm].items():
        low, high = one["interval95"]
        lines.append(
            f"  {name}: {one['difference']:+.1f} points, 95 % interval {low:+.1f} to {high:+.1f}, "
            f"p = {one['corrected']:.2g} ({one['images']} images): {WORDS[one['verdict']]}"
        )
    return "\n".join(lines)


def _verdicts(records: list[dict[str, Any]], chosen: Sequence[Candidate]) -> dict[str, Any]:
    """The chosen mixtures of an arm against the model before, by image; see :mod:`arf_plugin.evaluation.verdicts`."""
    from arf_plugin.evaluation.verdicts import compare, single

    def of(candidate: Candidate, alpha: float | None) -> dict[str, dict[str, Any]]:
        wanted = (str(candidate.checkpoint), alpha)
        return {r["set"]: r for r in records if (r["checkpoint"], r["alpha"]) == wanted}

    before = of(chosen[0], 0.0)
    after = {seed: of(one, one.alpha) for seed, one in enumerate(chosen)}
    verdicts = compare(after, {None: before}, single(before)).verdicts
    return {name: verdict.as_json() for name, verdict in verdicts.items()}


def _original(model: str) -> Path:
    """The starting weights as a file."""
    from arf_plugin.evaluation.candidates import find_original

    folder = _own_folder(model)
    if folder is None:
        return find_original(model)
    for name in ("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "model.safetensors"):
        if (folder / name).is_file():
            return folder / name
    raise FitError(f"{folder} holds no weights of its own (open_clip_model.safetensors).")


def _own_folder(model: str) -> Path | None:
    """The folder with weights and configuration of a model that brings them along."""
    kind, _, name = model.partition(":")
    if kind == "hf-hub":  # where open_clip has put it
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, local_files_only=True))
    return Path(name) if kind == "local-dir" else None


def _name(key: Key) -> str:
    return f"{key[0]}-{key[1]}@{key[2]:g}"


def _mean(rows: Iterable[Scores]) -> Scores:
    rows = list(rows)
    return {name: statistics.fmean(row[name] for row in rows) for name in rows[0]}


def _choose(points: Mapping[Key, Scores], arm: str, settings: FitSettings) -> float:
    """The alpha of an arm; of equal ones the one nearer 0.5, as WiSE-FT's authors advise, then the smaller."""
    means = {a: _mean(points[arm, seed, a] for seed in range(settings.seeds)) for a in ALPHAS}
    before = means[0.0]["kept"]  # not a number where nothing is measured

    def worth(alpha: float) -> tuple[float, float, float]:
        kept = 0.0 if math.isnan(before) else means[alpha]["kept"] - before
        return round(means[alpha]["own"] + kept, 9), -abs(alpha - 0.5), -alpha

    least = before - (math.inf if settings.max_forget is None else settings.max_forget)
    return max((alpha for alpha in ALPHAS if not means[alpha]["kept"] < least), key=worth)


def _write_best(settings: FitSettings, mixture: Candidate) -> None:
    """Writes ``best.pt``, and ``best/`` in open_clip's ``local-dir:`` layout."""
    import open_clip
    from open_clip.pretrained import get_pretrained_cfg
    from safetensors.torch import save_file

    from arf_plugin.evaluation.checkpoints import open_checkpoint
    from arf_plugin.evaluation.merging import interpolate_files

    best, folder = Path(settings.out) / "best.pt", Path(settings.out) / "best"
    assert mixture.checkpoint is not None and mixture.original is not None and mixture.alpha is not None
    interpolate_files(mixture.original, mixture.checkpoint, mixture.alpha, best)
    folder.mkdir(exist_ok=True)
    weights = {name: tensor.contiguous() for name, tensor in open_checkpoint(best).weights.items()}
    with replacing(folder / "open_clip_model.safetensors") as temporary:
        save_file(weights, str(temporary))
    config = folder / "open_clip_config.json"
    if (brought := _own_folder(settings.model)) is not None:
        shutil.copyfile(brought / config.name, config)
        return
    architecture, (_, at, tag) = settings.architecture, settings.model.rpartition("@")
    known = get_pretrained_cfg(architecture, tag) if at else {}
    shown = {name: known[name] for name in ("mean", "std", "interpolation", "resize_mode") if known.get(name)}
    write_json(config, {"model_cfg": open_clip.get_model_config(architecture), "preprocess_cfg": shown})
