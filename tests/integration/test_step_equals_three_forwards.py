"""One optimizer step of the real trainer with anchors, against three separate passes of stock open_clip, in fp64."""

from __future__ import annotations

import dataclasses
import importlib.metadata
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
    local_loss: bool
    patched: bool = False

    def __str__(self) -> str:
        loss = "siglip" if self.siglip else "clip"
        local = "-local" if self.local_loss else ""
        return f"{loss}-accum{self.accum_freq}-A{self.pair_size}-nproc{self.nproc}{local}{'-patched' * self.patched}"

    @property
    def flags(self) -> list[object]:
        flags: list[object] = ["--accum-freq", self.accum_freq, "--arf-pair-batch-size", self.pair_size]
        flags += ["--siglip"] if self.siglip else []
        return flags + (["--local-loss", "--gather-with-grad"] if self.local_loss else [])


CASES = [
    Case(siglip, accum_freq, pair_size, nproc, local_loss)
    for siglip in (False, True)
    for accum_freq in (1, 2)
    for pair_size in (TASK_SIZE, 4)
    for nproc, local_loss in ((1, False), (2, False), (2, True))
]
# Sources with the patches of patches/ in the place of hooks.
CASES += [Case(False, 2, 4, 1, False, patched=True), Case(True, 1, TASK_SIZE, 2, False, patched=True)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, model_configs):
    """Runs every case through the trainer, then the references; case -> (run, reference gradients' path)."""
    folder = tmp_path_factory.mktemp("steps")
    task = data.write_task(folder / "task", shards=4, per_shard=8)
    anchors = folder / "anchors"
    data.write_captions(anchors, {identity: f"a caption of {identity}" for identity in task.ids})
    data.write_pairs(anchors, shards=4, per_shard=6)
    fork = folder / "fork"
    shutil.copytree(Path(open_clip_train.__file__).parent, fork / "open_clip_train")
    Series("arf", importlib.metadata.version("open_clip_torch")).apply(fork)

    def run(case: Case) -> trainer.Run:
        train = trainer.Trainer(folder / "logs", model_configs, folder / "cache")
        flags = ["--train-data", task.urls, "--train-num-samples", 24, "--arf-anchors", anchors, *case.flags]
        env = {"ARF_TEST_FP64": "1", "ARF_TEST_RECORD": str(folder / str(case))}
        return train(
            *flags,
            nproc=case.nproc,
            name=str(case),
            batch_size=TASK_SIZE,
            env=env,
            open_clip=fork if case.patched else None,
            check=False,
        )

    single = [case for case in CASES if case.nproc == 1]
    double = [case for case in CASES if case.nproc == 2]
    with ThreadPoolExecutor(2) as pool:
        finished = dict(zip(single, pool.map(run, single), strict=True))
    finished.update({case: run(case) for case in double})
    for nproc, cases in ((1, single), (2, double)):
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
            for case in cases
            if finished[case].status == 0
        ]
        _run_references(folder / f"jobs-{nproc}.json", jobs, nproc, model_configs)
    return {case: (finished[case], folder / str(case)) for case in CASES}


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


@pytest.mark.parametrize("missing", range(3), ids=["task", "caption", "pair"])
def test_the_comparison_notices_a_missing_term(runs, missing):
    """The comparison above can fail: without any one of the terms the reference is far off."""
    _, record = runs[CASES[0]]
    terms = torch.load(f"{record}.reference", weights_only=True)
    assert reference.relative_error(str(record), terms[:missing] + terms[missing + 1 :]) > 0.1
