"""The quickstart: from nothing to the table, one step after the other; finished steps are skipped.

python scripts/emojinet/quickstart.py                 the whole of it, about 20 minutes on two cores
python scripts/emojinet/quickstart.py --fast          a smoke run: every step, but too short to mean anything
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import captioner
from benchmarks.download import DownloadError
from benchmarks.files import Stage, read_json
from benchmarks.recipe import THREADS, Recipe
from benchmarks.trainer import Run, TrainingError, call, model_folder, pattern, stop_all, train

from arf_plugin.ablation.launch import cpu_threads
from emojinet import report
from emojinet.build import build
from emojinet.recipe import FAST, FULL


class Quickstart:
    """One quickstart run.

    Args:
        data: EmojiNet's folder; is built if it is not there.
        out: folder of everything that is made from it.
        recipe: hyper-parameters.
        seeds: fine-tuning runs of each arm.
        fast: build the small pool.
        half: evaluate on the "test" or the "validation" sets.
    """

    def __init__(
        self, data: Path, out: Path, recipe: Recipe, seeds: int, fast: bool = False, half: str = "test"
    ) -> None:
        self.data, self.out, self.recipe, self.seeds = data, out, recipe, seeds
        self.fast, self.half = fast, half
        self.started = time.monotonic()

    def run(self) -> str:
        """Runs all steps.

        Returns:
            The table.
        """
        clip = self.prepare()
        self.title("4/5 anchors, FLYP and ARF, how far to go, a report (arf fit)")
        runs = self.fit(clip)
        self.title("5/5 the test sets, also with WiSE-FT (arf evaluate)")
        return self.evaluate(clip, runs)

    def prepare(self) -> str:
        """Makes what a user has already: images, a pretrained CLIP, a captioner; returns what `--model` gets."""
        self.title("1/5 EmojiNet: download, draw, split")
        build(self.data, self.data.parent / "emojinet-cache", self.fast)
        self.title("2/5 pretrain a tiny CLIP on the pool (open_clip's trainer)")
        clip = self.pretrain()
        self.title("3/5 train a tiny captioner on the pool")
        weights = self.out / "clip" / "open_clip_model.safetensors"
        captioner.train(self.pairs, weights, self.out / "captioner", self.recipe.captioner_steps)
        return clip

    def title(self, text: str) -> None:
        """Announces a step, with the time since the start."""
        minutes, seconds = divmod(int(time.monotonic() - self.started), 60)
        print(f"\n[{minutes:02d}:{seconds:02d}] {text}", flush=True)

    def shards(self, kind: str) -> list[Path]:
        """The pool's shards of a kind: "emoji" or "icons"."""
        return sorted((self.data / "pool").glob(f"{kind}-*.tar"))

    @property
    def pairs(self) -> list[Path]:
        """The shards that the CLIP and the captioner are trained on."""
        return sorted((self.data / "pretraining").glob("*.tar"))

    def pretrain(self) -> str:
        """Pretrains the CLIP; returns what `--model` gets."""
        untrained = model_folder(self.out / "clip-config")
        run = Run(self.out / "pretraining", untrained, pattern(self.pairs), self.recipe.pretraining)
        return model_folder(self.out / "clip", train(run, "pretrain"))

    @property
    def pool(self) -> str:
        """What pairs are retrieved from: the emoji of other styles, and more unrelated icons."""
        return f"{pattern(self.shards('emoji'))}::{pattern(self.shards('icons'))}"

    def anchors(self, clip: str, name: str = "anchors", extra: Sequence[str] = ()) -> Path:
        """Builds an anchor set of the task's own shards, for the grids; `extra` are further flags of `arf anchors`."""
        anchors = self.out / name
        call(
            [
                *("arf", "anchors", "--task-data", self.task, "--pool", self.pool, "--out", str(anchors)),
                *("--captioner", str(self.out / "captioner"), "--prompt", captioner.IMAGE_TOKEN),
                *("--model", clip),
                *("--k", str(self.recipe.neighbours), "--max-new-tokens", "20"),
                *extra,
            ]
        )
        return anchors

    @property
    def results(self) -> Path:
        """Where figures go: validation figures have a folder of their own."""
        return self.out if self.half == "test" else self.out / self.half

    @property
    def task(self) -> str:
        """The task's training shards."""
        return pattern(sorted((self.data / "task" / "train").glob("*.tar")))

    def fit(self, clip: str) -> dict[str, tuple[str, list[int]]]:
        """Builds anchors and fine-tunes FLYP and ARF with every seed, a run per core at a time.

        Returns:
            Checkpoint -> (arm, its seeds).
        """
        out, given = self.out / "fit", self.recipe.fine_tuning.arguments()
        settings = [f"{flag[2:]}={value}" for flag, value in zip(given[::2], given[1::2], strict=True)]
        settings += ["arf-freeze-bn", "workers=1", "precision=fp32"]
        call(
            [
                *("arf", "fit", str(self.data / "task"), "--model", clip, "--out", str(out)),
                *("--pool", self.pool, "--captioner", str(self.out / "captioner")),
                *("--templates", str(self.data / "task" / "templates.txt")),
                *("--keep", str(self.data / "evaluation" / "validation" / "zero_shot")),
                *("--preset", "paper", "--baseline", "--seeds", str(self.seeds), "--device", "cpu"),
                # A thread each, whatever the machine: threads count among what makes two runs equal.
                *("--jobs", str(max(2, len(os.sched_getaffinity(0))))),
                *(word for one in settings for word in ("--set", one)),
            ]
        )
        last = f"epoch_{self.recipe.fine_tuning.epochs}.pt"
        return {
            str(out / "runs" / f"{name}-{seed}" / "checkpoints" / last): (arm, [seed])
            for seed in range(self.seeds)
            for arm, name in (("flyp", "flyp"), ("arf", "paper"))
        }

    def fine_tuning(self, name: str, clip: str, seed: int, anchors: Path | None) -> Run:
        """One fine-tuning run: FLYP, or ARF if there are anchors. The two differ in one flag."""
        texts = self.data / "task"
        flags = (
            *("--arf-classnames", str(texts / "classnames.txt")),
            *("--arf-templates", str(texts / "templates.txt")),
            "--arf-freeze-bn",
            *(("--arf-anchors", str(anchors)) if anchors else ()),
        )
        return Run(self.out / name, clip, self.task, self.recipe.fine_tuning, seed, flags)

    def evaluate(self, clip: str, runs: dict[str, tuple[str, list[int]]]) -> str:
        """Evaluates everything and writes the results.

        Returns:
            The table.
        """
        before = clip.removeprefix("local-dir:") + "/open_clip_model.safetensors"
        names = {before: ("before", [0]), **runs}
        names |= {f"{path}+wise": (f"{arm}+wise", seeds) for path, (arm, seeds) in runs.items()}
        figures = self.results / "accuracy.json"
        stage = Stage(
            self.results, "evaluate", {p: Path(p.removesuffix("+wise")).stat().st_mtime_ns for p in names}
        )
        if not stage.done:
            sets = str(self.data / "evaluation" / self.half)
            wise = ("--wise", str(self.recipe.wise))
            call(
                [
                    "arf",
                    "evaluate",
                    before,
                    *runs,
                    *wise,
                    "--model",
                    clip,
                    "--data",
                    sets,
                    "--json",
                    str(figures),
                ]
            )
            stage.finish()
        return report.write(self.results, read_json(figures), names)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fast", action="store_true", help="a smoke run of about 3 minutes")
    parser.add_argument("--seeds", type=int, help="fine-tuning runs of each (default: 3; with --fast: 1)")
    parser.add_argument("--data", type=Path, help="EmojiNet's folder (default: data/emojinet[-fast])")
    parser.add_argument("--out", type=Path, help="folder of the results (default: runs/quickstart[-fast])")
    parser.add_argument(
        "--validation",
        action="store_true",
        help="evaluate on the validation sets, for choosing hyper-parameters; results go to OUT/validation",
    )
    parser.add_argument(
        "--anchors",
        action="store_true",
        help="end with OUT/anchors, which scripts/emojinet/ablate.sh begins with",
    )
    args = parser.parse_args()
    os.environ.update(cpu_threads(THREADS))  # of the captioner's training, which is in this process
    signal.signal(signal.SIGTERM, lambda *_: (stop_all(), sys.exit(143)))
    suffix = "-fast" if args.fast else ""
    quickstart = Quickstart(
        args.data or Path(f"data/emojinet{suffix}"),
        args.out or Path(f"runs/quickstart{suffix}"),
        FAST if args.fast else FULL,
        args.seeds or (1 if args.fast else 3),
        args.fast,
        "validation" if args.validation else "test",
    )
    try:
        if args.anchors:
            quickstart.anchors(quickstart.prepare())
            return 0
        table = quickstart.run()
    except (DownloadError, TrainingError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    quickstart.title(f"done; {quickstart.results}/results.json and results.png hold the figures\n")
    print(table)
    if args.fast:
        print("This was a smoke run: its models have hardly been trained, and its figures mean nothing.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
