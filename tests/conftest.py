"""Small real data and models, and the means to run the real trainer on them."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from support import data

# Nothing here imports torch: pytest-xdist's own process, which runs no test, would have its workers wait for that.


def pytest_collection_modifyitems(items):
    """What runs the trainer or a command starts a process, and so does what loads data in workers."""
    for item in items:
        workers = item.callspec.params.get("workers") if hasattr(item, "callspec") else None
        if workers in range(1, 9) or {"train", "run_arf"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.process)


@pytest.fixture(scope="session", autouse=True)
def _process():
    """`train.forked` forks this process: its children would wait for threads that they have not got.

    In the background, as under nohup, processes ignore Ctrl-C, and so would those that tests interrupt.
    """
    import torch
    from support import forks

    signal.signal(signal.SIGINT, signal.default_int_handler)
    forks.write_without_waiting()
    torch.set_num_threads(1)
    if "open_clip" in sys.modules:
        import support.tokenizer_cache  # noqa: F401


@pytest.fixture(scope="session")
def model_configs(tmp_path_factory) -> Path:
    """A folder of open_clip model configurations: tiny ViTs, one with patch dropout, and a ResNet with BatchNorm."""
    from support import data

    return data.write_model_configs(tmp_path_factory.mktemp("model_configs"))


@pytest.fixture(scope="session")
def task(tmp_path_factory) -> data.Task:
    """Task data as WebDataset shards with `cls` and `txt`: 4 shards of 8 samples, 4 classes."""
    from support import data

    return data.write_task(tmp_path_factory.mktemp("task"), shards=4, per_shard=8)


@pytest.fixture(scope="session")
def anchors(tmp_path_factory, task) -> Path:
    """An anchor set for `task`: a caption per sample, and 4 shards of 6 pairs."""
    from support import data

    folder = tmp_path_factory.mktemp("anchors")
    data.write_captions(folder, {identity: f"a caption of {identity}" for identity in task.ids})
    data.write_pairs(folder, shards=4, per_shard=6)
    return folder


@pytest.fixture
def train(tmp_path, model_configs):
    """Runs the trainer by its literal command line; see `support.trainer.Trainer`."""
    from support import trainer

    return trainer.Trainer(tmp_path / "logs", model_configs, tmp_path / "cache")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ARF_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def run_arf():
    """Runs the command `arf` in a fork; see `support.forks`."""
    from support import forks

    def run(*argv: object, check: bool = True) -> subprocess.CompletedProcess:
        done = forks.run("arf_plugin.cli.main", *argv)
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    return run


@pytest.fixture
def parse():
    """Parses a trainer's command line as the hooks do, in this process; returns the configuration."""
    import argparse

    from arf_plugin.config import resolve
    from arf_plugin.flags import add_arf_flags

    def run(*argv: object):
        parser = argparse.ArgumentParser()
        parser.add_argument("--model", default="ViT-B-32")
        parser.add_argument("--train-data")
        parser.add_argument("--dataset-type", default="auto")
        parser.add_argument("--logs", default="logs")
        for flag in ("--use-bn-sync", "--siglip", "--torchscript", "--horovod"):
            parser.add_argument(flag, action="store_true")
        for flag in ("--pretrained", "--resume", "--distill-model", "--distill-pretrained", "--remote-sync"):
            parser.add_argument(flag)
        parser.add_argument("--accum-freq", type=int, default=1)
        parser.add_argument("--batch-size", type=int, default=64)
        add_arf_flags(parser)
        return resolve(parser.parse_args(list(map(str, argv))))

    return run
