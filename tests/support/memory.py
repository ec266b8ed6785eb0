"""How much memory something takes with large checkpoints, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import safetensors.torch
import torch

BEFORE = """
import sys, threading, torch
from pathlib import Path
from arf_plugin.evaluation.checkpoints import open_checkpoint

def own():  # bytes that are no pages of files, which the system can take back at any time
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

def watch():
    while not done.wait(0.002):
        seen.append(own())

seen, done = [own()], threading.Event()
watcher = threading.Thread(target=watch)
watcher.start()
"""
AFTER = """
done.set()
watcher.join()
print(seen[0], max(seen))
"""


def peak(script: str, *argv: object) -> tuple[int, int]:
    """Runs a script on arguments; returns its memory after imports, and at the peak, without mapped files.

    The script finds torch, ``sys``, ``Path`` and ``open_checkpoint`` imported. What it frees goes back to the system at
    once: glibc would otherwise keep blocks of up to 32 MB, as many as it happens to have, and 20 MB tensors with them.
    """
    command = [sys.executable, "-c", BEFORE + script + AFTER, *map(str, argv)]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    libraries, highest = map(int, done.stdout.split())
    return libraries, highest


def save_large(path: Path, layers: int, seed: int) -> int:
    """Saves a checkpoint of 20 MB layers with AdamW's state beside them; returns the bytes of its weights."""
    torch.manual_seed(seed)
    layer = torch.randn(5_000_000)
    weights = {f"layers.{n}.weight": layer + n for n in range(layers)}
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(weights, path)
    else:
        state = {n: {"exp_avg": w * 0.1, "exp_avg_sq": w * w} for n, w in enumerate(weights.values())}
        torch.save({"epoch": 1, "name": "large", "state_dict": weights, "optimizer": {"state": state}}, path)
    return 4 * 5_000_000 * layers
