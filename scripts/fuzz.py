#!/usr/bin/env python
"""Runs the property tests with new random examples, round after round, until the time is over.

Each round asks every property for some examples more, with a seed of its own; those of one file share a process, and
what is slow gets fewer in the next round. A failure is shown with hypothesis' blob, which reproduces it
(@reproduce_failure), and the property goes on with other examples. Exits with 1 if there was a failure.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROPERTIES = ROOT / "tests" / "properties"
# What covers each kind of outside input, by the topic of its tests.
KINDS = {
    "decoding": ("tars", "sets"),
    "names": ("tars", "captions", "sets"),
    "locations": ("arrays", "json_inputs", "tars"),
    "parsers": ("service_replies", "yaml", "captions", "json_inputs", "own_json", "checkpoints", "arrays"),
}
EXAMPLES = """\
examples:
  scripts/fuzz.py --minutes 10                          all properties
  scripts/fuzz.py --minutes 2 yaml service_replies      those of tests/properties/test_{yaml,service_replies}.py
  scripts/fuzz.py --minutes 60 --json fuzz.json         over night, with a record for programs
  scripts/fuzz.py --minutes 1 yaml::test_any_bytes --seed 7     one property, from a seed on
"""


@dataclass
class Found:
    """What became of one property.

    Attributes:
        examples: examples that were tried.
        failures: blobs, or the last lines of the output where there is no blob.
        seconds: of the property alone, without the start of its process.
    """

    property: str
    examples: int = 0
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0


def properties(topics: Sequence[str]) -> list[str]:
    """The properties of some topics (``yaml``, ``yaml::test_any_bytes``), or all, as pytest names them.

    Raises:
        SystemExit: there is no such topic.
    """
    done = _pytest(["--collect-only", "-q", *(_path(topic) for topic in topics or [""])], {})
    names = [line for line in done.stdout.splitlines() if "::" in line]
    if done.returncode or not names:
        sys.exit(
            f"fuzz.py: no properties found for {' '.join(topics) or 'all'}:\n{(done.stdout + done.stderr)[-2000:]}"
        )
    return names


def _path(topic: str) -> str:
    file, _, test = topic.partition("::")
    path = PROPERTIES / f"test_{file}.py" if file else PROPERTIES
    return f"{path}::{test}" if test else str(path)


def _pytest(arguments: Sequence[str], variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments],
        cwd=ROOT,
        env={**environment, "ARF_FUZZ": "1", **variables},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )


def try_once(names: Sequence[str], examples: int, seed: int) -> dict[str, Found]:
    """Runs some properties in one process, and those that fail once more, each by itself, for its blob."""
    found = {name: Found(name) for name in names}
    with tempfile.TemporaryDirectory(prefix="arf-fuzz-") as scratch:
        counts = Path(scratch) / "counts.jsonl"
        variables = {"ARF_FUZZ": str(examples), "ARF_FUZZ_COUNTS": str(counts), "TMPDIR": scratch}
        done = _pytest(
            ["-q", "-rf", f"--hypothesis-seed={seed}", f"--basetemp={scratch}/pytest", *names], variables
        )
        tried = [json.loads(line) for line in counts.read_text().splitlines()] if counts.is_file() else []
    for one in tried:
        if one["property"] in found:
            found[one["property"]].examples += one["examples"]
            found[one["property"]].seconds += one["seconds"]
    if not done.returncode:
        return found
    if len(names) > 1:
        failed = [name for name in names if f"FAILED {name}" in done.stdout] or list(names)
        for name in failed:
            found[name].failures += try_once([name], examples, seed)[name].failures
        return found
    blob = re.search(r"@reproduce_failure\(.*\)", done.stdout)
    lines = (done.stdout + done.stderr).strip().splitlines()
    raised = [line for line in lines if line.startswith("E  ")]  # what pytest shows of an error
    said = "\n".join(line[:200] for line in raised[:12] or lines[-25:])
    found[names[0]].failures.append(f"seed {seed}: {blob[0] if blob else 'no blob'}\n{said}")
    return found


def fuzz(names: Sequence[str], seconds: float, seed: int) -> dict[str, Found]:
    """Runs properties round after round, those of one file together; each is tried once at least."""
    end = time.monotonic() + seconds
    found = {name: Found(name) for name in names}
    files: dict[str, list[str]] = {}
    for name in names:
        files.setdefault(name.partition("::")[0], []).append(name)
    turn = 0
    while turn == 0 or time.monotonic() < end:
        share = max(end - time.monotonic(), 1.0) / len(files)
        for file, some in files.items():
            if turn and time.monotonic() > end:
                break
            known = [found[name] for name in some]
            spent = sum(one.seconds for one in known)
            rate = sum(one.examples for one in known) / spent if spent > 0.1 else 50.0
            wanted = max(5, min(round(rate * min(share, 45.0) / len(some)), 100_000)) if turn else 20
            for name, one in try_once(some, wanted, seed + turn).items():
                found[name].examples += one.examples
                found[name].seconds += one.seconds
                found[name].failures += one.failures
            print(
                f"\r{time.strftime('%H:%M:%S')} round {turn + 1}: {Path(file).stem.removeprefix('test_')}",
                end="\033[K",
                file=sys.stderr,
            )
        turn += 1
    print(file=sys.stderr)
    return found


def _short(name: str) -> str:
    return name.rsplit("/", 1)[-1].removeprefix("test_").replace(".py::test_", "::")


def kind_totals(found: Sequence[Found]) -> dict[str, int]:
    """Examples by kind; a topic counts for each kind that it covers."""
    return {
        kind: sum(one.examples for one in found if _short(one.property).split("::")[0] in topics)
        for kind, topics in KINDS.items()
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; 1 if a property has failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "topics", nargs="*", metavar="TOPIC", help="such as yaml or yaml::test_any_bytes (default: all)"
    )
    parser.add_argument("--minutes", type=float, required=True, metavar="N", help="how long, about")
    parser.add_argument(
        "--seed", type=int, default=None, metavar="N", help="first seed (default: by the clock)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table for programs, too")
    args = parser.parse_args(argv)
    seed = time.time_ns() // 1_000_000 % 1_000_000_000 if args.seed is None else args.seed
    found = list(fuzz(properties(args.topics), 60 * args.minutes, seed).values())

    width = max(len(_short(one.property)) for one in found)
    print(f"{'property':<{width}}  {'examples':>9}  {'failures':>8}  {'seconds':>8}")
    for one in found:
        print(
            f"{_short(one.property):<{width}}  {one.examples:>9,}  {len(one.failures):>8}  {one.seconds:>8.1f}"
        )
    total = sum(one.examples for one in found)
    failures = [(one, failure) for one in found for failure in one.failures]
    print(f"{'all':<{width}}  {total:>9,}  {len(failures):>8}  {sum(one.seconds for one in found):>8.1f}")
    kinds = kind_totals(found)
    print(
        "by kind: " + ", ".join(f"{kind} {count:,}" for kind, count in kinds.items()) + f"; first seed {seed}"
    )
    for one, failure in failures:
        print(f"\n{one.property}\n{failure}")
    if args.json is not None:
        record = {
            "seed": seed,
            "minutes": args.minutes,
            "kinds": kinds,
            "properties": [asdict(one) for one in found],
        }
        args.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
