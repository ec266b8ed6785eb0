"""Runs of the real trainer, by its command line, with a tiny ViT on made tars.

The trainer is stock open_clip. Two start-up files stand around it: the plugin's own, which an installation would run,
and that of the tests (tests/shim), which adds the tiny models, records a step, or kills the run at a moment.

One module, because all of its checks run the same trainer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import math
import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gpu import ROOT
from gpu.context import Context, Outcome, Skipped

TESTS = ROOT / "tests"
# Crops of a square image by exactly its area are the image itself: batches are then a function of their files.
EXACT_CROP = ("--aug-cfg", "scale=(1.0,1.0)", "ratio=(1.0,1.0)")
BOUND = 1e-10
TASK_SIZE = 6

START_UP = """\
import os, runpy, sys
from pathlib import Path
import arf_plugin._boot
runpy.run_path({shim!r})
if os.environ.get("ARF_GPU_CHECK_GROUP_OF_ONE"):
    import open_clip_train.distributed
    open_clip_train.distributed.is_using_distributed = lambda: "WORLD_SIZE" in os.environ
for folder in sys.path:  # what this file stands in front of
    path = Path(folder or ".", "sitecustomize.py")
    if path.is_file() and path.resolve() not in (Path(__file__).resolve(), Path({shim!r}).resolve()):
        runpy.run_path(str(path))
        break
"""


@dataclasses.dataclass
class Run:
    """A finished run.

    Attributes:
        status: Its exit status.
        output: What it printed.
        folder: Its folder.
    """

    status: int
    output: str
    folder: Path

    def check(self) -> Run:
        """Itself; an error with the end of its output if it failed."""
        if self.status:
            raise RuntimeError(
                f"{self.folder.name} ended with status {self.status}: {reason(self.output)}\n{self.output[-3000:]}"
            )
        return self

    def checkpoint(self, epoch: int) -> dict[str, Any]:
        """open_clip's own checkpoint after an epoch."""
        return load(self.folder / "checkpoints" / f"epoch_{epoch}.pt")

    def losses(self) -> list[float]:
        """The sum of the terms, at each logged step."""
        return [float(number) for number in re.findall(r" Loss: (\S+) \(", self.output)]


def reason(output: str) -> str:
    """The line of a failed run's output that says why; torchrun and dynamo write a page after it."""
    said = re.findall(r"^(?:[\w -]+: )?error: .+|^[\w.]+(?:Error|Exception): .+", output, re.MULTILINE)
    return next((line for line in reversed(said) if "ChildFailedError" not in line), "it does not say why")


def load(path: Path) -> dict[str, Any]:
    """A checkpoint, on the CPU."""
    import torch

    from arf_plugin.safe_loading import plain_numbers

    with torch.serialization.safe_globals(plain_numbers()):
        return torch.load(path, weights_only=True, map_location="cpu")


_RUNNING: set[subprocess.Popen] = set()


def end_all() -> None:
    """Ends whatever trainers run: a check that is ended leaves none behind."""
    for process in list(_RUNNING):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


class Trainers:
    """Starts trainers on data that it makes."""

    def __init__(self, context: Context) -> None:
        from support import data

        self.context = context
        folder = self.folder = context.folder
        self.configs = data.write_model_configs(folder / "configs")
        self.task = data.write_task(folder / "task", shards=4, per_shard=14)
        self.anchors = folder / "anchors"
        data.write_captions(
            self.anchors, {identity: f"a caption of {identity}" for identity in self.task.ids}
        )
        data.write_pairs(self.anchors, shards=4, per_shard=9)
        site = folder / "site"
        site.mkdir()
        (site / "sitecustomize.py").write_text(START_UP.format(shim=str(TESTS / "shim" / "sitecustomize.py")))
        self.env = {
            # A run begins without what this script, or its user, may have set.
            **{k: v for k, v in os.environ.items() if not k.startswith(("ARF_", "CUBLAS_WORKSPACE"))},
            "PYTHONPATH": os.pathsep.join(
                [str(site), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
            ),
            "ARF_TEST_MODEL_CONFIGS": str(self.configs),
            "ARF_CACHE_DIR": str(folder / "cache"),
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        if not context.on_gpu:
            self.env |= {"CUDA_VISIBLE_DEVICES": "", "ARF_TEST_DDP_CPU": "1"}

    def __enter__(self) -> Trainers:
        return self

    def __exit__(self, *error: object) -> None:
        end_all()

    def data(self, *more: Any) -> list[Any]:
        """Flags of the data, with class prompts and anchors."""
        flags = ["--train-data", self.task.urls, "--train-num-samples", 56, "--arf-anchors", self.anchors]
        return [
            *flags,
            "--arf-classnames",
            self.task.classnames,
            "--arf-templates",
            self.task.templates,
            *more,
        ]

    def run(
        self, name: str, *flags: Any, nproc: int = 0, model: str = "tiny-long", batch: int = 8, **env: str
    ) -> Run:
        """Runs ``python -m open_clip_train.main``, or as many as `nproc` by torchrun."""
        argv = ["--model", model, "--device", self.context.device, "--batch-size", batch, "--workers", 0]
        argv += ["--epochs", 1, "--lr", "1e-3", "--warmup", 1, "--logs", self.folder / "logs", "--name", name]
        argv += ["--save-frequency", 1, "--log-every-n-steps", 1, *flags]
        argv += ["--arf-random-weights"] if "--arf-anchors" in argv else []
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(nproc), "-m", "--"]
        command = [sys.executable, *(torchrun if nproc else ["-m"]), "open_clip_train.main", *map(str, argv)]
        status, output = self.call(command, env)
        return Run(status, output, self.folder / "logs" / name)

    def call(self, command: list[str], env: dict[str, str] | None = None) -> tuple[int, str]:
        """Runs a command in a process group of its own; its status and output."""
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            errors="replace",
            env={**self.env, **(env or {})},
            start_new_session=True,
        )
        _RUNNING.add(process)
        try:
            output, _ = process.communicate(timeout=self.context.left)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output = (
                process.communicate()[0] + f"\n(ended: it ran past the check's {self.context.seconds:.0f} s)"
            )
        finally:
            _RUNNING.discard(process)
        return process.returncode, output

    def all(self, calls: list[Any]) -> list[Any]:
        """Results of calls that run side by side, as many at once as may be."""
        with ThreadPoolExecutor(self.context.jobs) as pool:
            return list(pool.map(lambda call: call(), calls))


def equal(one: Any, other: Any) -> bool:
    """Whether two nests of tensors and values are the same to the bit."""
    import torch

    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        same = isinstance(other, dict) and one.keys() == other.keys()
        return same and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


def _same_end(one: Run, other: Run, epoch: int) -> bool:
    left, right = one.checkpoint(epoch), other.checkpoint(epoch)
    return all(equal(left[part], right[part]) for part in ("epoch", "state_dict", "optimizer"))


def deterministic(context: Context) -> Outcome:
    """--arf-deterministic: twice, stopped and resumed, killed and resumed; the step checkpoint itself."""
    found = Outcome()
    epochs = 2
    with Trainers(context) as trainers:
        flags = trainers.data("--arf-deterministic", "--epochs", epochs, "--aug-cfg", "scale=(0.3,1.0)")
        flags += ["--workers", 4 if context.on_gpu else 2]
        flags += [] if context.on_gpu else ["--precision", "fp32"]
        steps = ["--arf-checkpoint-every", 3, "--resume", "latest"]
        stop = trainers.folder / "stop"
        model = {"model": "tiny-vit-dropout"}

        def stopped() -> tuple[Run, Path | None, Run]:
            own = [*flags, *steps, "--arf-stop-file", stop]
            moment = {"ARF_TEST_AT": "0.6", "ARF_TEST_DO": f"touch {stop}"}
            first = trainers.run("stopped", *own, **model, **moment).check()
            saved = next(iter((first.folder / "checkpoints").glob("epoch_0_step_*.pt")), None)
            kept = saved.rename(trainers.folder / saved.name) if saved else None
            if kept is not None:
                saved.hardlink_to(kept)  # the run goes on from it, and removes it in the end
            return first, kept, trainers.run("stopped", *own, **model).check()

        def killed() -> tuple[Run, Run]:
            moment = {"ARF_TEST_AT": "1.5", "ARF_TEST_DO": "kill 0"}
            first = trainers.run("killed", *flags, *steps, **model, **moment)
            return first, trainers.run("killed", *flags, *steps, **model).check()

        calls = {"calm": lambda: trainers.run("calm", *flags, **model).check(), "stopped": stopped}
        if not context.tiny:
            calls |= {
                "again": lambda: trainers.run("again", *flags, **model).check(),
                "killed": killed,
                "seeded": lambda: trainers.run("seeded", *flags, "--seed", 1, **model).check(),
            }
        ends = dict(zip(calls, trainers.all(list(calls.values())), strict=True))
        calm, (_, saved, stop_run) = ends["calm"], ends["stopped"]
        found.holds("a step checkpoint was saved on request", saved is not None)
        found.holds("it went on in the middle of an epoch", "goes on after" in stop_run.output)
        found.holds("stopped and resumed ends bitwise identical", _same_end(calm, stop_run, epochs))
        if not context.tiny:
            kill, kill_run = ends["killed"]
            found.holds("two runs end bitwise identical", _same_end(calm, ends["again"], epochs))
            found.holds("another seed ends elsewhere", not _same_end(calm, ends["seeded"], epochs))
            found.holds("a run was killed in the middle", kill.status == -signal.SIGKILL)
            found.holds("killed and resumed ends bitwise identical", _same_end(calm, kill_run, epochs))
            found.holds("it, too, went on in the middle", "goes on after" in kill_run.output)
        losses = calm.losses()
        found.figures |= {"losses": losses, "losses, stopped and resumed": stop_run.losses()}
        found.holds("all losses are finite", bool(losses) and all(map(math.isfinite, losses)))
        if saved is not None:
            content = load(saved)
            found.holds(
                "it holds open_clip's own parts", {"epoch", "state_dict", "optimizer"} <= content.keys()
            )
            if context.on_gpu:
                states = [process["rng"]["cuda"] for process in _rng_of(content)]
                found.holds("and the GPU's random numbers", bool(states) and all(len(s) >= 1 for s in states))
        found.figures["steps"] = len(losses)
    found.summary = f"{', '.join(ends)}: bitwise identical" if all(b.met for b in found.bars) else "differs"
    return found


def _rng_of(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Every nest in a step checkpoint that has random numbers in it."""
    nests: list[dict[str, Any]] = []

    def look(value: Any) -> None:
        if isinstance(value, dict):
            if "cuda" in value and "python" in value:
                nests.append({"rng": value})
            for each in value.values():
                look(each)
        elif isinstance(value, list | tuple):
            for each in value:
                look(each)

    look(content["arf"])
    return nests


def cheaper_pairs(context: Context) -> Outcome:
    """Fewer pairs and --arf-every with --arf-deterministic, twice."""
    found = Outcome()
    with Trainers(context) as trainers:
        flags = trainers.data("--arf-deterministic", "--precision", "amp_bf16", "--arf-every", 2)
        flags += ["--arf-pair-batch-size", 5]
        runs = trainers.all([lambda n=name: trainers.run(n, *flags).check() for name in ("one", "two")])
        found.holds("two runs end bitwise identical", _same_end(*runs, 1))
        found.figures["losses"] = runs[0].losses()
        anchored = re.findall(r"Pair_anchor_loss: (\S+) \(", runs[0].output)
        found.holds(
            "one step in two has anchors",
            [float(value) != 0 for value in anchored]
            == [step % 2 == 0 for step in range(len(anchored))]
            != [],
        )
    found.summary = "bitwise identical" if all(bar.met for bar in found.bars) else "see the bounds"
    return found


def precisions(context: Context) -> Outcome:
    """The trainer's --precision, with and without checkpointing: it trains, and as plain open_clip does."""
    found = Outcome()
    choices = [("amp_bf16", "--grad-checkpointing")] + ([] if context.tiny else [("amp_bf16",)])
    if context.on_gpu:
        choices += [("amp",), ("fp32",), ("bf16",), ("pure_bf16",), ("amp", "--grad-checkpointing")]
    elif not context.tiny:
        choices += [("fp32",), ("pure_bf16",)]
    with Trainers(context) as trainers:

        def train(choice: tuple[str, ...]) -> Run:
            name = "".join(choice)
            return trainers.run(name, *trainers.data("--arf-deterministic", "--precision", *choice))

        runs = trainers.all([lambda c=choice: train(c) for choice in choices])
        for choice, run in zip(choices, runs, strict=True):
            losses = run.losses()
            found.figures[" ".join(choice)] = losses or run.output[-1500:]
            fine = run.status == 0 and len(losses) == 7 and all(map(math.isfinite, losses))
            found.holds(f"--precision {' '.join(choice)}: seven steps, finite losses", fine)
        first = [run.losses()[:1] for run in runs if run.losses()]
        if first:
            values = [value for each in first for value in each]
            found.at_most(
                "spread of the first step's loss over precisions", max(values) / min(values) - 1, 0.03
            )
    found.summary = ", ".join(
        f"{' '.join(c)} {r.losses()[-1:] or 'failed'}" for c, r in zip(choices, runs, strict=True)
    )
    return found


@dataclasses.dataclass(frozen=True)
class Recorded:
    """A run whose step is compared with three forwards on the CPU in fp64; see tests/support/steps.py."""

    name: str
    flags: tuple[Any, ...] = ()
    pair_size: int = 4
    accum_freq: int = 1
    siglip: bool = False
    nproc: int = 0
    every: int = 1
    step: int = 0
    local: bool = False


SINGLE = (
    Recorded("clip, accum 1, A = B", pair_size=TASK_SIZE),
    Recorded("siglip, accum 2", siglip=True, accum_freq=2),
    Recorded("grad checkpointing", ("--grad-checkpointing",)),
    Recorded("every 2, a step without anchors", every=2, step=1),
)
DOUBLE = (
    Recorded("two processes", nproc=2),
    Recorded(
        "two processes, local loss, gather with grad",
        ("--local-loss", "--gather-with-grad"),
        nproc=2,
        local=True,
    ),
    Recorded("two processes, accum 2, checkpointing", ("--grad-checkpointing",), accum_freq=2, nproc=2),
)
COMPILED = (Recorded("compiled", ("--torchcompile",)),)


def trainer_gradients(context: Context) -> Outcome:
    """The step of real runs in fp64 against three forwards of stock open_clip on the CPU, rebuilt from the files."""
    found = Outcome()
    with Trainers(context) as trainers:
        _compare(trainers, SINGLE[-1:] if context.tiny else SINGLE, found)
    return found


def two_processes(context: Context) -> Outcome:
    """Two processes on one device, joined by gloo: the same comparison."""
    found = Outcome()
    with Trainers(context) as trainers:
        _compare(trainers, DOUBLE[1:2] if context.tiny else DOUBLE, found)
    return found


def compiled(context: Context) -> Outcome:
    """--torchcompile: the same comparison, and a run in bfloat16."""
    if context.tiny and not context.on_gpu:
        raise Skipped("compiling for a CPU takes minutes; pytest -m slow has it")
    found = Outcome()
    with Trainers(context) as trainers:
        _compare(trainers, COMPILED, found)
        if not context.tiny:
            flags = trainers.data("--arf-deterministic", "--precision", "amp_bf16")
            plain, fast = trainers.all(
                [
                    lambda: trainers.run("plain", *flags).check(),
                    lambda: trainers.run("fast", *flags, "--torchcompile").check(),
                ]
            )
            pairs = list(zip(plain.losses(), fast.losses(), strict=True))
            found.figures["losses in bfloat16"] = pairs
            found.at_most("compiled, bfloat16: losses apart", max(abs(a / b - 1) for a, b in pairs), 0.05)
    return found


def _compare(trainers: Trainers, cases: tuple[Recorded, ...], found: Outcome) -> None:
    import torch
    from support import reference

    folder = trainers.folder

    def record(case: Recorded) -> Run:
        flags = [
            "--train-data",
            trainers.task.urls,
            "--train-num-samples",
            24,
            "--arf-anchors",
            trainers.anchors,
        ]
        flags += [
            "--precision",
            "fp32",
            "--accum-freq",
            case.accum_freq,
            "--arf-pair-batch-size",
            case.pair_size,
        ]
        flags += ["--arf-every", case.every] if case.every > 1 else []
        flags += ["--siglip"] if case.siglip else []
        # Processes that share one GPU: NCCL refuses that, and the rank is no number of a device.
        flags += ["--dist-backend", "gloo", "--no-set-device-rank"] if case.nproc else []
        env = {
            "ARF_TEST_FP64": "1",
            "ARF_TEST_RECORD": str(folder / _slug(case)),
            "ARF_TEST_RECORD_STEP": str(case.step),
        }
        return trainers.run(
            _slug(case), *flags, *case.flags, *EXACT_CROP, nproc=case.nproc, batch=TASK_SIZE, **env
        )

    runs = dict(zip(cases, trainers.all([lambda c=case: record(c) for case in cases]), strict=True))
    jobs: dict[int, list[reference.Job]] = {}
    for case, run in runs.items():
        if run.status:
            found.figures[case.name] = run.output[-3000:]
            found.holds(f"{case.name}: the trainer ends well", False)
            continue
        for path in folder.glob(f"{_slug(case)}.[0-9]"):  # from the GPU to the CPU
            torch.save(torch.load(path, weights_only=True, map_location="cpu"), path)
        job = reference.Job(
            record=str(folder / _slug(case)),
            anchors=str(trainers.anchors),
            task=str(trainers.task.folder),
            task_size=TASK_SIZE,
            pair_size=case.pair_size,
            siglip=case.siglip,
            accum_freq=case.accum_freq,
            local_loss=case.local,
            gather_with_grad=case.local,
            every=case.every,
            step=case.step,
        )
        jobs.setdefault(max(case.nproc, 1), []).append(job)
    env = {"ARF_TEST_SHIM_ALWAYS": "1", "ARF_TEST_FP64": "1", "CUDA_VISIBLE_DEVICES": ""}
    env["PYTHONPATH"] = os.pathsep.join([trainers.env["PYTHONPATH"], str(TESTS)])
    for nproc, some in jobs.items():
        listed = folder / f"jobs-{nproc}.json"
        listed.write_text(json.dumps([dataclasses.asdict(job) for job in some]))
        launch = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            str(nproc),
        ]
        status, output = trainers.call([*launch, reference.__file__, str(listed)], env)
        if status:
            raise RuntimeError(f"the references cannot be computed:\n{output[-3000:]}")
    worst = 0.0
    for case, run in runs.items():
        if run.status == 0:
            record_path = str(folder / _slug(case))
            error = reference.relative_error(
                record_path, torch.load(f"{record_path}.reference", weights_only=True)
            )
            found.figures[case.name] = error
            found.at_most(
                f"{case.name}: largest relative error of a parameter's gradient, fp64", error, BOUND
            )
            worst = max(worst, error)
    found.summary = f"{len(cases)} kinds of step, fp64: largest relative error {worst:.1e}"


def _slug(case: Recorded) -> str:
    return re.sub(r"[^a-z0-9]+", "-", case.name.lower()).strip("-")


def nccl(context: Context) -> Outcome:
    """A process group of one process, which the trainer is made to join: NCCL on a GPU, gloo on a CPU."""
    found = Outcome()
    group = {"ARF_GPU_CHECK_GROUP_OF_ONE": "1"}
    with Trainers(context) as trainers:
        flags = trainers.data("--arf-deterministic", "--precision", "fp32")
        stop = trainers.folder / "stop"
        in_group = [*flags, "--arf-stop-file", stop, "--resume", "latest"]
        if _can_watch():
            in_group += ["--arf-watch", _held_out(trainers)]
        else:
            found.notes.append("nccl was run without --arf-watch: clip-benchmark is not installed")
        moment = {"ARF_TEST_AT": "0.6", "ARF_TEST_DO": f"touch {stop}"}

        def stopped() -> tuple[Run, Run]:
            first = trainers.run("joined", *in_group, nproc=1, **group, **moment).check()
            return first, trainers.run("joined", *in_group, nproc=1, **group).check()

        alone, (first, joined) = trainers.all([lambda: trainers.run("alone", *flags).check(), stopped])
        found.holds("the trainer was in a group", "Running in distributed mode" in first.output)
        found.holds("it stopped and went on in the middle", "goes on after" in joined.output)
        one, other = (run.checkpoint(1)["state_dict"] for run in (alone, joined))
        other = {name.removeprefix("module."): value for name, value in other.items()}
        apart = max(((one[n] - other[n]).norm() / one[n].norm().clamp_min(1e-12)).item() for n in one)
        found.figures["largest relative difference to a run without a group"] = apart
        found.at_most("weights, in a group of one and without, fp32", apart, 1e-4)
    found.notes.append(
        "open_clip joins no group for one process; here it was told to. NCCL refuses two processes on one GPU."
    )
    found.summary = f"{'NCCL' if context.on_gpu else 'gloo'} with one process: weights {apart:.1e} apart"
    return found


def watch(context: Context) -> Outcome:
    """--arf-watch with drift: rows before and after, and no bit of the training changed."""
    if not _can_watch():
        raise Skipped("clip-benchmark is not installed")
    found = Outcome()
    with Trainers(context) as trainers:
        held_out = _held_out(trainers)
        # Of the default, amp, a CPU's fp16 can overflow with random weights.
        flags = trainers.data("--arf-deterministic", "--precision", "amp" if context.on_gpu else "amp_bf16")
        flags += ["--workers", 2]
        seen, blind = trainers.all(
            [
                lambda: trainers.run("seen", *flags, "--arf-watch", held_out, "--arf-watch-drift").check(),
                lambda: trainers.run("blind", *flags).check(),
            ]
        )
        rows = [json.loads(line) for line in (seen.folder / "arf_watch.jsonl").read_text().splitlines()]
        found.figures["rows"] = rows
        found.holds("a row before training and one after", [row["epoch"] for row in rows] == [0, 1])
        found.holds("training is the same to the bit", _same_end(seen, blind, 1))
        drift = rows[-1].get("drift") or {}
        found.holds("drift is measured", bool(drift) and all(map(math.isfinite, drift.values())))
    found.summary = ", ".join(f"epoch {row['epoch']}: top-1 {row['metrics']['top1']:.1f} %" for row in rows)
    return found


def _can_watch() -> bool:
    return importlib.util.find_spec("clip_benchmark") is not None


def _held_out(trainers: Trainers) -> Path:
    from support import evaluation

    return evaluation.write_set(trainers.folder / "held-out")
