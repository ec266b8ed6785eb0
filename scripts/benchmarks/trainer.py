"""Runs open_clip's own trainer under torchrun and shows its progress."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from arf_plugin.ablation import launch
from arf_plugin.ablation.launch import stop_all
from arf_plugin.ablation.runs import strip
from benchmarks.files import bar, replacing, write_json
from benchmarks.recipe import MODEL, THREADS, Training

__all__ = ["Run", "TrainingError", "call", "model_folder", "pattern", "stop_all", "train"]


class TrainingError(Exception):
    """A training run that failed."""


@dataclass(frozen=True)
class Run:
    """One run of the trainer.

    Attributes:
        folder: the run's folder; its name is the run's name.
        model: what `--model` gets.
        data: what `--train-data` gets.
        training: epochs, batch size, learning rate, ...
        seed: the run's seed.
        extra: further flags.
    """

    folder: Path
    model: str
    data: str
    training: Training
    seed: int = 0
    extra: tuple[str, ...] = ()

    @property
    def checkpoint(self) -> Path:
        """The last epoch's checkpoint."""
        return self.folder / "checkpoints" / f"epoch_{self.training.epochs}.pt"

    @property
    def weights(self) -> Path:
        """The finished run's weights, without the optimizer's state."""
        return self.folder / "weights.pt"

    def command(self) -> list[str]:
        """The command line."""
        return [
            *launch.trainer(),
            *("--model", self.model, "--train-data", self.data, "--dataset-type", "webdataset"),
            *("--logs", str(self.folder.parent), "--name", self.folder.name, "--resume", "latest"),
            *("--save-frequency", "1", "--delete-previous-checkpoint", "--log-every-n-steps", "4"),
            *("--device", "cpu", "--precision", "fp32", "--workers", "1", "--seed", str(self.seed)),
            # Trimmed texts give the same sums, rounded otherwise: the published figures are those of whole texts.
            *("--arf-deterministic", "--arf-trim-text", "off"),
            *self.training.arguments(),
            *self.extra,
        ]


def train(run: Run, title: str, threads: int = THREADS, position: int = 0) -> Path:
    """Trains, unless the run is finished; a run that was killed goes on after its last full epoch.

    Args:
        run: what to run.
        title: text of the progress bar.
        threads: CPU threads; they count among what makes two runs equal.
        position: line of the progress bar, if several are shown.

    Returns:
        The finished run's weights.

    Raises:
        TrainingError: with the end of the log.
    """
    if run.weights.is_file():
        print(f"{run.folder} is complete")
        return run.weights
    log = run.folder / "console.log"
    with bar(desc=title, unit="image", position=position) as shown:

        def follow(line: bytes) -> None:
            step = launch.parse_step(line)
            if step is not None:
                if shown.total is None:  # what an earlier start trained is none of this bar's rate
                    shown.initial = shown.n = shown.last_print_n = step.epoch * step.epoch_images
                shown.total = step.epoch_images * run.training.epochs
                shown.set_postfix_str(f"epoch {step.epoch + 1}/{run.training.epochs}, loss {step.loss:.3f}")
                shown.update(step.epoch * step.epoch_images + step.images - shown.n)

        def left() -> bool:
            launch.remove_truncated_checkpoints(run.checkpoint.parent)
            return not run.checkpoint.is_file()

        status = launch.run_logged(run.command(), log, follow, launch.cpu_threads(threads), left)
    if status or not run.checkpoint.is_file():
        raise TrainingError(f"{title} failed ({status}); the end of {log}:\n{launch.last_lines(log)}")
    strip(run.checkpoint, run.weights, run.folder.name)
    shutil.rmtree(run.checkpoint.parent)
    return run.weights


def model_folder(folder: Path, weights: Path | None = None, config: Mapping[str, object] = MODEL) -> str:
    """Makes a folder that open_clip takes as a model: configuration, and weights if there are any.

    Args:
        folder: the folder.
        weights: a finished run's weights.
        config: the configuration.

    Returns:
        What to give to `--model`.
    """
    from arf_plugin.evaluation.checkpoints import read_weights

    target = folder / "open_clip_model.safetensors"
    if weights is not None and not target.is_file():
        from safetensors.torch import save_file

        with replacing(target) as temporary:
            save_file(
                {name: tensor.contiguous() for name, tensor in read_weights(weights).items()}, temporary
            )
    write_json(folder / "open_clip_config.json", config)
    return f"local-dir:{folder}"


def call(command: Sequence[str]) -> None:
    """Runs another command of this environment, its output on the terminal."""
    print("+ " + shlex.join(command), flush=True)
    argv = [str(Path(sys.executable).parent / command[0]), *command[1:]]
    status = subprocess.run(argv, env=os.environ | launch.cpu_threads(THREADS), check=False).returncode
    if status:
        raise TrainingError(f"`{shlex.join(command)}` failed ({status})")


def pattern(shards: list[Path]) -> str:
    """Writes shards that are numbered through as one pattern: `a/emoji-{000..004}.tar`."""
    first, last = shards[0], shards[-1]
    return f"{first.parent}/{first.stem[:-3]}{{{first.stem[-3:]}..{last.stem[-3:]}}}.tar"
