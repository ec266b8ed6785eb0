"""Recorded optimizer steps of the real trainer, and their references from stock open_clip."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import open_clip
import open_clip_train
import torch
from packaging.version import Version

from arf_plugin.hooks.source_patches import Series
from arf_plugin.hooks.table import trains_tasks
from support import data, forks, reference, releases, trainer

TASK_SIZE = 6
BOUND = 1e-10
TEACHER_WEIGHT = 7.0


@dataclasses.dataclass(frozen=True)
class Case:
    """One combination of flags.

    Attributes:
        siglip: SigLipLoss rather than ClipLoss.
        accum_freq: Micro-batches in a step.
        pair_size: A.
        nproc: Processes.
        distributed: The trainer's flags for several processes, and for saving memory.
        patched: Whether sources with the patches of patches/ run, in the place of hooks.
        model: Name of the model.
        every: --arf-every.
        step: Which step is recorded, from 0.
        pair_loss: --arf-pair-loss.
        caption_loss: --arf-caption-loss.
        teacher: --arf-teacher; at the first step its term has no gradient.
    """

    siglip: bool
    accum_freq: int
    pair_size: int
    nproc: int
    distributed: tuple[str, ...] = ()
    patched: bool = False
    model: str = "tiny-long"
    every: int = 1
    step: int = 0
    pair_loss: str = "contrastive"
    caption_loss: str = "contrastive"
    teacher: str | None = None

    @property
    def by_feature(self) -> bool:
        return (self.pair_loss, self.caption_loss) != ("contrastive", "contrastive")

    def __str__(self) -> str:
        loss = "siglip" if self.siglip else "clip"
        distributed = "".join(flag.replace("--", "-") for flag in self.distributed)
        patched = "-patched" if self.patched else ""
        patched += f"-{self.model}" if self.model != "tiny-long" else ""
        patched += f"-every{self.every}-step{self.step}" if self.every > 1 else ""
        if self.by_feature:
            patched += f"-pairs-{self.pair_loss}-captions-{self.caption_loss}-step{self.step}"
        patched += f"-teacher-{self.teacher}" if self.teacher else ""
        return f"{loss}-accum{self.accum_freq}-A{self.pair_size}-nproc{self.nproc}{distributed}{patched}"

    @property
    def flags(self) -> list[object]:
        flags: list[object] = ["--accum-freq", self.accum_freq, "--arf-pair-batch-size", self.pair_size]
        flags += ["--arf-every", self.every] if self.every > 1 else []
        if self.by_feature:
            flags += ["--arf-pair-loss", self.pair_loss, "--arf-caption-loss", self.caption_loss]
        if self.teacher:
            flags += ["--arf-teacher", self.teacher, "--arf-teacher-weight", TEACHER_WEIGHT]
        return flags + (["--siglip"] if self.siglip else []) + list(self.distributed)

    @property
    def dist_impl(self) -> str | None:
        """SigLIP's way to exchange texts."""
        impl = "--loss-dist-impl"
        return self.distributed[self.distributed.index(impl) + 1] if impl in self.distributed else None


LOCAL, GRAD = "--local-loss", "--gather-with-grad"
GATHERS = ((), (LOCAL,), (GRAD,), (LOCAL, GRAD))
EXCHANGES = tuple(("--loss-dist-impl", impl) for impl in ("bidir", "shift", "reduce", "gather"))
COMPILED = ("--torchcompile",)
MEMORY = (("--ddp-static-graph",), ("--grad-checkpointing",), ("--ddp-static-graph", "--grad-checkpointing"))

# Both losses alone, and in two processes every size with one way to gather or to exchange.
SIZES = tuple(itertools.product((1, 2), (TASK_SIZE, 4)))
CASES = [
    *(Case(siglip, *size, 1) for siglip in (False, True) for size in SIZES[1:3]),
    *(
        Case(siglip, *size, 2, way)
        for siglip, ways in ((False, GATHERS), (True, EXCHANGES))
        for size, way in zip(SIZES, ways, strict=True)
    ),
    Case(False, 2, 4, 1, patched=True),
    # Texts are trimmed in all of them; here with what else changes how a tower runs.
    Case(False, 1, 4, 2, ("--grad-checkpointing",)),
    Case(False, 1, 4, 1, model="tiny-custom"),
    # A step with anchors and one without.
    Case(True, 2, 4, 1, every=2, step=0),
    Case(False, 1, TASK_SIZE, 2, (LOCAL, GRAD), every=2, step=1),
    # Anchors by their features; where the mean of differences is not 0 any more.
    Case(True, 2, 4, 1, pair_loss="feature", caption_loss="feature"),
    Case(False, 2, 4, 2, (LOCAL, GRAD), step=2, pair_loss="difference", caption_loss="feature"),
    Case(False, 1, TASK_SIZE, 1, every=2, step=2, pair_loss="difference"),
    # The teacher beside anchors and, on a step without them, alone.
    Case(False, 2, 4, 1, teacher="average", step=1),
    Case(True, 1, 4, 2, teacher="start", every=2, step=1),
]

# What is left: other sizes, sizes in two processes with the usual way, every way with every size in four, and what
# saves memory or time with every way in two.
SLOW_CASES = [
    *(Case(siglip, *size, 1) for siglip in (False, True) for size in (SIZES[0], SIZES[3])),
    Case(False, 1, 4, 2, (LOCAL, GRAD)),
    Case(True, 1, TASK_SIZE, 2, patched=True),
    Case(False, 1, 4, 1, ("--grad-checkpointing",)),
    Case(False, 1, 4, 2, model="tiny-custom"),
    Case(True, 2, 4, 1, every=2, step=1),
    Case(False, 1, TASK_SIZE, 2, (LOCAL, GRAD), every=2, step=0),
    *(Case(siglip, *size, 2) for siglip in (False, True) for size in SIZES if siglip or size != SIZES[0]),
    *(
        Case(siglip, accum_freq, 4, 4, way)
        for siglip, ways in ((False, GATHERS), (True, EXCHANGES))
        for accum_freq in (1, 2)
        for way in ways
    ),
    *(Case(False, 1, 4, 2, (*memory, *way)) for memory in MEMORY for way in GATHERS),
    *(Case(True, 1, 4, 2, memory) for memory in MEMORY),
    *(Case(False, 2, 4, 2, memory) for memory in MEMORY),
    *(Case(False, 1, 4, 2, (*COMPILED, *way)) for way in GATHERS),
    Case(False, 2, 4, 2, COMPILED),
    Case(True, 1, 4, 2, COMPILED),
    *(
        Case(siglip, accum_freq, 4, nproc, way, step=step, pair_loss=pair_loss, caption_loss=caption_loss)
        for siglip, ways in ((False, GATHERS), (True, EXCHANGES))
        for accum_freq in (1, 2)
        for nproc, way in ((1, ()), *((2, way) for way in ways))
        for pair_loss, caption_loss, step in (
            ("feature", "contrastive", 0),
            ("contrastive", "feature", 1),
            ("difference", "feature", 2),
        )
    ),
    *(
        Case(False, accum_freq, 4, 2, (*flags, LOCAL, GRAD), step=1, pair_loss=loss, caption_loss="feature")
        for loss in ("feature", "difference")
        for accum_freq in (1, 2)
        for flags in (*MEMORY, COMPILED)
    ),
    *(Case(False, 2, 4, 1, patched=True, step=1, pair_loss=loss) for loss in ("feature", "difference")),
    Case(False, 1, 4, 4, (LOCAL, GRAD), step=2, pair_loss="difference", caption_loss="feature"),
    *(
        Case(siglip, accum_freq, 4, nproc, teacher=teacher, step=1)
        for siglip in (False, True)
        for accum_freq, nproc in ((1, 1), (2, 2), (1, 4))
        for teacher in ("start", "average")
    ),
    *(
        Case(False, 1, 4, 2, flags, teacher="average", step=1)
        for flags in ((LOCAL, GRAD), ("--grad-checkpointing",), ("--ddp-static-graph",), COMPILED)
    ),
    Case(False, 1, 4, 1, model="tiny-custom", teacher="average", step=1),
]

# For other releases than the environment's: both losses, with and without accumulation, one and two processes.
FEW_CASES = [
    Case(siglip, accum_freq, 4, nproc, (LOCAL, GRAD) if nproc == 2 else ())
    for siglip in (False, True)
    for accum_freq in (1, 2)
    for nproc in (1, 2)
] + [
    Case(False, 1, 4, 1, ("--grad-checkpointing",)),
    Case(False, 1, 4, 1, model="tiny-custom"),
    Case(False, 1, 4, 1, every=2, step=1),
    Case(False, 2, 4, 1, pair_loss="feature", caption_loss="feature"),
    Case(True, 1, 4, 2, step=2, pair_loss="difference", caption_loss="feature"),
    Case(False, 2, 4, 1, teacher="average", step=1),
]

# What only open_clip 4 has. FSDP casts parameters to what the precision says, rather than leave them to autocast.
FSDP = ("--fsdp", "--precision", "fp32")
FSDP_CASES = [
    *(Case(siglip, accum_freq, 4, 2, (*FSDP,)) for siglip in (False, True) for accum_freq in (1, 2)),
    *(
        Case(False, accum_freq, 4, 2, (*FSDP, LOCAL, GRAD), step=1, pair_loss=loss, caption_loss="feature")
        for loss in ("feature", "difference")
        for accum_freq in (1, 2)
    ),
    Case(False, 1, TASK_SIZE, 2, (*FSDP, LOCAL, GRAD)),
    Case(False, 1, 4, 2, (*FSDP, "--grad-checkpointing", LOCAL, GRAD)),
    Case(False, 1, 4, 4, (*FSDP, "--fsdp-no-reshard-after-forward")),
    Case(False, 1, 4, 2, FSDP, teacher="start", step=1),
]


def slow_cases() -> list[Case]:
    """All other cases, of the release in front of the environment's as far as open_clip has the flags there."""
    if not releases.ONE_RELEASE:
        return SLOW_CASES
    tasks = trains_tasks(releases.current())
    exchanges = Version(releases.current()) >= Version("2.32")
    return [
        case
        for case in dict.fromkeys((*CASES, *SLOW_CASES, *(FSDP_CASES if tasks else ())))
        if case not in FEW_CASES and not case.patched and (exchanges or case.dist_impl is None)
        if not (tasks and _broken_by_tasks(case))
    ]


def _broken_by_tasks(case: Case) -> bool:
    """What stock open_clip 4 does not do right: a test of tests/integration/hooks/test_create_task.py shows it."""
    accumulates = case.accum_freq > 1
    static = accumulates and "--ddp-static-graph" in case.distributed
    compiled = set(COMPILED) <= set(case.distributed) and GRAD not in case.distributed
    return static or (compiled and not case.siglip and not accumulates)


def run(cases: list[Case], folder: Path, model_configs: Path) -> dict[Case, tuple[trainer.Run, Path]]:
    """Runs cases through the trainer, then the references: case -> (run, path that the records begin with)."""
    task = data.write_task(folder / "task", shards=4, per_shard=8)
    anchors = folder / "anchors"
    data.write_captions(anchors, {identity: f"a caption of {identity}" for identity in task.ids})
    data.write_pairs(anchors, shards=4, per_shard=6)
    start = folder / "start.pt"
    if any(case.by_feature for case in cases):
        open_clip.add_model_config(model_configs)
        data.write_features(anchors, data.start_of("tiny-long", start, torch.float64), "tiny-long")
    fork = folder / f"fork-{releases.current()}"
    if any(case.patched for case in cases):
        shutil.copytree(Path(open_clip_train.__file__).parent, fork / "open_clip_train")
        Series("arf", releases.current()).change(fork)

    def record(case: Case) -> trainer.Run:
        train = trainer.Trainer(folder / "logs", model_configs, folder / "cache")
        samples = TASK_SIZE * case.accum_freq * case.nproc * (case.step + 1)
        flags = ["--train-data", task.urls, "--train-num-samples", samples, "--arf-anchors", anchors]
        flags += ["--pretrained", start] if case.by_feature else []
        options = {
            "nproc": case.nproc,
            "name": str(case),
            "model": case.model,
            "batch_size": TASK_SIZE,
            "env": {
                "ARF_TEST_FP64": "1",
                "ARF_TEST_RECORD": str(folder / str(case)),
                "ARF_TEST_RECORD_STEP": str(case.step),
            },
            "open_clip": fork if case.patched else None,
            "check": False,
        }
        return train.forked(*flags, *case.flags, timeout=1200, **options)

    by_size = {nproc: [case for case in cases if case.nproc == nproc] for nproc in (1, 2, 4)}
    with ThreadPoolExecutor(2) as pool:
        finished = dict(zip(by_size[1], pool.map(record, by_size[1]), strict=True))
    finished.update({case: record(case) for case in by_size[2] + by_size[4]})
    for nproc, some in by_size.items():
        jobs = [
            reference.Job(
                record=str(folder / str(case)),
                anchors=str(anchors),
                task=str(task.folder),
                task_size=TASK_SIZE,
                pair_size=case.pair_size,
                siglip=case.siglip,
                accum_freq=case.accum_freq,
                local_loss=LOCAL in case.distributed,
                gather_with_grad=GRAD in case.distributed,
                loss_dist_impl=case.dist_impl,
                model=case.model,
                every=case.every,
                step=case.step,
                caption_loss=case.caption_loss,
                pair_loss=case.pair_loss,
                start=str(start),
                teacher=case.teacher,
                teacher_weight=TEACHER_WEIGHT,
                steps=case.step + 1,
            )
            for case in some
            if finished[case].status == 0
        ]
        if jobs:
            _run_references(folder / f"jobs-{nproc}.json", jobs, nproc, model_configs)
    return {case: (finished[case], folder / str(case)) for case in cases}


def _run_references(path: Path, jobs: list[reference.Job], nproc: int, model_configs: Path) -> None:
    path.write_text(json.dumps([dataclasses.asdict(job) for job in jobs]))
    env = {
        **os.environ,
        "ARF_TEST_SHIM_ALWAYS": "1",
        "ARF_TEST_FP64": "1",
        "ARF_TEST_MODEL_CONFIGS": str(model_configs),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    output = path.with_suffix(".out")
    processes = [
        forks.start(reference.__file__, [str(path)], {**env, **told}, output)
        for told in forks.torchrun_env(nproc)
    ]
    run = trainer.Started(processes, output, path.parent).wait(1200)
    assert run.status == 0, run.output
