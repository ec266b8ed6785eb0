"""CLIP_benchmark's own command line, unmodified, in a process of its own.

CLIP_benchmark 1.6.2 cannot count with numpy 2.4, which no longer turns an array of one element into a float. It is
given an older numpy, beside the environment and for its process alone; nothing of it is patched.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

NUMPY = Path(__file__).parents[2] / ".venvs" / "numpy-2.3.5"  # scripts/test.sh puts it there


def older_numpy() -> Path:
    """The folder of the older numpy; is installed if it is not there."""
    if not NUMPY.is_dir():
        unfinished = NUMPY.with_name(f"{NUMPY.name}.{os.getpid()}")
        command = [
            *(sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-deps")
        ]
        subprocess.run([*command, "--target", unfinished, "numpy==2.3.5"], check=True)
        try:
            unfinished.rename(NUMPY)
        except OSError:  # another process was faster
            assert NUMPY.is_dir()
    return NUMPY


def evaluate(
    folder: Path, clip: str, checkpoint: Path, dataset: str, root: Path, *flags: object
) -> dict[str, float]:
    """Runs `clip_benchmark eval`; returns its metrics, as fractions."""
    out = folder / f"clip_benchmark-{dataset.replace('/', '-')}.json"
    done = subprocess.run(
        [
            *(sys.executable, "-c", "from clip_benchmark.cli import main; main()", "eval"),
            *("--model", clip, "--pretrained", checkpoint, "--dataset", dataset, "--dataset_root", root),
            *("--num_workers", "0", "--output", out, *map(str, flags)),
        ],
        env={**os.environ, "PYTHONPATH": f"{older_numpy()}:{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text())["metrics"]
