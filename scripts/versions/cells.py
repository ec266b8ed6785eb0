"""Runs cells of the table on one release, the one that this process sees: cells.py WORK FEATURE... (see matrix.py).

Each cell is the real trainer on a tiny model. It passes if the run ends well and its log shows every loss term. If it
ends with an error of ours, that is a refusal. If not, stock open_clip runs with the same flags of its own: when it ends
with the same error, open_clip is what is broken; anything else is a failure of ours. What a kind of cell compares
beside that is said by its function.
"""

from __future__ import annotations

import functools
import json
import math
import re
import shutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

import torch  # noqa: E402
from features import FEATURES, Feature  # noqa: E402
from support import data, environments, evaluation, reference, releases, resuming, steps, trainer  # noqa: E402


class Bench:
    """Inputs of the runs in a folder, made once for a release."""

    def __init__(self, folder: Path) -> None:
        import open_clip

        from arf_plugin.cli.main import main as arf
        from arf_plugin.evaluation.checkpoints import read_weights, write_weights
        from arf_plugin.evaluation.head import Head, names_digest

        self.folder = folder
        folder.mkdir(parents=True)
        self.configs = data.write_model_configs(folder / "configs")
        self.task = data.write_task(folder / "task", shards=4, per_shard=8)
        self.anchors = folder / "anchors"
        data.write_captions(self.anchors, {name: f"a caption of {name}" for name in self.task.ids})
        data.write_pairs(self.anchors, shards=4, per_shard=6)
        csv = data.write_csv_task(folder / "csv", 16)
        captions = {line.split("\t")[0]: "a caption" for line in csv.read_text().splitlines()[1:]}
        data.write_captions(folder / "csv_anchors", captions)
        (folder / "csv_anchors" / "pairs").symlink_to(self.anchors / "pairs")
        open_clip.add_model_config(self.configs)
        weights = folder / "weights.pt"
        torch.save(open_clip.create_model("tiny-vit").state_dict(), weights)
        shutil.copytree(self.anchors, folder / "featured")
        model = ("--model", "tiny-vit", "--pretrained", weights, "--workers", 0)
        if status := arf(list(map(str, ("features", folder / "featured", *model)))):
            raise RuntimeError(f"arf features ended with status {status}")
        classes = len(data.CLASSNAMES)
        head = Head(torch.randn(classes, 16), torch.randn(classes), names_digest(data.CLASSNAMES))
        write_weights(folder / "probe.pt", {**read_weights(weights), **head.tensors()}, "probe")
        self.files = {
            "anchors": self.anchors,
            "featured": folder / "featured",
            "task": self.task.urls,
            "classnames": self.task.classnames,
            "templates": self.task.templates,
            "csv": csv,
            "csv_anchors": folder / "csv_anchors",
            "weights": weights,
            "probe": folder / "probe.pt",
            "held_out": evaluation.write_set(folder / "held-out"),
        }
        self.train = trainer.Trainer(folder / "logs", self.configs, folder / "cache")

    def flags(self, words: tuple[str, ...]) -> list[str]:
        """Flags with the names of files filled in."""
        return [str(self.files[word[1:-1]]) if word.startswith("{") else word for word in words]

    def all_flags(self, feature: Feature, *, stock: bool = False) -> list[str]:
        """The command line of a feature, with ARF or as open_clip would have it."""
        flags = ["--train-data", self.task.urls, "--train-num-samples", "32", *self.flags(feature.flags)]
        return flags + ([] if stock else self.flags(feature.arf))

    def run(self, feature: Feature, *more: Any, name: str = "arf", stock: bool = False) -> trainer.Run:
        """Runs the trainer with a feature; a run of the same name goes on with ``--resume latest``."""
        flags, options = self.all_flags(feature, stock=stock), {"nproc": feature.nproc, "check": False}
        start = self.train if feature.kind == "literal" else functools.partial(self.train.forked, timeout=900)
        return start(*flags, *more, name=f"{feature.id}-{name}", **options)


RESUMED = ("--epochs", "2", "--resume", "latest")


def forked(bench: Bench, feature: Feature) -> dict[str, str]:
    """A run with ARF, and one without where that fails."""
    run = bench.run(feature)
    return _judge(run, feature) if run.status == 0 else _blame(bench, feature, run)


literal = forked


def resumed(bench: Bench, feature: Feature) -> dict[str, str]:
    """A run that goes on after its first epoch."""
    for more in ((), RESUMED):
        run = bench.run(feature, *more)
        if run.status:
            return _blame(bench, feature, run, more)
    return _judge(run, feature)


def deterministic(bench: Bench, feature: Feature) -> dict[str, str]:
    """Two runs that end the same to the bit."""
    runs = [bench.run(feature, "--epochs", "2", name=name) for name in ("first", "second")]
    return _same_end(bench, feature, *runs)


def killed(bench: Bench, feature: Feature) -> dict[str, str]:
    """A run that is killed in the middle of each epoch and resumed, and one left alone: the same to the bit."""
    calm = bench.run(feature, "--epochs", "2", name="calm")
    if calm.status:
        return _blame(bench, feature, calm, RESUMED)
    flags = [*bench.all_flags(feature), "--epochs", "2", "--arf-checkpoint-every", "1"]
    again = resuming.run_with_kills(bench.train, flags, [0.25, 1.25], name=f"{feature.id}-arf", check=False)
    return _same_end(bench, feature, calm, again)


def stopped(bench: Bench, feature: Feature) -> dict[str, str]:
    """A run that is asked to stop before its first step and resumed, and one left alone: the same to the bit."""
    calm, file = bench.run(feature, "--epochs", "2", name="calm"), bench.folder / "stop"
    if calm.status:
        return _blame(bench, feature, calm, RESUMED)
    file.touch()
    flags = (*RESUMED, "--arf-stop-file", file)
    run = bench.run(feature, *flags)
    if run.status or "asked to stop; step 1 is saved" not in run.output or file.exists():
        return {"status": "failed", "detail": f"did not stop: {_last_error(run)}"}
    return _same_end(bench, feature, calm, bench.run(feature, *flags))


def watched(bench: Bench, feature: Feature) -> dict[str, str]:
    """A run that measures before training and after the epoch, and writes and logs both."""
    run = bench.run(feature)
    if run.status:
        return _blame(bench, feature, run)
    lines = (run.folder / "arf_watch.jsonl").read_text().splitlines()
    found = [(row["epoch"], bool(row["drift"])) for row in map(json.loads, lines)]
    if found != [(epoch, "--arf-watch-drift" in feature.arf) for epoch in (0, 1)]:
        return {"status": "failed", "detail": f"arf_watch.jsonl has {found}"}
    if not all(f"ARF watch: {when}: held-out" in run.output for when in ("before training", "after epoch 1")):
        return {"status": "failed", "detail": "the log has no line of it"}
    return _judge(run, feature)


def _same_end(bench: Bench, feature: Feature, *runs: trainer.Run) -> dict[str, str]:
    for run in runs:
        if run.status:
            return _blame(bench, feature, run, RESUMED)
    resuming.assert_same_end(*runs, epochs=2)
    return _judge(runs[0], feature)


def _blame(bench: Bench, feature: Feature, run: trainer.Run, more: tuple[str, ...] = ()) -> dict[str, str]:
    """Why a run failed: it was refused, or stock open_clip fails in the same way, or the fault is ours."""
    refusal = re.search(r"arf-plugin: error: (.*)", run.output)
    if refusal:
        return {"status": "refused", "detail": refusal[1]}
    stock = bench.run(feature, name="stock", stock=True)
    if more and stock.status == 0:
        stock = bench.run(feature, *more, name="stock", stock=True)
    errors = _last_error(run), _last_error(stock)
    if stock.status != 0 and errors[0] == errors[1]:
        return {"status": "upstream broken", "detail": errors[1]}
    return {"status": "failed", "detail": f"{errors[0]} (stock: {errors[1] if stock.status else 'passed'})"}


def identity(bench: Bench, feature: Feature) -> dict[str, str]:
    """A run without flags where the plugin is installed, and where it is not: bit-equal weights."""
    without = environments.make_environment(bench.folder / "env")
    flags = ("--train-data", bench.files["csv"])
    runs = [
        bench.train(*flags, name=name, python=str(python), check=False)
        for name, python in (("with", sys.executable), ("without", without))
    ]
    if any(run.status for run in runs):
        return {"status": "failed", "detail": " / ".join(map(_last_error, runs))}
    first, second = (run.checkpoint["state_dict"] for run in runs)
    same = first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    return {"status": "passed"} if same else {"status": "failed", "detail": "weights differ"}


def equivalence(bench: Bench, feature: Feature) -> dict[str, str]:
    """One step's gradients against three passes of that release's own trainer: both losses, accumulation, processes."""
    worst = 0.0
    for case, (run, record) in steps.run(steps.FEW_CASES, bench.folder / "steps", bench.configs).items():
        if run.status:
            return {"status": "failed", "detail": f"{case}: {_last_error(run)}"}
        terms = torch.load(f"{record}.reference", weights_only=True)
        worst = max(worst, reference.relative_error(str(record), terms))
    verdict = "passed" if worst <= steps.BOUND else "failed"
    return {
        "status": verdict,
        "detail": f"largest relative error {worst:.1e} in {len(steps.FEW_CASES)} cases",
    }


def _judge(run: trainer.Run, feature: Feature) -> dict[str, str]:
    for term in feature.terms:
        values = trainer.logged(run, term)
        if not values or not all(map(math.isfinite, values)) or not max(values) > 0:
            return {"status": "failed", "detail": f"the log has {values or 'nothing'} for {term}"}
    return {"status": "passed"}


def _last_error(run: trainer.Run) -> str:
    """The last line of an output that names an error, without what differs from run to run."""
    output = re.sub(r"\x1b\[\d*m", "", run.output)
    error = r"^\s*(?:\[rank\d\]: )?((?:[\w.]*(?:Error|Exception|Unsupported)\b|[\w.]+:? error\b).*)"
    found = re.findall(error, output, re.M)
    line = found[-1] if found else (output.strip().splitlines() or ["no output"])[-1]
    line = re.sub(r"\. Did you mean '[^']*'\?$", "", line)  # our parser's hint, which stock has not
    return re.sub(r"^[\w.]+: error", "error", line)[:200].strip()


def main() -> None:
    bench = Bench(Path(sys.argv[1]))
    known: dict[str, Any] = {feature.id: feature for feature in FEATURES}
    for name in sys.argv[2:]:
        try:
            cell = globals()[known[name].kind](bench, known[name])
        except Exception as error:  # a cell that cannot be run is one that failed; the others go on
            cell = {"status": "failed", "detail": f"{type(error).__name__}: {str(error)[:200]}"}
        print(json.dumps({"release": releases.current(), "feature": name, **cell}), flush=True)


if __name__ == "__main__":
    main()
