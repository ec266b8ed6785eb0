"""The machine: its card, its software, and the two ceilings that the other figures are read against."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess

from gpu.context import Context, Outcome, median

PACKAGES = (
    *("torch", "torchvision", "open_clip_torch", "webdataset", "timm", "transformers", "numpy", "pyarrow"),
    *("pandas", "triton"),
)


def machine(context: Context) -> Outcome:
    """Names and versions; a matrix product and a copy within the device's memory."""
    import torch

    found = Outcome()
    figures = found.figures
    figures["python"] = platform.python_version()
    figures["cores"] = len(os.sched_getaffinity(0))
    figures["packages"] = {name: _version(name) for name in PACKAGES}
    figures["cuda"] = torch.version.cuda
    if context.on_gpu:
        if not torch.cuda.is_available():
            raise RuntimeError(
                "torch sees no GPU here. Run it on a machine with one, or with --device cpu --tiny."
            )
        properties = torch.cuda.get_device_properties(0)
        figures["device"] = properties.name
        figures["memory"] = properties.total_memory
        figures["capability"] = f"{properties.major}.{properties.minor}"
        figures["devices"] = torch.cuda.device_count()
        figures["cudnn"] = torch.backends.cudnn.version()
        figures["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        figures["driver"] = _driver()
    else:
        figures["device"] = platform.processor() or platform.machine()
    size = 256 if context.tiny else 8192
    kind = torch.bfloat16 if context.on_gpu else torch.float32
    one, two = (torch.randn(size, size, device=context.device, dtype=kind) for _ in range(2))
    there = torch.empty_like(source := torch.randn(2**20 if context.tiny else 2**30, device=context.device))
    calls = {"product": lambda: one @ two, "copy": lambda: there.copy_(source)}
    seconds = context.timed(calls, 5 if context.tiny else 20)
    figures["TFLOP/s of a matrix product"] = 2 * size**3 / median(seconds["product"]) / 1e12
    figures["GB/s of a copy, read and written"] = 2 * source.numel() * 4 / median(seconds["copy"]) / 1e9
    found.summary = (
        f"{figures['device']}, torch {figures['packages']['torch']}, CUDA {figures['cuda']}, driver "
        f"{figures.get('driver')}: {figures['TFLOP/s of a matrix product']:.3g} TFLOP/s {str(kind)[6:]}, "
        f"{figures['GB/s of a copy, read and written']:.4g} GB/s"
    )
    return found


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=20)
    return done.stdout.split("\n")[0].strip() or None
