"""Did it forget? What a report says first, in words that need no statistics, and what to do if it did.

The model that is answered for is the subject's: mixed with the starting weights at the alpha that validation chose, or
as fine-tuned where nothing was chosen. It is compared with the model before, on own classes (averages of kind ``id``)
and on what it could do before: the mean of all others that are not by class.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from arf_plugin.report.scores import Averages, Difference, Key, Results, Score, signed
from arf_plugin.report.sources import Collected
from arf_plugin.report.tables import measured_key

PARTS = {"own": "your own classes", "kept": "what it could do before"}
CHANCE = {
    "ahead": "more than chance",
    "ahead here": "sure of these images alone",
    "level": "which may be chance",
    "behind here": "sure of these images alone",
    "behind": "more than chance",
}
_MIX = "Mixing its weights with those of the start costs no training and brings much back."


class Row(NamedTuple):
    """A model beside the one before: scores and differences by part; there is none for the model before itself."""

    arm: str
    alpha: float | None
    scores: Mapping[str, Score]
    less: Mapping[str, Difference]


@dataclass
class Answer:
    """Whether it forgot.

    Attributes:
        word: ``no``, ``yes``, ``perhaps`` or ``unknown``.
        headline, sentence, advice, command: For the reader; empty where there is nothing to say.
        names: Averages by part.
        rows: The model before first.
    """

    word: str
    headline: str
    sentence: str = ""
    advice: str = ""
    command: str = ""
    names: dict[str, list[str]] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)

    def texts(self) -> list[str]:
        """All of it, for a console."""
        return list(filter(None, (self.headline, self.sentence, self.advice, self.command)))


def find_answer(found: Collected, results: Results, chosen: Mapping[str, float]) -> Answer:
    """Answers from what was measured; `chosen` has the alpha that validation chose, by arm."""
    before, subject = (found.before or "", None), found.subject
    if subject is None or before not in results.by_run or (subject, None) not in results.by_run:
        return Answer(
            "unknown",
            "Did it forget? That has not been measured.",
            "To know, the model has to be measured before and after fine-tuning, on images of your own classes and on "
            "others. This does it; then give results.jsonl to arf report, too:",
            command=_sweep(found, subject),
        )
    by_key = results.by_average()
    names = {"own": results.averages.of_kind("id"), "kept": _kept(results.averages, by_key[before])}
    names = {part: [name for name in of if name in by_key[before]] for part, of in names.items()}
    start = {part: score for part, of in names.items() if (score := results.mean(before, of))}
    answer = Answer("unknown", "", names=names, rows=[Row(before[0], None, start, {})])
    for arm in dict.fromkeys((subject, found.baseline or subject)):
        keys = (measured_key(by_key, arm, alpha) for alpha in (None, chosen.get(arm)))
        answer.rows += [_row(results, key, before, names) for key in dict.fromkeys(keys) if key in by_key]
    _say(answer, found, results, [row for row in answer.rows if row.arm == subject][-1])
    if chosen.get(subject) == 0:
        answer.word, answer.advice, answer.command = "perhaps", "", ""
        answer.headline = (
            "It forgot nothing and learned nothing: validation chose the starting weights (α = 0)."
        )
    return answer


def _kept(averages: Averages, measured: Mapping[str, Score]) -> list[str]:
    """What may have been forgotten; of averages that share sets, the larger alone."""
    names = [name for name in averages.main if name in measured and averages.known[name].kind != "id"]
    sets = {name: set(averages.sets(name)) for name in names}
    return [name for name in names if not any(sets[name] < other for other in sets.values())]


def _row(results: Results, key: Key, before: Key, names: Mapping[str, list[str]]) -> Row:
    pairs = {part: pair for part, of in names.items() if (pair := results.together(key, before, of))}
    less = {part: less for part, (_, less) in pairs.items()}
    return Row(*key, {part: score for part, (score, _) in pairs.items()}, less)


def _say(answer: Answer, found: Collected, results: Results, row: Row) -> None:
    before, label = answer.rows[0], found.arms[row.arm].label
    said = [
        f"on {PARTS[part]} it went from {before.scores[part].mean:.1f} to {row.scores[part].mean:.1f} % "
        f"({f'{signed(less.mean)} points, {CHANCE[less.verdict]}' if abs(less.mean) >= 0.05 else 'no change'})"
        for part, less in row.less.items()
    ]
    how = "as fine-tuned" if row.alpha is None else f"mixed with the starting weights at α = {row.alpha:g}"
    said += [] if "own" in row.less else ["your own classes have not been measured"]
    answer.sentence = f"The model is {label}, {how}: {'; '.join(said)}."
    kept = row.less.get("kept")
    if kept is None:
        answer.headline = "Did it forget? Only your own classes have been measured."
        answer.advice = (
            "Measure sets of other classes, before and after, and give their results to arf report, too:"
        )
        answer.command = _sweep(found, row.arm)
        return
    verdicts = results.verdicts((row.arm, row.alpha), (before.arm, None))
    pairs = {
        name: results.together((row.arm, row.alpha), (before.arm, None), [name])
        for name in answer.names["kept"]
    }
    # By image where that can be, else over seeds.
    by_image = {name: verdicts[name] for name in pairs if name in verdicts}
    over_seeds = {name: pair[1] for name, pair in pairs.items() if name not in verdicts and pair is not None}
    lost = {name: verdict.difference for name, verdict in by_image.items() if verdict.word == "behind"}
    lost |= {name: less.mean for name, less in over_seeds.items() if less.verdict == "behind"}
    here = {name: less.mean for name, less in over_seeds.items() if less.verdict == "behind here"}
    fell = f"what it could do before fell by {-kept.mean:.1f} points"
    if kept.verdict == "behind":
        answer.word, answer.headline = "yes", f"It forgot: {fell}."
    elif lost:
        answer.word, answer.headline = "yes", f"It forgot in part: {_named(lost)}."
    elif kept.verdict == "behind here":
        answer.word, answer.headline = "yes", f"It seems to have forgotten: {fell} on these images."
    elif here:
        answer.word = "yes"
        answer.headline = f"It seems to have forgotten in part: {_named(here)} on these images."
    elif kept.mean <= -0.05:
        answer.word, answer.headline = "perhaps", f"No sure sign of forgetting: {fell}, which may be chance."
    else:
        answer.word, answer.headline = (
            "no",
            f"It forgot nothing that was measured ({signed(kept.mean)} points).",
        )
    if answer.word == "yes":
        _advise(answer, found, results, row)


def _named(lost: Mapping[str, float]) -> str:
    return ", ".join(f"{name} fell by {-less:.1f} points" for name, less in list(lost.items())[:3])


def _advise(answer: Answer, found: Collected, results: Results, row: Row) -> None:
    """Which alpha, and which command: of mixtures that kept it the best on own classes, or what kept most."""
    keys = [key for key in results.by_run if key[0] == row.arm and key[1] not in (None, row.alpha)]
    mixed = [_row(results, key, (answer.rows[0].arm, None), answer.names) for key in keys]
    better = [one for one in mixed if "kept" in one.less and one.less["kept"].mean > row.less["kept"].mean]
    if not mixed:
        answer.advice = f"{_MIX} This measures how far to go (α = 0.5 is WiSE-FT's advice without measuring):"
        answer.command = _sweep(found, row.arm)
    elif not better:
        anchored = any(run.flag("--arf-anchors") for run in found.runs if run.arm == row.arm)
        what = "a larger --arf-pair-weight" if anchored else "--arf-anchors"
        answer.advice = (
            f"No measured mixture kept more. Train again with {what}, a lower --lr or fewer --epochs."
        )
    else:

        def worth(one: Row) -> tuple[bool, float]:
            held = not one.less["kept"].verdict.startswith("behind")
            return held, one.less["own" if held and "own" in one.less else "kept"].mean

        best = max(better, key=worth)
        told = " and ".join(
            f"{signed(less.mean)} points on {PARTS[part]}" for part, less in best.less.items()
        )
        answer.advice = (
            f"{_MIX} At α = {best.alpha:g} it has {told}; let validation data confirm that. This writes it:"
        )
        words = [
            "arf",
            "interpolate",
            *_ends(found, row.arm),
            "--alpha",
            f"{best.alpha:g}",
            "--out",
            "wise.pt",
        ]
        answer.command = shlex.join(words)


def _ends(found: Collected, arm: str | None) -> list[str]:
    """The starting weights and a fine-tuned checkpoint, as ``arf interpolate`` takes them."""
    records = [one.record for one in found.test if one.arm == arm]
    runs = [run for run in found.runs if run.arm == arm]
    original = next((str(record["original"]) for record in records if record.get("original")), None)
    if original is None and runs:
        model, tag = runs[0].flag("--model") or "", runs[0].flag("--pretrained")
        folder = model.removeprefix("local-dir:")
        local = f"{folder}/open_clip_model.safetensors" if folder != model else None
        original = local or (tag if tag and Path(tag).is_file() else f"{model}@{tag}" if tag else None)
    tuned = [str(record["checkpoint"]) for record in records]
    tuned += [str(path) for run in runs for path in run.folder.glob("checkpoints/epoch_*.pt")]
    return [original or "ORIGINAL", next(iter(tuned), "TUNED")]


def _sweep(found: Collected, arm: str | None) -> str:
    flags = [run.flag("--model") for run in found.runs if run.arm == arm]
    models = [one.record.get("model") for one in found.test] + flags
    model = next((str(name) for name in models if name), "MODEL")
    words = [
        "arf",
        "interpolate",
        *_ends(found, arm),
        "--alphas",
        "0",
        "0.25",
        "0.5",
        "0.75",
        "1",
        "--model",
        model,
    ]
    return shlex.join([*words, "--data", "task/val", "HELD-OUT", "--results", "results.jsonl"])
