"""Runs stock open_clip's trainer in subprocesses, by the command line that users type."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

SHIM = Path(__file__).parents[1] / "shim"

# Crops of a square image by exactly its area are the image itself: batches are then a function of their files.
EXACT_CROP = ("--aug-cfg", "scale=(1.0,1.0)", "ratio=(1.0,1.0)")


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
            "PYTHONPATH": str(SHIM),
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
        open_clip: str | None = None,
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
            check: Fail unless the trainer succeeds.
        """
        torchrun = [python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(nproc)]
        argv = [*torchrun, "-m", "--", "open_clip_train.main"]
        argv += ["--model", model, "--device", "cpu", "--batch-size", str(batch_size), "--workers", "0"]
        argv += ["--epochs", "1", "--lr", "1e-3", "--warmup", "1", "--logs", str(self.logs), "--name", name]
        argv += ["--save-frequency", "1", "--log-every-n-steps", "1", *EXACT_CROP, *map(str, flags)]
        environment = {**self.env, **(env or {})}
        if open_clip is not None:
            environment["PYTHONPATH"] = f"{environment['PYTHONPATH']}:{open_clip}"
        done = subprocess.run(argv, capture_output=True, text=True, env=environment, timeout=300, check=False)
        run = Run(done.returncode, done.stdout + done.stderr, self.logs / name)
        assert not check or run.status == 0, run.output
        return run


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

        return torch.load(self.folder / "checkpoints" / "epoch_1.pt", weights_only=True)
