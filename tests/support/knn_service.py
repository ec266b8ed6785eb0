"""The real clip-retrieval service, started as scripts/knn_service.sh starts it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from support.building import describe, drawing
from support.building_fixtures import Inputs
from support.tars import write_tar

SCRIPT = Path(__file__).parents[2] / "scripts" / "knn_service.sh"
START = 120  # seconds
TARS, PER_TAR = 3, 44


@dataclass(frozen=True)
class Pool:
    """Tars of a pool whose keys are unique, its embeddings, those of the task, and index folders."""

    tars: str
    task: Path
    pool: Path
    flat: Path
    logs: Path


def write_pool(folder: Path, inputs: Inputs) -> Pool:
    """132 drawings in 3 tars, embedded with a real (tiny) CLIP."""
    from arf_plugin.cli.main import main as arf

    for tar in range(TARS):
        members = []
        for i in range(tar * PER_TAR, (tar + 1) * PER_TAR):
            members += [(f"p{i:04d}.png", drawing(i, "PNG", 40)), (f"p{i:04d}.txt", describe(i).encode())]
        write_tar(folder / f"tars/{tar:02d}.tar", members)
    tars = f"{folder}/tars/{{00..{TARS - 1:02d}}}.tar"
    model = ["--model", inputs.clip]
    for argv in (
        ["embed", "--task-data", inputs.task, *model, "--out", f"{folder}/task"],
        ["embed", "--pool", tars, *model, "--out", f"{folder}/pool"],
        ["index", "--embeddings", f"{folder}/pool", "--out", f"{folder}/flat"],
    ):
        assert arf(argv) == 0
    return Pool(tars, folder / "task", folder / "pool", folder / "flat", folder)


def run_script(*argv: object) -> subprocess.CompletedProcess:
    """Runs the script to its end."""
    done = subprocess.run(["bash", SCRIPT, *map(str, argv)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def make_environment() -> None:
    """The environment of clip-retrieval; minutes the first time."""
    run_script("--install-only")


def python() -> Path:
    """The interpreter of that environment."""
    return SCRIPT.parents[1] / ".venvs/clip-retrieval/bin/python"


@contextmanager
def started(log: Path, *argv: object, port: int | None = None) -> Iterator[str]:
    """Starts the script, waits until the service answers, and ends it; yields its address.

    Without a port among the arguments, `--port` and a limit of ten minutes are added.
    """
    words = [*map(str, argv)]
    if port is None:
        port = free_port()
        words += ["--port", str(port), "--stop-after", "600"]
    with log.open("w") as file:
        process = subprocess.Popen(["bash", SCRIPT, *words], stdout=file, stderr=file)
    try:
        url = f"http://127.0.0.1:{port}"
        last = time.monotonic() + START
        while not _answers(url):
            assert process.poll() is None and time.monotonic() < last, log.read_text()
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(10)


@contextmanager
def serving(log: Path, indices: dict[str, Path]) -> Iterator[str]:
    """Serves several index folders at once, with clip-retrieval's own command line."""
    paths, port = log.with_suffix(".json"), free_port()
    paths.write_text(json.dumps({name: str(folder) for name, folder in indices.items()}))
    settings = {
        "indices_paths": paths, "port": port, "clip_model": "none", "use_jit": False, "enable_mclip_option": False,
        "provide_aesthetic_embeddings": False,
    }  # fmt: skip
    words = [word for name, value in settings.items() for word in (f"--{name}", value)]
    with started(log, "--run", "back", *words, port=port) as url:
        yield url


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def listening_addresses(port: int) -> set[str]:
    """Addresses on which something listens at a port, in the kernel's notation (127.0.0.1 is 0100007F)."""
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            local, state = line.split()[1], line.split()[3]
            address, number = local.split(":")
            if state == "0A" and int(number, 16) == port:
                found.add(address)
    return found


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/indices-list", timeout=2) as reply:
            return reply.status == 200
    except OSError:
        return False
