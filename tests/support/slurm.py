"""A real SLURM on this machine, and how tests talk to it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

SCRIPTS = Path(__file__).parents[2] / "scripts" / "slurm"


def until(true: Callable[[], object], what: str, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.1)


class Cluster:
    """A cluster of two nodes in a folder of its own.

    Args:
        folder: its scratch folder; short, as sockets need short names.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = {
            **{
                name: value
                for name, value in os.environ.items()
                if not name.startswith(("SLURM_", "SBATCH_"))
            },
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "ARF_SLURM_DIR": str(folder),
            "ARF_SLURM_MINUTES": "30",
            "SLURM_CONF": str(folder / "slurm.conf"),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "TOKENIZERS_PARALLELISM": "false",
        }

    def script(
        self, *argv: object, check: bool = True, **variables: object
    ) -> subprocess.CompletedProcess[str]:
        """Runs ``local_cluster.sh`` with these arguments."""
        return self.run(SCRIPTS / "local_cluster.sh", *argv, check=check, **variables)

    def run(self, *argv: object, check: bool = True, **variables: object) -> subprocess.CompletedProcess[str]:
        """Runs a command on the machine that jobs are submitted from."""
        env = self.env | {name: str(value) for name, value in variables.items()}
        done = subprocess.run(
            list(map(str, argv)),
            env=env,
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert not check or done.returncode == 0, f"{argv}\n{done.stdout}{done.stderr}{self.logs()}"
        return done

    def submit(
        self, script: str, *flags: object, stage_flags: tuple[object, ...] = (), **variables: object
    ) -> str:
        """Submits a job script; returns the job's id."""
        words = ("sbatch", "--parsable", "--cpus-per-task=1", *flags, SCRIPTS / script, *stage_flags)
        return self.run(*words, **variables).stdout.strip()

    def jobs(self, job: str) -> list[dict[str, str]]:
        """What SLURM says of a job, or of all tasks of an array."""
        lines = self.run("scontrol", "--oneliner", "show", "job", job).stdout.splitlines()
        return [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in lines]

    def wait(self, job: str, state: str = "COMPLETED", seconds: float = 240) -> list[dict[str, str]]:
        """Waits until a job, or every task of an array, has ended, as it should."""

        def ended() -> bool:
            return all(j["JobState"] not in ("PENDING", "RUNNING", "COMPLETING") for j in self.jobs(job))

        until(ended, f"job {job}: {self.jobs(job)}", seconds)
        jobs = self.jobs(job)
        assert {j["JobState"] for j in jobs} == {state}, f"{jobs}\n{self.logs()}"
        return jobs

    def logs(self) -> str:
        return "".join(
            f"--- {path.name}\n{path.read_text()}" for path in sorted(self.folder.glob("arf-*.log"))
        )
