"""Recorded optimizer steps of the real trainer, and their references from stock open_clip."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from support import data, reference, releases, trainer

TASK_SIZE = 6
BOUND = 1e-10


@dataclasses.dataclass(frozen=True)
class Case:
    """One combination of flags."""

    siglip: bool
    accum_freq: int
    pair_size: int
    nproc: int
    local_loss: bool

    def __str__(self) -> str:
        loss = "siglip" if self.siglip else "clip"
        local = "-local" if self.local_loss else ""
        return f"{loss}-accum{self.accum_freq}-A{self.pair_size}-nproc{self.nproc}{local}"

    @property
    def flags(self) -> list[object]:
        flags: list[object] = ["--accum-freq", self.accum_freq, "--arf-pair-batch-size", self.pair_size]
        flags += ["--siglip"] if self.siglip else []
        return flags + (["--local-loss", "--gather-with-grad"] if self.local_loss else [])


FEW_CASES = [
    Case(siglip, accum_freq, pair_size=4, nproc=nproc, local_loss=nproc == 2)
    for siglip in (False, True)
    for accum_freq in (1, 2)
    for nproc in (1, 2)
]


def run(cases: list[Case], folder: Path, model_configs: Path) -> dict[Case, tuple[trainer.Run, Path]]:
    """Runs cases through the trainer, then the references: case -> (run, path that the records begin with)."""
    task = data.write_task(folder / "task", shards=4, per_shard=8)
    anchors = folder / "anchors"
    data.write_captions(anchors, {identity: f"a caption of {identity}" for identity in task.ids})
    data.write_pairs(anchors, shards=4, per_shard=6)

    def record(case: Case) -> trainer.Run:
        train = trainer.Trainer(folder / "logs", model_configs, folder / "cache")
        flags = ["--train-data", task.urls, "--train-num-samples", 24, "--arf-anchors", anchors, *case.flags]
        env = {"ARF_TEST_FP64": "1", "ARF_TEST_RECORD": str(folder / str(case))}
        return train.forked(
            *flags, nproc=case.nproc, name=str(case), batch_size=TASK_SIZE, env=env, check=False
        )

    single = [case for case in cases if case.nproc == 1]
    double = [case for case in cases if case.nproc == 2]
    with ThreadPoolExecutor(2) as pool:
        finished = dict(zip(single, pool.map(record, single), strict=True))
    finished.update({case: record(case) for case in double})
    for nproc, some in ((1, single), (2, double)):
        jobs = [
            reference.Job(
                record=str(folder / str(case)),
                anchors=str(anchors),
                task=str(task.folder),
                task_size=TASK_SIZE,
                pair_size=case.pair_size,
                siglip=case.siglip,
                accum_freq=case.accum_freq,
                local_loss=case.local_loss,
                gather_with_grad=case.local_loss,
            )
            for case in some
            if finished[case].status == 0
        ]
        _run_references(folder / f"jobs-{nproc}.json", jobs, nproc, model_configs)
    return {case: (finished[case], folder / str(case)) for case in cases}


def _run_references(path: Path, jobs: list[reference.Job], nproc: int, model_configs: Path) -> None:
    path.write_text(json.dumps([dataclasses.asdict(job) for job in jobs]))
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(nproc)]
    env = {
        **os.environ,
        "PYTHONPATH": releases.path(trainer.SHIM),
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
