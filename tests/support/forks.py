"""Runs modules as ``python -m MODULE`` does, in forks of a process that has imported the libraries.

The same as processes of their own in all but the seconds that importing takes, for tests of many short commands.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from unittest import mock

TESTS = str(Path(__file__).parents[1])
SHIM = Path(TESTS, "shim", "sitecustomize.py")

# What trainer and commands import, but for the modules that are run themselves. A name that is not there is left out.
PRELOADED = [
    "arf_plugin.evaluation.sweep",
    "arf_plugin.hooks.data",
    "arf_plugin.hooks.loss",
    "arf_plugin.hooks.watch",
    "arf_plugin.losses.head",
    "open_clip_train.data",
    "open_clip_train.params",
    "open_clip_train.train",
    "support.tokenizer_cache",
    "transformers.modeling_utils",
]

# What tests have other releases of, and what imports those.
REPLACED = ("open_clip", "open_clip_train", "webdataset", "arf_plugin")


def write_without_waiting() -> None:
    """Leaves the disk to itself: no test cuts the power, and one that is busy takes a second for each file."""
    os.fsync = lambda descriptor: None


def start(
    module: str,
    argv: Sequence[str],
    env: dict[str, str],
    output: Path,
    errors: Path | None = None,
) -> ForkServerProcess:
    """Starts a module in this folder.

    Args:
        module: Its name, or the path of a script.
        argv: Its arguments.
        env: All environment variables. What PYTHONPATH adds to this process's takes the place of what was imported.
        output: File that what it prints is appended to.
        errors: File for its standard error; the same by default.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join([TESTS, os.environ.get("PYTHONPATH", "")])):
        forkserver.ensure_running()
    process = context.Process(target=_run, args=(module, list(argv), env, output, errors or output))
    process.start()
    return process


def run(
    module: str, *argv: object, nproc: int = 1, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs a module to its end.

    Args:
        module: See `start`.
        *argv: Its arguments.
        nproc: Processes; several are told of each other, and print into one place.
        env: Variables beyond this process's.
    """
    with tempfile.TemporaryDirectory() as folder:
        output, errors = Path(folder, "output"), Path(folder, "errors")
        processes = [
            start(module, list(map(str, argv)), {**os.environ, **(env or {}), **told}, output, errors)
            for told in (torchrun_env(nproc) if nproc > 1 else [{}])
        ]
        for process in processes:
            process.join()
        status = next((process.exitcode for process in processes if process.exitcode), 0)
        texts = (path.read_text("utf-8", "surrogateescape") for path in (output, errors))
        return subprocess.CompletedProcess([module, *argv], status, *texts)


def torchrun_env(nproc: int) -> list[dict[str, str]]:
    """What torchrun tells each of its processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(nproc), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(nproc)]


def _run(module: str, argv: list[str], env: dict[str, str], output: Path, errors: Path) -> None:
    """What the fork does: a process group of its own, and everything that a new process would find different."""
    gc.freeze()  # what is there already is not looked through again, which would copy its memory
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # Python's default, but not in a fork server's child
    for descriptor, path in ((1, output), (2, errors)):
        with path.open("a") as stream:
            os.dup2(stream.fileno(), descriptor)
    os.environ.clear()
    os.environ.update(env)
    write_without_waiting()
    added = [folder for folder in env.get("PYTHONPATH", "").split(os.pathsep) if folder not in sys.path]
    sys.path[:0] = [folder for folder in added if folder not in ("", str(SHIM.parent))]
    if any(Path(folder, name).is_dir() for folder in added if folder for name in REPLACED):
        for name in list(sys.modules):  # but what the start-up file has run
            if name.partition(".")[0] in REPLACED and name != "arf_plugin._boot":
                del sys.modules[name]
    if "ARF_TEST_SHIM_ALWAYS" in env:
        runpy.run_path(str(SHIM))
    sys.argv = [module, *argv]
    status = 0
    try:
        if module.endswith(".py"):
            runpy.run_path(module, run_name="__main__")
        else:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
