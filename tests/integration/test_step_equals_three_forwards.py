"""One optimizer step of the real trainer with anchors, against three separate passes of stock open_clip, in fp64."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import itertools
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import open_clip_train
import pytest
import torch
from support import data, reference, trainer

from arf_plugin.hooks.source_patches import Series

TASK_SIZE = 6
BOUND = 1e-10


@dataclasses.dataclass(frozen=True)
class Case:
    """One combination of flags."""

    siglip: bool
    accum_freq: int
    pair_size: int
    nproc: int
    distributed: tuple[str, ...] = ()
    patched: bool = False

    def __str__(self) -> str:
        loss = "siglip" if self.siglip else "clip"
        distributed = "".join(flag.replace("--", "-") for flag in self.distributed)
        patched = "-patched" if self.patched else ""
        return f"{loss}-accum{self.accum_freq}-A{self.pair_size}-nproc{self.nproc}{distributed}{patched}"

    @property
    def flags(self) -> list[object]:
        flags: list[object] = ["--accum-freq", self.accum_freq, "--arf-pair-batch-size", self.pair_size]
        return flags + (["--siglip"] if self.siglip else []) + list(self.distributed)

    @property
    def dist_impl(self) -> str | None:
        """SigLIP's way to exchange texts."""
        impl = "--loss-dist-impl"
        return self.distributed[self.distributed.index(impl) + 1] if impl in self.distributed else None


LOCAL, GRAD = "--local-loss", "--gather-with-grad"
GATHERS = ((), (LOCAL,), (GRAD,), (LOCAL, GRAD))
EXCHANGES = tuple(("--loss-dist-impl", impl) for impl in ("bidir", "shift", "reduce", "gather"))
MEMORY = (("--ddp-static-graph",), ("--grad-checkpointing",), ("--ddp-static-graph", "--grad-checkpointing"))

# Every size alone and in two processes; in two, each way to gather or to exchange, one after the other.
SIZES = tuple(itertools.product((1, 2), (TASK_SIZE, 4)))
CASES = [
    Case(siglip, *size, nproc, way)
    for siglip, ways in ((False, GATHERS), (True, EXCHANGES))
    for size, exchange in zip(SIZES, ways, strict=True)
    for nproc, way in dict.fromkeys([(1, ()), (2, ()), (2, exchange)])
] + [Case(False, 1, 4, 2, (LOCAL, GRAD))]

# What is left: every way with every size in four processes, and what saves memory with every way in two.
SLOW = [
    *(
        Case(siglip, accum_freq, 4, 4, way)
        for siglip, ways in ((False, GATHERS), (True, EXCHANGES))
        for accum_freq in (1, 2)
        for way in ways
    ),
    *(Case(False, 1, 4, 2, (*memory, *way)) for memory in MEMORY for way in GATHERS),
    *(Case(True, 1, 4, 2, memory) for memory in MEMORY),
    *(Case(False, 2, 4, 2, memory) for memory in MEMORY),
    Case(False, 1, 4, 1, ("--grad-checkpointing",)),
]
# Sources with the patches of patches/ in the place of hooks.
CASES += [Case(False, 2, 4, 1, patched=True), Case(True, 1, TASK_SIZE, 2, patched=True)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, model_configs):
    """Runs every case through the trainer, then the references; case -> (run, reference gradients' path)."""
    return _run_all(CASES, tmp_path_factory.mktemp("steps"), model_configs)


@pytest.fixture(scope="module")
def slow_runs(tmp_path_factory, model_configs):
    """The same of the other cases."""
    return _run_all(SLOW, tmp_path_factory.mktemp("slow-steps"), model_configs)


def _run_all(cases: list[Case], folder: Path, model_configs: Path) -> dict:
    task = data.write_task(folder / "task", shards=4, per_shard=8)
    anchors = folder / "anchors"
    data.write_captions(anchors, {identity: f"a caption of {identity}" for identity in task.ids})
    data.write_pairs(anchors, shards=4, per_shard=6)
    fork = folder / "fork"
    shutil.copytree(Path(open_clip_train.__file__).parent, fork / "open_clip_train")
    Series("arf", importlib.metadata.version("open_clip_torch")).apply(fork)

    def run(case: Case) -> trainer.Run:
        train = trainer.Trainer(folder / "logs", model_configs, folder / "cache")
        flags = [
            "--train-data",
            task.urls,
            "--train-num-samples",
            48 if case.nproc == 4 else 24,
            "--arf-anchors",
            anchors,
            *case.flags,
        ]
        env = {"ARF_TEST_FP64": "1", "ARF_TEST_RECORD": str(folder / str(case))}
        options = {
            "nproc": case.nproc,
            "name": str(case),
            "batch_size": TASK_SIZE,
            "env": env,
            "check": False,
        }
        # A fork's sources come first on the path of a run of its own; forks of this process have open_clip already.
        return train(*flags, open_clip=fork, **options) if case.patched else train.forked(*flags, **options)

    by_size = {nproc: [case for case in cases if case.nproc == nproc] for nproc in (1, 2, 4)}
    with ThreadPoolExecutor(2) as pool:
        finished = dict(zip(by_size[1], pool.map(run, by_size[1]), strict=True))
    finished.update({case: run(case) for case in by_size[2] + by_size[4]})
    for nproc, these in by_size.items():
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
            )
            for case in these
            if finished[case].status == 0
        ]
        _run_references(folder / f"jobs-{nproc}.json", jobs, nproc, model_configs)
    return {case: (finished[case], folder / str(case)) for case in cases}


def _run_references(path: Path, jobs: list[reference.Job], nproc: int, model_configs: Path) -> None:
    path.write_text(json.dumps([dataclasses.asdict(job) for job in jobs]))
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(nproc)]
    env = {
        **os.environ,
        "PYTHONPATH": str(trainer.SHIM),
        "ARF_TEST_SHIM_ALWAYS": "1",
        "ARF_TEST_FP64": "1",
        "ARF_TEST_MODEL_CONFIGS": str(model_configs),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        [*argv, reference.__file__, str(path)], capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_of_one_step_equal_three_forwards(runs, case):
    run, record = runs[case]
    assert run.status == 0, run.output
    terms = torch.load(f"{record}.reference", weights_only=True)
    assert reference.relative_error(str(record), terms) <= BOUND


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW, ids=str)
def test_gradients_in_every_distributed_combination(slow_runs, case):
    """Static graph and checkpointing change no gradient: the reference does without them."""
    run, record = slow_runs[case]
    assert run.status == 0, run.output
    terms = torch.load(f"{record}.reference", weights_only=True)
    assert reference.relative_error(str(record), terms) <= BOUND


@pytest.mark.parametrize("missing", range(3), ids=["task", "caption", "pair"])
def test_the_comparison_notices_a_missing_term(runs, missing):
    """The comparison above can fail: without any one of the terms the reference is far off."""
    _, record = runs[CASES[0]]
    terms = torch.load(f"{record}.reference", weights_only=True)
    assert reference.relative_error(str(record), terms[:missing] + terms[missing + 1 :]) > 0.1
