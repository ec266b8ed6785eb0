"""Runs stock open_clip's trainer in subprocesses, by the command line that users type."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from arf_plugin.safe_loading import plain_numbers
from support import forks, releases

SHIM = Path(__file__).parents[1] / "shim"

# Crops of a square image by exactly its area are the image itself: batches are then a function of their files.
EXACT_CROP = ("--aug-cfg", "scale=(1.0,1.0)", "ratio=(1.0,1.0)")

# The terms of ARF's loss, as the trainer logs them.
TERMS = ("Contrastive_loss", "Caption_anchor_loss", "Pair_anchor_loss")


class Trainer:
    """The trainer with a tiny model.

    Args:
        logs: Folder for its runs.
        model_configs: Folder with configurations of tiny models.
        cache: The plugin's cache folder.
    """

    def __init__(self, logs: Path, model_configs: Path, cache: Path) -> None:
        self.logs = logs
        self.env = {
            **{name: value for name, value in os.environ.items() if not name.startswith("ARF_")},
            "PYTHONPATH": releases.path(SHIM),
            "ARF_TEST_MODEL_CONFIGS": str(model_configs),
            "ARF_TEST_DDP_CPU": "1",
            "ARF_CACHE_DIR": str(cache),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }

    def __call__(
        self,
        *flags: Any,
        nproc: int = 1,
        name: str = "run",
        model: str = "tiny-vit",
        batch_size: int = 8,
        env: dict[str, str] | None = None,
        python: str = sys.executable,
        open_clip: Path | None = None,
        torchrun: bool = True,
        check: bool = True,
    ) -> Run:
        """Runs ``torchrun --nproc_per_node N -m -- open_clip_train.main FLAGS``.

        Args:
            *flags: Flags beyond those for a short run of a tiny model.
            nproc: Processes.
            name: The run's name.
            model: The model's name.
            batch_size: B.
            env: More environment variables.
            python: The interpreter whose environment is used.
            open_clip: A folder with another release of open_clip to use.
            torchrun: False for ``python -m open_clip_train.main FLAGS``, which starts faster.
            check: Fail unless the trainer succeeds.
        """
        launch = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(nproc), "-m", "--"]
        trainer = self.argv(flags, name, model, batch_size, open_clip)
        argv = [python, "-m", *(launch if torchrun else ()), "open_clip_train.main", *trainer]
        environment = self.environment(open_clip, env)
        done = subprocess.run(argv, capture_output=True, text=True, env=environment, timeout=300, check=False)
        run = Run(done.returncode, done.stdout + done.stderr, self.logs / name)
        assert not check or run.status == 0, run.output
        return run

    def forked(self, *flags: Any, check: bool = True, timeout: float = 300, **options: Any) -> Run:
        """Runs ``python -m open_clip_train.main FLAGS`` in a fork of a process that has imported the libraries.

        See `support.forks`; `__call__` is for tests of what starts the trainer. Several processes are told of each
        other by the variables that torchrun sets.

        Args:
            *flags: Flags beyond those for a short run of a tiny model.
            check: Fail unless the trainer succeeds.
            timeout: Seconds until it is ended.
            **options: Those of `start`.
        """
        run = self.start(*flags, **options).wait(timeout)
        assert not check or run.status == 0, run.output
        return run

    def start(
        self,
        *flags: Any,
        nproc: int = 1,
        name: str = "run",
        model: str = "tiny-vit",
        batch_size: int = 8,
        env: dict[str, str] | None = None,
        open_clip: Path | None = None,
        arf: bool = False,
    ) -> Started:
        """Starts what `forked` runs, or ``arf train FLAGS``."""
        self.logs.mkdir(parents=True, exist_ok=True)
        output = self.logs / f"{name}.out"
        argv = self.argv(flags, name, model, batch_size, open_clip)
        module, argv = ("arf_plugin.cli.main", ["train", *argv]) if arf else ("open_clip_train.main", argv)
        output.unlink(missing_ok=True)
        environment = {"ARF_TEST_SHIM_ALWAYS": "1", **self.environment(open_clip, env)}
        processes = [
            forks.start(module, argv, {**environment, **told}, output)
            for told in (forks.torchrun_env(nproc) if nproc > 1 else [{}])
        ]
        return Started(processes, output, self.logs / name)

    def environment(self, open_clip: Path | None, more: dict[str, str] | None) -> dict[str, str]:
        """Variables of a run, with another release of open_clip in the folder, and more."""
        path = {} if open_clip is None else {"PYTHONPATH": releases.path(SHIM, open_clip)}
        return {**self.env, **path, **(more or {})}

    def argv(
        self, flags: tuple[Any, ...], name: str, model: str, batch_size: int, open_clip: Path | None = None
    ) -> list[str]:
        """The trainer's own flags for a short run of a tiny model, and more."""
        argv = ["--model", model, *releases.on_cpu(open_clip)]
        argv += ["--batch-size", str(batch_size), "--workers", "0"]
        argv += ["--epochs", "1", "--lr", "1e-3", "--warmup", "1", "--logs", str(self.logs), "--name", name]
        argv += ["--save-frequency", "1", "--log-every-n-steps", "1", *EXACT_CROP, *map(str, flags)]
        # The tiny models have no weights of their own.
        return [*argv, "--arf-random-weights"] if "--arf-anchors" in argv else argv


class Started:
    """A run in progress.

    Attributes:
        output: The file that its processes print to.
    """

    def __init__(self, processes: list[Any], output: Path, folder: Path) -> None:
        self.processes = processes
        self.output = output
        self.folder = folder

    @property
    def running(self) -> bool:
        return any(process.exitcode is None for process in self.processes)

    def kill(self) -> None:
        """Ends all processes at once, their loader workers included, as a lost machine would."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
        for process in self.processes:
            process.join()

    def wait(self, seconds: float = 300, patience: float = 1) -> Run:
        """Waits for the end; a process that fails ends the others after ``patience``, as torchrun would."""
        end = time.monotonic() + seconds
        while self.running and time.monotonic() < end and not any(p.exitcode for p in self.processes):
            for process in self.processes:
                process.join(0.05)
        if self.running:
            time.sleep(patience)
            self.kill()
        status = next((process.exitcode for process in self.processes if process.exitcode), 0)
        return Run(status, self.output.read_text(), self.folder)


class Run:
    """A finished run: exit status, everything it printed, its folder."""

    def __init__(self, status: int, output: str, folder: Path) -> None:
        self.status = status
        self.output = output
        self.folder = folder

    @property
    def checkpoint(self) -> dict[str, Any]:
        """The checkpoint after the first epoch."""
        import torch

        with torch.serialization.safe_globals(plain_numbers()):
            return torch.load(self.folder / "checkpoints" / "epoch_1.pt", weights_only=True)


def logged(run: Run, term: str) -> list[float]:
    """Values of a loss term in a run's log, in order."""
    return [float(value) for value in re.findall(rf" {term}: ([\d.eE+-]+) \(", run.output)]


def batches(run: Run) -> list[tuple[int, int]]:
    """Progress counts in a run's log: samples so far, samples of the epoch."""
    return [(int(a), int(b)) for a, b in re.findall(r"Train Epoch: \d+ \[ *(\d+)/(\d+) ", run.output)]
