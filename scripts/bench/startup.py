"""Cost of the start-up file for a Python process that has nothing to do with training.

Two fresh virtual environments, alike but for the plugin; each round starts an interpreter in both.

    python scripts/bench/startup.py --json runs/bench/startup.json
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from common import Bar, interleave, parser, report

ROOT = Path(__file__).parents[2]


def main() -> int:
    args = parser(__doc__.split("\n")[0], rounds=200).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
        build = ["wheel", "--no-deps", "--no-build-isolation", "-w", folder, str(ROOT)]
        subprocess.run([*pip, *build], check=True)
        (wheel,) = Path(folder).glob("arf_plugin-*.whl")
        pythons = {}
        for name in ("without", "with"):
            venv.create(Path(folder, name), with_pip=False)
            pythons[name] = str(Path(folder, name, "bin", "python"))
        install = ["install", "--no-deps", str(wheel)]
        subprocess.run([*pip, "--python", pythons["with"], *install], check=True)
        variants = {name: starter(python) for name, python in pythons.items()}
        seconds = interleave(variants, args.rounds, warmup=10)
    difference = statistics.median(seconds["with"]) - statistics.median(seconds["without"])
    bars = [Bar("median start-up with the plugin minus without, in ms", 1000 * difference, 1.0)]
    return report("startup: python -c pass", seconds, bars, args.json)


def starter(python: str):
    """Starts an interpreter that does nothing."""
    return lambda: subprocess.run([python, "-c", "pass"], check=True)


if __name__ == "__main__":
    sys.exit(main())
