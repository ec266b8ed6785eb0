"""Anchor building and training on a real SLURM, which these tests start on this machine.

Needs Debian's packages slurm-wlm and munge; see scripts/slurm/local_cluster.sh.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support import building
from support.building import folder_bytes
from support.building_fixtures import Inputs
from support.resuming import assert_same_end, steps
from support.slurm import SCRIPTS, Cluster, until
from support.trainer import Run, Trainer

SHARDS = 60

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not shutil.which("slurmctld", path=f"{os.environ['PATH']}:/usr/sbin"),
        reason="needs SLURM: apt-get install slurm-wlm munge",
    ),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="arf-slurm-"))
    made = Cluster(folder)
    made.script("start")
    yield made
    made.script("stop")
    shutil.rmtree(folder)


@dataclass(frozen=True)
class Work:
    """Task data of many small shards, to be shared and interrupted, and what one process makes of it."""

    task: str
    captions: dict[str, bytes]
    vectors: dict[str, bytes]


@pytest.fixture(scope="module")
def work(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Work:
    from arf_plugin.cli.main import main

    folder = tmp_path_factory.mktemp("work")
    task = building.write_task(folder / "task", shards=SHARDS, per_shard=12)
    assert main(["caption", "--task-data", task, *caption_flags(inputs), "--out", str(folder / "A")]) == 0
    assert main(["embed", "--task-data", task, "--model", inputs.clip, "--out", str(folder / "E")]) == 0
    return Work(task, folder_bytes(folder / "A"), folder_bytes(folder / "E"))


GENERATION = (
    "--min-new-tokens",
    "3",
    "--max-new-tokens",
    "20",
    "--num-beams",
    "3",
)  # beams: not too quick to kill


def caption_flags(inputs: Inputs) -> tuple[str, ...]:
    return ("--captioner", inputs.captioner, *GENERATION)


def submit_captions(cluster: Cluster, inputs: Inputs, work: Work, out: Path, array: str) -> str:
    return cluster.submit(
        "caption.sbatch",
        f"--array={array}",
        stage_flags=GENERATION,
        TASK_DATA=work.task,
        CAPTIONER=inputs.captioner,
        OUT=out,
    )


def test_four_array_tasks_give_the_bytes_of_one_process(
    cluster: Cluster, inputs: Inputs, work: Work, tmp_path: Path
):
    jobs = cluster.wait(submit_captions(cluster, inputs, work, tmp_path / "A", "0-3"))
    assert len(jobs) == 4
    assert folder_bytes(tmp_path / "A") == work.captions
    job = cluster.submit(
        "embed.sbatch", "--array=5-8", TASK_DATA=work.task, MODEL=inputs.clip, OUT=tmp_path / "E"
    )
    assert len(cluster.wait(job)) == 4
    assert folder_bytes(tmp_path / "E") == work.vectors


def test_tasks_of_srun_within_an_array_give_the_bytes_of_one_process(
    cluster: Cluster, inputs: Inputs, work: Work, tmp_path: Path
):
    job = cluster.submit(
        "embed.sbatch",
        "--array=0-1",
        "--ntasks=2",
        TASK_DATA=work.task,
        MODEL=inputs.clip,
        OUT=tmp_path / "E",
    )
    assert len(cluster.wait(job)) == 2
    assert folder_bytes(tmp_path / "E") == work.vectors


def test_two_processes_of_torchrun_give_the_bytes_of_one(inputs: Inputs, work: Work, tmp_path: Path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for argv, out, expected in (
        (["caption", *caption_flags(inputs)], tmp_path / "A", work.captions),
        (["embed", "--model", inputs.clip], tmp_path / "E", work.vectors),
    ):
        stage = [*torchrun, "-m", "arf_plugin.cli.main", *argv, "--task-data", work.task, "--out", str(out)]
        done = subprocess.run(stage, capture_output=True, text=True, check=False, timeout=240)
        assert done.returncode == 0, done.stderr
        assert folder_bytes(out) == expected


def test_an_array_with_gaps_fails_and_says_why(cluster: Cluster, inputs: Inputs, work: Work, tmp_path: Path):
    job = submit_captions(cluster, inputs, work, tmp_path / "A", "0,2")
    cluster.wait(job, "FAILED")
    assert "there are gaps between them" in (cluster.folder / f"arf-caption-{job}_2.log").read_text()


def kill_step(cluster: Cluster, task: str) -> None:
    """Kills the process of a task's step outright, as a machine short of memory would."""
    (job,) = cluster.jobs(task)
    listed = cluster.run("scontrol", "listpids", f"{job['JobId']}.0", job["NodeList"]).stdout.splitlines()[1:]
    (pid,) = [line.split()[0] for line in listed if line.split()[3] == "0"]
    os.kill(int(pid), signal.SIGKILL)


# How a task may end before its work does, and the state that it is then in.
INTERRUPTIONS: dict[str, tuple[Callable[[Cluster, str], object], str]] = {
    "its step is killed": (kill_step, "FAILED"),
    "it is requeued while it runs": (
        lambda cluster, task: cluster.run("scontrol", "requeue", task),
        "PENDING",
    ),
    "its time is nearly up": (
        lambda cluster, task: cluster.run("scancel", "--signal=USR1", "--batch", task),
        "PENDING",
    ),
}


@pytest.mark.parametrize("interruption", INTERRUPTIONS)
def test_an_interrupted_array_task_goes_on_and_ends_with_the_same_bytes(
    cluster: Cluster, inputs: Inputs, work: Work, tmp_path: Path, interruption: str
):
    out, done = tmp_path / "A", tmp_path / "A/work/caption/done"
    array = submit_captions(cluster, inputs, work, out, "0-1")
    task = f"{array}_1"  # the array's last task; its own job id is the array's
    mine = [f"{number:05d}.json" for number in range(1, SHARDS, 2)]
    until(lambda: (done / mine[1]).exists(), "the first two shards")
    interrupt, state = INTERRUPTIONS[interruption]
    interrupt(cluster, task)
    until(lambda: cluster.jobs(task)[0]["JobState"] == state, f"{task} to be {state}")
    before = {name: (done / name).stat().st_mtime_ns for name in mine if (done / name).exists()}
    assert 2 <= len(before) < len(mine), "the interruption came too late to show anything"
    if state == "FAILED":
        cluster.run("scontrol", "requeue", task)
    jobs = {job["ArrayTaskId"]: job for job in cluster.wait(array)}
    assert (jobs["0"]["Restarts"], jobs["1"]["Restarts"]) == ("0", "1"), (
        "only the interrupted task starts again"
    )
    assert {name: (done / name).stat().st_mtime_ns for name in before} == before, (
        "what was finished was done again"
    )
    assert folder_bytes(out) == work.captions


def test_the_whole_chain_gives_the_bytes_of_arf_anchors(
    cluster: Cluster, inputs: Inputs, arf, tmp_path: Path
):
    generation = ("--min-new-tokens", "3", "--max-new-tokens", "6")
    settings = {"TASK_DATA": inputs.task, "POOL": inputs.pool, "CAPTIONER": inputs.captioner, "MODEL": inputs.clip,
                "K": 3, "SHARD_SIZE": 10, "CAPTION_FLAGS": " ".join(generation), "ARRAY": "0-3"}  # fmt: skip
    one = ["anchors", "--task-data", inputs.task, "--pool", inputs.pool, "--captioner", inputs.captioner, *generation,
           "--model", inputs.clip, "--k", 3, "--shard-size", 10]  # fmt: skip
    arf(*one, "--out", tmp_path / "one")
    settings |= {"OUT": tmp_path / "A", "GPU_SBATCH": "--cpus-per-task=1", "CPU_SBATCH": "--cpus-per-task=1"}
    lines = cluster.run(SCRIPTS / "anchors.sh", **settings).stdout.splitlines()
    jobs = dict(line.split()[:2] for line in lines)
    assert list(jobs) == ["caption", "embed-task", "embed-pool", "retrieve", "pack", "features"]
    for job in jobs.values():
        cluster.wait(job)
    assert len(list((tmp_path / "A/work/logs").iterdir())) == 4 * 4 + 2
    shutil.rmtree(tmp_path / "A/work/logs")
    assert folder_bytes(tmp_path / "A") == folder_bytes(tmp_path / "one")
    _, err = arf(*one, "--out", tmp_path / "A")  # the two ways are one and the same work
    assert err.count("nothing left to do") == 6


def test_what_comes_after_a_failed_stage_is_cancelled(cluster: Cluster, inputs: Inputs, tmp_path: Path):
    settings = {
        "TASK_DATA": inputs.task,
        "POOL": inputs.pool,
        "MODEL": "no-such-model",
        "OUT": tmp_path / "A",
    }
    settings |= {"GPU_SBATCH": "--cpus-per-task=1", "ARRAY": "0"}
    lines = cluster.run(SCRIPTS / "anchors.sh", **settings).stdout.splitlines()
    jobs = dict(line.split()[:2] for line in lines)
    cluster.wait(jobs["embed-pool"], "FAILED")
    cluster.wait(jobs["pack"], "CANCELLED")


def told(train: Trainer) -> dict[str, str]:
    """What a job has to be told of the trainer's environment."""
    return {
        name: value for name, value in train.env.items() if os.environ.get(name) != value and name != "PATH"
    }


def test_training_on_two_nodes_and_requeued_on_one(
    cluster: Cluster, task: Any, anchors: Path, train: Trainer, tmp_path: Path
):
    flags = ("--model", "tiny-vit", "--device", "cpu", "--batch-size", 4, "--workers", 0, "--lr", "1e-3", "--warmup", 1,
             "--train-num-samples", 32, "--save-frequency", 1, "--log-every-n-steps", 1,
             "--arf-random-weights")  # fmt: skip
    variables = {
        **told(train),
        "ANCHORS": anchors,
        "TRAIN_DATA": task.urls,
        "LOGS": tmp_path / "logs",
        "NAME": "run",
    }

    checkpoints = tmp_path / "logs/run/checkpoints"

    def submit(*more: object, nodes: int, processes: int) -> tuple[str, Path]:
        job = cluster.submit(
            "train.sbatch",
            f"--nodes={nodes}",
            stage_flags=(*flags, *more),
            PROCS_PER_NODE=processes,
            **variables,
        )
        return job, cluster.folder / f"arf-train-{job}.log"

    job, log = submit("--epochs", 1, nodes=2, processes=1)
    (ended,) = cluster.wait(job)
    text = log.read_text()
    assert ended["NumNodes"] == "2" and text.count("ARF is on") == 1, text
    assert "Pair_anchor_loss" in text and "Caption_anchor_loss" in text
    assert "Train Epoch: 0 [64/64 (100%)]" in text, text  # a step takes 4 samples and 4 pairs on either node
    assert (checkpoints / "epoch_1.pt").exists()

    job, log = submit("--epochs", 30, nodes=1, processes=2)
    until(lambda: (checkpoints / "epoch_3.pt").exists(), "the third epoch")
    cluster.run("scancel", "--signal=USR1", "--batch", job)  # as SLURM does when time is nearly up
    (ended,) = cluster.wait(job)
    text = log.read_text()
    assert ended["Restarts"] == "1" and "DUE TO JOB REQUEUE" in text
    resumed = [
        int(epoch) for epoch in re.findall(r"resuming checkpoint '.*epoch_latest.pt' \(epoch (\d+)\)", text)
    ]
    assert len(resumed) == 4 and resumed[0] == 1 and 1 < resumed[-1] < 30, text  # both processes, twice
    assert "Train Epoch: 0 " not in text and (checkpoints / "epoch_30.pt").exists()


def test_preempted_training_ends_like_an_undisturbed_one(
    cluster: Cluster, task: Any, anchors: Path, train: Trainer, tmp_path: Path
):
    """Signalled twice within an epoch: step checkpoint, queue, on from there, the same bits."""
    epochs = 12
    flags = ("--train-num-samples", 32, "--arf-deterministic", "--epochs", epochs, "--workers", 2, "--aug-cfg",
             "scale=(0.3,1.0)")  # fmt: skip
    calm = train.forked(
        "--train-data", task.urls, "--arf-anchors", anchors, *flags, name="calm", nproc=2, batch_size=4
    )
    variables = {
        **told(train),
        "ANCHORS": anchors,
        "TRAIN_DATA": task.urls,
        "LOGS": train.logs,
        "NAME": "preempted",
    }
    argv = train.argv((*flags, "--arf-random-weights"), "preempted", "tiny-vit", 4)
    job = cluster.submit(
        "train_preemptible.sbatch",
        stage_flags=tuple(argv),
        PROCS_PER_NODE=2,
        CHECKPOINT_EVERY=1000,
        **variables,
    )
    log = cluster.folder / f"arf-train-{job}.log"
    for epoch, stops in ((1, 1), (5, 2)):
        until(lambda e=epoch: log.exists() and f"Train Epoch: {e} [32/" in log.read_text(), f"epoch {epoch}")
        cluster.run("scancel", "--signal=USR1", "--batch", job)  # as SLURM does when time is nearly up
        until(lambda n=stops: log.read_text().count("asked to stop") == n, "the trainer to obey")
    (ended,) = cluster.wait(job)
    text = log.read_text()
    assert ended["Restarts"] == "2" and text.count("goes on after") == 2, text
    assert not list(train.logs.glob("*.stop"))
    assert_same_end(calm, Run(0, text, train.logs / "preempted"), epochs)
    assert steps(text) == steps(calm.output)


def test_a_fit_that_runs_out_of_time_goes_on_and_leaves_the_same_model(cluster: Cluster, tmp_path: Path):
    for n in range(60):
        path = tmp_path / "images" / building.SHAPES[n % 3] / f"{n}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(building.drawing(n, "PNG"))
    building.save_tiny_clip(tmp_path / "clip")
    found = {"IMAGES": tmp_path / "images", "MODEL": f"local-dir:{tmp_path / 'clip'}"}
    flags = ("--set", "epochs=12", "--json")
    log = tmp_path / "stopped" / "runs" / "recommended-0" / "out.log"
    jobs = [cluster.submit("fit.sbatch", stage_flags=flags, OUT=tmp_path / "calm", **found)]
    cluster.wait(jobs[0], seconds=900)
    jobs.append(cluster.submit("fit.sbatch", stage_flags=flags, OUT=tmp_path / "stopped", **found))
    until(lambda: log.exists() and "Train Epoch: 3 " in log.read_text(), "the fourth epoch", 900)
    cluster.run("scancel", "--signal=USR1", "--batch", jobs[1])  # as SLURM does when time is nearly up
    (ended,) = cluster.wait(jobs[1], seconds=900)
    assert ended["Restarts"] == "1" and "asked to stop" in log.read_text(), log.read_text()
    best = [(tmp_path / name / "best.pt").read_bytes() for name in ("calm", "stopped")]
    assert best[0] == best[1]
