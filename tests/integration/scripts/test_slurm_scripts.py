"""The SLURM scripts without a SLURM: what they document, what they refuse, what they would submit."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[3] / "scripts" / "slurm"
SHELL = sorted([*SCRIPTS.glob("*.sh"), *SCRIPTS.glob("*.sbatch")])
SETTINGS = {
    "TASK_DATA": "task/{000..099}.tar",
    "POOL": "pool/{0000..0331}.tar",
    "CAPTIONER": "my captioner",
    "MODEL": "ViT-B-16",
    "PRETRAINED": "openai",
    "OUT": "A",
}


def run(script: str, *argv: str, **variables: str) -> subprocess.CompletedProcess[str]:
    env = {"PATH": os.environ["PATH"], **variables}
    return subprocess.run(
        ["bash", SCRIPTS / script, *argv], env=env, capture_output=True, text=True, check=False, timeout=60
    )


@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_every_variable_that_is_read_is_documented(path: Path):
    assert subprocess.run(["bash", "-n", path], check=False).returncode == 0
    text = path.read_text()
    header = re.match(r"(#.*\n)+", text)
    assert header is not None
    read = set(re.findall(r"\$\{([A-Z][A-Z_]+)[:?-]", text)) - {"BASH_SOURCE", "TMPDIR"}
    undocumented = {name for name in read if not name.startswith("SLURM_") and name not in header.group()}
    assert not undocumented


@pytest.mark.parametrize("path", sorted(SCRIPTS.glob("*.sbatch")), ids=lambda path: path.name)
def test_jobs_can_be_requeued_and_keep_their_log(path: Path):
    words = [
        line.removeprefix("#SBATCH ") for line in path.read_text().splitlines() if line.startswith("#SBATCH")
    ]
    assert {"--requeue", "--open-mode=append", "--signal=B:USR1@120"} <= set(words)


@pytest.mark.parametrize("stage", ["caption", "embed", "retrieve", "pack", "features"])
def test_the_flags_that_jobs_use_exist(stage: str, capsys: pytest.CaptureFixture[str]):
    from arf_plugin.cli.main import main

    with pytest.raises(SystemExit):
        main([stage, "--help"])
    known = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    code = (SCRIPTS / f"{stage}.sbatch").read_text().partition("set -euo pipefail")[2]
    used = set(re.findall(r"--[a-z-]+", code))
    assert used and used <= known


def test_a_dry_run_prints_commands_with_their_dependencies():
    done = run("anchors.sh", "--dry-run", K="3", GPU_SBATCH="--gpus-per-task=1", ARRAY="0-7%2", **SETTINGS)
    assert done.returncode == 0, done.stderr
    commands = [shlex.split(line) for line in done.stdout.splitlines()]
    named = {next(w for w in words if w.startswith("--job-name=")).removeprefix("--job-name=arf-"): words
             for words in commands}  # fmt: skip
    assert list(named) == ["caption", "embed-task", "embed-pool", "retrieve", "pack", "features"]
    assert (
        "CAPTIONER=my captioner" in named["caption"] and "TASK_DATA=task/{000..099}.tar" in named["caption"]
    )
    assert (
        "--dependency=afterok:<embed-task>:<embed-pool>" in named["retrieve"] and "K=3" in named["retrieve"]
    )
    assert "--dependency=afterok:<retrieve>" in named["pack"]
    assert "--dependency=afterok:<caption>:<pack>" in named["features"] and "OUT=A" in named["features"]
    assert {name for name, words in named.items() if "--array=0-7%2" in words} == {
        "caption",
        "embed-task",
        "embed-pool",
        "features",
    }
    assert {name for name, words in named.items() if "--gpus-per-task=1" not in words} == {"pack"}
    assert not any(word.startswith("TASK_DATA=") for word in named["embed-pool"]), "it embeds the pool"


def test_either_half_alone():
    captions = {name: value for name, value in SETTINGS.items() if name not in ("POOL", "MODEL")}
    assert len(run("anchors.sh", "--dry-run", **captions).stdout.splitlines()) == 1
    pairs = {name: value for name, value in SETTINGS.items() if name != "CAPTIONER"}
    assert len(run("anchors.sh", "--dry-run", **pairs).stdout.splitlines()) == 5


@pytest.mark.parametrize(
    ("script", "given", "expected"),
    [
        ("anchors.sh", {"OUT": "A"}, "TASK_DATA: names the task data"),
        ("anchors.sh", {"OUT": "A", "TASK_DATA": "t"}, "nothing to build"),
        ("anchors.sh", {"OUT": "A", "TASK_DATA": "t", "POOL": "p"}, "MODEL: names the open_clip model"),
        ("caption.sbatch", {"OUT": "A", "TASK_DATA": "t"}, "CAPTIONER: names the captioner"),
        ("embed.sbatch", {"OUT": "A", "MODEL": "m"}, "TASK_DATA: or POOL names the data"),
        ("train.sbatch", {"TRAIN_DATA": "t"}, "ANCHORS: names the anchor set"),
    ],
)
def test_what_is_missing_is_named(script: str, given: dict[str, str], expected: str):
    done = run(script, **given)
    assert done.returncode != 0 and expected in done.stderr


class TestLocalCluster:
    """Starting and stopping a real one; seconds, but it needs SLURM's daemons."""

    pytestmark = pytest.mark.slow

    @pytest.fixture
    def variables(self) -> Iterator[dict[str, str]]:
        with tempfile.TemporaryDirectory(prefix="arf-slurm-") as folder:
            variables = {"ARF_SLURM_DIR": folder, "ARF_SLURM_MINUTES": "5", "ARF_SLURM_PORT": "27817"}
            started = run("local_cluster.sh", "start", **variables)
            if "not installed" in started.stderr:
                pytest.skip(started.stderr)
            assert started.returncode == 0, started.stderr
            yield variables
            run("local_cluster.sh", "stop", **variables)

    def processes(self, variables: dict[str, str]) -> dict[int, str]:
        """Running processes whose command line names the cluster's folder."""
        found = {}
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = path.read_bytes().decode(errors="replace").split("\0")
            except OSError:  # it has just ended
                continue
            if any(f"{variables['ARF_SLURM_DIR']}/" in word for word in words):
                found[int(path.parent.name)] = Path(words[0]).name
        return found

    def test_it_listens_on_loopback_alone_and_stops_without_a_trace(self, variables: dict[str, str]):
        started = self.processes(variables)
        assert sorted(started.values()) == ["bash", "munged", "slurmctld", "slurmd", "slurmd"]
        sockets = subprocess.run(
            ["ss", "-Hltnp"], capture_output=True, text=True, check=True
        ).stdout.splitlines()
        mine = [line.split()[3] for line in sockets if any(f"pid={pid}," in line for pid in started)]
        assert len(mine) == 3 and all(address.startswith("127.0.0.1:") for address in mine), sockets
        assert "already running" in run("local_cluster.sh", "start", **variables).stderr
        assert self.processes(variables) == started
        assert run("local_cluster.sh", "stop", **variables).returncode == 0
        assert self.processes(variables) == {}

    def test_a_start_after_a_crash_replaces_what_is_left(self, variables: dict[str, str]):
        pid_file = Path(variables["ARF_SLURM_DIR"]) / "slurmctld.pid"
        started = self.processes(variables)
        os.kill(int(pid_file.read_text()), 9)
        bystander = subprocess.Popen(["sleep", "60"])
        pid_file.write_text(str(bystander.pid))  # the number has become another process's
        assert run("local_cluster.sh", "start", **variables).returncode == 0
        assert not started.keys() & self.processes(variables).keys()
        assert (
            run("local_cluster.sh", "run", "srun", "-N", "2", "hostname", **variables).stdout.count("\n") == 2
        )
        assert bystander.poll() is None, "a process that is none of the cluster's was ended"
        bystander.kill()
        bystander.wait()

    def test_it_stops_by_itself_and_run_hands_on_the_status(self, variables: dict[str, str]):
        run("local_cluster.sh", "stop", **variables)
        done = run("local_cluster.sh", "run", "srun", "bash", "-c", "echo $SLURM_JOB_ID; exit 7", **variables)
        assert (done.returncode, done.stdout.strip()) == (7, "1")
        assert self.processes(variables) == {}
        assert run("local_cluster.sh", "start", **variables | {"ARF_SLURM_MINUTES": "0.1"}).returncode == 0
        end = time.monotonic() + 30
        while self.processes(variables):
            assert time.monotonic() < end, "it is still running"
            time.sleep(0.2)
