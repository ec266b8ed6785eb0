"""Several processes through the real trainer: every flag that changes how they work together, and two machines.

That gradients are those of stock open_clip is in test_step_equals_three_forwards.py; here whole runs are compared with
stock ones by the same flags: where open_clip itself fails, ARF fails in the same way.
"""

from __future__ import annotations

import math
import re
import sys
import time

import pytest
from support import nodes

pytestmark = pytest.mark.slow

TERMS = ("Contrastive_loss", "Caption_anchor_loss", "Pair_anchor_loss")

NORMS = "--lock-text-freeze-layer-norm"
COMBINATIONS = {
    "local": ("--local-loss",),
    "grad": ("--gather-with-grad",),
    "local-grad": ("--local-loss", "--gather-with-grad"),
    "static": ("--ddp-static-graph",),
    "checkpointing": ("--grad-checkpointing",),
    "static-checkpointing": ("--ddp-static-graph", "--grad-checkpointing"),
    "fp32": ("--precision", "fp32"),
    "amp": ("--precision", "amp"),
    "amp_bf16": ("--precision", "amp_bf16"),
    "pure_bf16": ("--precision", "pure_bf16"),
    "lock-image": ("--lock-image",),
    "lock-image-unlocked": ("--lock-image", "--lock-image-unlocked-groups", "1"),
    "lock-text": ("--lock-text",),
    "lock-text-norms": ("--lock-text", NORMS),
    "lock-text-unlocked": ("--lock-text", NORMS, "--lock-text-unlocked-layers", "1"),
    "lock-both": ("--lock-image", "--lock-text", NORMS),
    "compile": ("--torchcompile",),
    "compile-local": ("--torchcompile", "--local-loss"),
    "compile-grad": ("--torchcompile", "--gather-with-grad"),
    "compile-local-grad": ("--torchcompile", "--local-loss", "--gather-with-grad"),
    "distill": ("--distill-model", "tiny-vit", "--distill-pretrained", ""),
    **{
        f"siglip-{impl}": ("--siglip", "--loss-dist-impl", impl)
        for impl in ("bidir", "shift", "reduce", "gather")
    },
    "siglip-bf16": ("--siglip", "--precision", "pure_bf16"),
}

# What stock open_clip 3.3 cannot do by itself, and the end of what it says.
UPSTREAM_FAILS = {"lock-text": "AssertionError: Unfreezing LayerNorm is not supported."}


def values(run, term: str) -> list[float]:
    return [float(value) for value in re.findall(rf" {term}: ([\d.eE+-]+) \(", run.output)]


@pytest.mark.parametrize("name", COMBINATIONS)
def test_arf_works_where_stock_open_clip_does(train, task, anchors, name):
    common = (*task.flags, *COMBINATIONS[name])
    options = {"nproc": 2, "check": False, "timeout": 1200}  # compiling takes minutes where much else runs
    stock = train.forked(*common, name="stock", **options)
    ours = train.forked(*common, "--arf-anchors", anchors, name="arf", **options)
    if name in UPSTREAM_FAILS:
        assert stock.status != 0 and UPSTREAM_FAILS[name] in stock.output, stock.output
        assert ours.status != 0 and UPSTREAM_FAILS[name] in ours.output, ours.output
        return
    assert stock.status == 0, stock.output
    assert ours.status == 0, ours.output
    assert len(values(stock, TERMS[0])) == 2
    for term in TERMS:
        assert len(values(ours, term)) == 2 and all(math.isfinite(value) for value in values(ours, term))


def test_four_processes(train, task, anchors):
    run = train(*task.flags, "--arf-anchors", anchors, nproc=4, batch_size=4)
    assert run.output.count("ARF is on") == 1 and all(len(values(run, term)) == 2 for term in TERMS)


def test_a_machine_that_dies_and_comes_back(train, task, anchors, tmp_path):
    """Two machines under torchrun's c10d rendezvous; the second loses power after the first checkpoint."""
    if (reason := nodes.missing()) is not None:
        pytest.skip(reason)
    train.logs.mkdir(parents=True)
    data_flags = ("--train-data", task.urls, "--train-num-samples", 480, "--arf-anchors", anchors)
    flags = train.argv((*data_flags, "--epochs", 8, "--resume", "latest"), "run", "tiny-vit", 4)
    checkpoints = train.logs / "run" / "checkpoints"
    with nodes.two_nodes() as (first, second):

        def start(node):
            torchrun = [
                *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"),
                *("--nproc_per_node", "1"),
            ]
            torchrun += [
                *("--rdzv_backend", "c10d", "--rdzv_endpoint", f"{first.address}:29400"),
                *("--rdzv_id", "arf"),
            ]
            torchrun += [
                *("--local_addr", node.address, "--max_restarts", "3", "-m"),
                *("--", "open_clip_train.main"),
            ]
            env = {**train.env, "GLOO_SOCKET_IFNAME": node.device, "TP_SOCKET_IFNAME": node.device}
            # Without it the machine that lasts keeps the first round's address, and the one that is back waits for it.
            env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
            return node.start([*torchrun, *flags], env, tmp_path / f"{node.name[-1]}.out")

        lasting, dying = start(first), start(second)
        wait_for(lambda: (checkpoints / "epoch_2.pt").is_file() or lasting.poll() is not None, 240)
        outputs = "".join(path.read_text() for path in sorted(tmp_path.glob("?.out")))
        assert lasting.poll() is None and dying.poll() is None, outputs
        assert not (checkpoints / "epoch_8.pt").is_file(), "the run is over before the machine dies"
        assert second.cut_power() >= 2
        dying.wait(30)
        back = start(second)
        statuses = lasting.wait(300), back.wait(60)
    outputs = "".join(path.read_text() for path in sorted(tmp_path.glob("?.out")))
    assert statuses == (0, 0), outputs
    log = (train.logs / "run" / "out.log").read_text()
    resumed = re.findall(r"resuming checkpoint '.*epoch_(\d+)\.pt'", log)
    assert resumed and int(resumed[-1]) >= 2 and (checkpoints / "epoch_8.pt").is_file(), outputs
    assert log.count("ARF is on") == 2 and "Pair_anchor_loss" in log.rpartition("resuming checkpoint")[2]


def wait_for(condition, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"nothing after {seconds} s"
        time.sleep(0.2)
