"""Runs open_clip's own trainer under torchrun and shows its progress."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from emojinet.files import bar, replacing, write_json
from emojinet.recipe import MODEL, Training

STEP = re.compile(rb"Train Epoch: (\d+) \[\s*(\d+)/(\d+).*?Loss: ([\d.]+) \([^)]*\)\s*$")


_running: set[subprocess.Popen[bytes]] = set()


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
        # `--` keeps torchrun from reading --logs as an abbreviation of one of its own options.
        return [
            *(str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc_per_node", "1"),
            *("-m", "--", "open_clip_train.main"),
            *("--model", self.model, "--train-data", self.data, "--dataset-type", "webdataset"),
            *("--logs", str(self.folder.parent), "--name", self.folder.name, "--resume", "latest"),
            *("--save-frequency", "1", "--delete-previous-checkpoint", "--log-every-n-steps", "4"),
            *("--device", "cpu", "--precision", "fp32", "--workers", "1", "--seed", str(self.seed)),
            *self.training.arguments(),
            *self.extra,
        ]


def train(run: Run, title: str, threads: int | None = None, position: int = 0) -> Path:
    """Trains, unless the run is finished; a run that was killed goes on after its last full epoch.

    Args:
        run: what to run.
        title: text of the progress bar.
        threads: CPU threads; all cores by default.
        position: line of the progress bar, if several are shown.

    Returns:
        The finished run's weights.

    Raises:
        TrainingError: with the end of the log.
    """
    if run.weights.is_file():
        print(f"{run.folder} is complete")
        return run.weights
    run.folder.mkdir(parents=True, exist_ok=True)
    log = run.folder / "console.log"
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads or len(os.sched_getaffinity(0)))}
    with log.open("wb") as stream, bar(desc=title, unit="image", position=position) as shown:
        process = subprocess.Popen(
            run.command(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        assert process.stdout is not None
        _running.add(process)
        try:
            for line in process.stdout:
                stream.write(line)
                stream.flush()
                if match := STEP.search(line.rstrip()):
                    epoch, done, size = (int(match[i]) for i in (1, 2, 3))
                    shown.total = size * run.training.epochs
                    shown.set_postfix_str(
                        f"epoch {epoch + 1}/{run.training.epochs}, loss {float(match[4]):.3f}"
                    )
                    shown.update(epoch * size + done - shown.n)
            status = process.wait()
        finally:
            process.terminate()
            _running.discard(process)
    if status or not run.checkpoint.is_file():
        tail = b"\n".join(log.read_bytes().splitlines()[-15:]).decode(errors="replace")
        raise TrainingError(f"{title} failed ({status}); the end of {log}:\n{tail}")
    strip_optimizer(run.checkpoint, run.weights)
    shutil.rmtree(run.checkpoint.parent)
    return run.weights


def stop_all() -> None:
    """Ends the trainings that are under way, of all threads; each goes on at its last full epoch next time."""
    for process in list(_running):
        process.terminate()


def strip_optimizer(checkpoint: Path, out: Path) -> None:
    """Copies a checkpoint's weights alone: a third of its size."""
    from arf_plugin.evaluation.checkpoints import read_weights, write_weights

    write_weights(out, read_weights(checkpoint), checkpoint.parent.parent.name)


def model_folder(folder: Path, weights: Path | None = None) -> str:
    """Makes a folder that open_clip takes as a model: configuration, and weights if there are any.

    Returns:
        What to give to `--model`.
    """
    from arf_plugin.evaluation.checkpoints import read_weights

    config: Mapping[str, object] = MODEL
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
    status = subprocess.run([str(Path(sys.executable).parent / command[0]), *command[1:]]).returncode
    if status:
        raise TrainingError(f"`{shlex.join(command)}` failed ({status})")
