"""Does everything hold on a machine with one CUDA GPU, and what does it cost there? One command, at most 8 minutes.

    python scripts/gpu_check.py --json gpu.json --markdown gpu.md

It needs Python 3.10 or later, torch with CUDA, open_clip 3 and this checkout; nothing is installed by it, nothing is
downloaded, and no setting of the card is changed. On a machine that has torch, torchvision, timm, pandas and pyarrow:

    pip install --no-deps 'open_clip_torch>=3,<4' 'webdataset<=0.2.86' braceexpand ftfy wcwidth clip-benchmark

(elsewhere also: timm huggingface_hub safetensors pydantic regex tqdm pandas pyarrow fsspec filelock packaging;
transformers for the check of a captioner). Without clip-benchmark, what evaluates is left out, and said to be. The
plugin need not be installed: it is taken from the checkout.

Models have random weights, images are made. Checks of correctness run side by side, those of cost alone and one after
the other. Each has a process and a time limit of its own: one that fails, hangs or breaks the device is reported and
the others go on. JSON and Markdown are written anew after each, so that an interrupted run leaves what it has.

    python scripts/gpu_check.py --device cpu --tiny        looks at the script itself, on a CPU
    python scripts/gpu_check.py --list                     the checks
    python scripts/gpu_check.py --only gradients search    some of them

The status is 1 if a promise is broken or a check ends in an error, and 0 otherwise.

One module, because it reads as one list of checks.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from types import FrameType
from typing import Any

from gpu import ROOT, building, cost, gradients, loading, machine, trainers
from gpu.context import Context, Outcome, Skipped
from gpu.report import markdown

from arf_plugin.files import replacing


@dataclasses.dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        name: What --only takes.
        run: The check.
        seconds: It is ended after so many on a GPU's machine, and four times as many on a CPU.
        alone: Whether nothing else may run beside it, because it measures time.
    """

    name: str
    run: Callable[[Context], Outcome]
    seconds: float
    alone: bool = False

    @property
    def about(self) -> str:
        """What it does, in a line."""
        kind = self.run.func if isinstance(self.run, functools.partial) else self.run
        return (kind.__doc__ or "").split("\n")[0]


STEPS = cost.steps()
# Those of correctness begin with the longest; those of cost with the most important.
CHECKS = {
    check.name: check
    for check in (
        Check("machine", machine.machine, 90, alone=True),
        Check("compile", trainers.compiled, 160),
        Check("deterministic", trainers.deterministic, 170),
        Check("two-processes", trainers.two_processes, 170),
        Check("trainer-gradients", trainers.trainer_gradients, 170),
        Check("gradients", gradients.gradients, 170),
        Check("same-bits", gradients.same_bits, 150),
        Check("nccl", trainers.nccl, 150),
        Check("precisions", trainers.precisions, 150),
        Check("commands", building.commands, 150),
        Check("watch", trainers.watch, 120),
        Check("cheaper-pairs", trainers.cheaper_pairs, 120),
        *(Check(name, run, 75, alone=True) for name, run in list(STEPS.items())[:2]),
        Check("search", building.search, 60, alone=True),
        Check("embed", building.embed, 60, alone=True),
        Check("loaders", loading.loaders, 90, alone=True),
        *(Check(name, run, 75, alone=True) for name, run in list(STEPS.items())[2:]),
        Check("waiting", loading.waiting, 90, alone=True),
    )
}


def main() -> int:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="default: cuda")
    flags.add_argument(
        "--tiny", action="store_true", help="sizes as small as can be; without promises about time"
    )
    flags.add_argument("--only", nargs="+", metavar="NAME", choices=CHECKS, help="only these checks")
    flags.add_argument("--list", action="store_true", help="list the checks and stop")
    flags.add_argument(
        "--budget", type=float, default=480, metavar="S", help="seconds for all (default: 480)"
    )
    flags.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="checks of correctness side by side (default: half the cores, up to 5)",
    )
    flags.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    flags.add_argument("--markdown", type=Path, metavar="FILE", help="write tables to FILE")
    flags.add_argument("--commit", help="the checkout's commit, where it has no .git")
    flags.add_argument("--keep", type=Path, metavar="FOLDER", help="work in FOLDER, and leave it there")
    flags.add_argument("--child", choices=CHECKS, help=argparse.SUPPRESS)
    flags.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    args = flags.parse_args()
    if args.list:
        for check in CHECKS.values():
            print(f"{check.name:20} {check.about}")
        return 0
    cores = len(os.sched_getaffinity(0))
    args.jobs = args.jobs or max(1, min(5, cores // 2))
    if args.child:
        return child(args)
    if args.keep:
        args.keep.mkdir(parents=True, exist_ok=True)
        return Report(args, args.keep.resolve()).run()
    with tempfile.TemporaryDirectory(prefix="gpu-check-", ignore_cleanup_errors=True) as folder:
        return Report(args, Path(folder)).run()


def child(args: argparse.Namespace) -> int:
    """Runs one check in this process; its outcome is written to a file in its folder."""

    def ended(number: int, frame: FrameType | None) -> None:
        trainers.end_all()
        os._exit(128 + number)

    signal.signal(signal.SIGTERM, ended)
    folder = args.keep / args.child
    result: dict[str, Any]
    context = Context(args.device, args.tiny, folder, 3 if args.device == "cuda" else 2, args.seconds)
    try:
        outcome = CHECKS[args.child].run(context)
    except Skipped as reason:
        result = {"status": "skipped", "error": str(reason)}
    except Exception as error:
        result = {
            "status": "error",
            "error": f"{type(error).__name__}: {error}",
            "traceback": traceback.format_exc(),
        }
    else:
        met = all(bar.met for bar in outcome.bars)
        result = {
            "status": "passed" if met else "failed",
            "figures": outcome.figures,
            "bars": [{**dataclasses.asdict(bar), "met": bar.met} for bar in outcome.bars],
            "summary": outcome.summary,
            "notes": outcome.notes,
        }
    with replacing(folder / "result.json") as path:  # whole or not at all, on a full disk, too
        path.write_text(json.dumps(result, default=str))
    return 0


class Report:
    """Runs checks and writes down what they find.

    Args:
        args: The command line.
        folder: Where the checks have their folders.
    """

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder = args, folder
        self.start = time.monotonic()
        self.date = time.strftime("%Y-%m-%d", time.gmtime())
        self.checks = [check for check in CHECKS.values() if args.only is None or check.name in args.only]
        self.results: dict[str, dict[str, Any]] = {}

    def run(self) -> int:
        """Runs them all.

        Returns:
            The exit status.
        """
        first = [check for check in self.checks if check.name == "machine"]
        for check in first:
            if self.one(check)["status"] == "error":
                print(self.results[check.name]["error"])
                self.write()
                return 1
        beside = [
            check for check in self.checks if check not in first and (self.args.tiny or not check.alone)
        ]
        with ThreadPoolExecutor(self.args.jobs) as pool:
            for done in as_completed([pool.submit(self.one, check) for check in beside]):
                done.result()
        for check in self.checks:
            if check.alone and check not in first and check not in beside:
                self.one(check)
        self.write()
        counts: dict[str, int] = {}
        for result in self.results.values():
            counts[result["status"]] = counts.get(result["status"], 0) + 1
        print(f"{', '.join(f'{n} {status}' for status, n in counts.items())}, in {self.elapsed:.0f} s")
        return 1 if counts.keys() & {"failed", "error", "timeout"} else 0

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.start

    def one(self, check: Check) -> dict[str, Any]:
        """Runs one check in a process of its own, tells and keeps the result."""
        left = self.args.budget - self.elapsed
        began = time.monotonic()
        result = (
            {"status": "not run", "error": "no time was left"}
            if left < 5
            else self._process(check, min(check.seconds * (1 if self.args.device == "cuda" else 4), left))
        )
        result["seconds"] = time.monotonic() - began
        self.results[check.name] = result
        text = result.get("summary") or result.get("error", "").strip().split("\n")[0]
        print(f"{result['status']:8} {check.name:20} {result['seconds']:6.1f} s  {text}", flush=True)
        for bar in result.get("bars", []):
            if not bar["met"]:
                print(
                    f"           missed: {bar['claim']}: {bar['measured']:.4g}, promised {bar['bound']:.4g}",
                    flush=True,
                )
        if result["status"] in ("error", "timeout"):
            print(
                "           "
                + "\n           ".join((result.get("traceback") or result["error"])[-1500:].splitlines()),
                flush=True,
            )
        self.write()
        return result

    def _process(self, check: Check, seconds: float) -> dict[str, Any]:
        folder = self.folder / check.name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        command = [sys.executable, __file__, "--child", check.name, "--device", self.args.device]
        command += ["--keep", str(self.folder), "--seconds", str(max(1, seconds - 3))]
        command += ["--tiny"] if self.args.tiny else []
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        # This checkout's plugin, whatever is installed: its start-up file runs before anything here does.
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        )
        if self.args.device == "cpu":
            environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        with (folder / "output.txt").open("w") as output:
            process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,
            )
            try:
                process.wait(seconds)
                hung = False
            except subprocess.TimeoutExpired:
                hung = True
                process.terminate()  # it ends its own children
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(3)
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        said = (folder / "output.txt").read_text(errors="replace")[-3000:]
        if hung:
            return {"status": "timeout", "error": f"ended after {seconds:.0f} s\n{said}"}
        written = folder / "result.json"
        if not written.is_file():
            return {"status": "error", "error": f"its process ended with status {process.returncode}\n{said}"}
        return json.loads(written.read_text())

    def content(self) -> dict[str, Any]:
        """What the JSON holds."""
        return {
            "title": "gpu_check",
            "machine": self.results.get("machine", {}).get("figures", {}),
            "commit": self.args.commit or commit(),
            "device": self.args.device,
            "tiny": self.args.tiny,
            "date": self.date,
            "seconds": self.elapsed,
            "checks": {
                check.name: self.results.get(check.name, {"status": "not run"}) for check in self.checks
            },
        }

    def write(self) -> None:
        """Writes what there is so far."""
        for path, text in (
            (self.args.json, lambda: json.dumps(self.content(), indent=1) + "\n"),
            (self.args.markdown, lambda: markdown(self.content())),
        ):
            if path is not None:
                with replacing(path) as temporary:
                    temporary.write_text(text())


def commit() -> str | None:
    """The checkout's commit, with a star if files differ from it."""
    try:
        git = ["git", "-C", str(ROOT)]
        found = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return found + ("*" if changed.strip() else "")


if __name__ == "__main__":
    sys.exit(main())
