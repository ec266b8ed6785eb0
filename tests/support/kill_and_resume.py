"""Runs ``arf`` commands, killing each several times at random moments before it may finish.

Usage: python kill_and_resume.py SEED, with a JSON list of [kills, command] on standard input. Each run is a fork of
this process, which has the heavy imports done, so kills fall into the work and not into the start of Python. Prints a
JSON list: how many kills landed per command.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time


def main() -> None:
    commands = json.load(sys.stdin)
    import open_clip  # noqa: F401
    import torch
    import transformers

    from arf_plugin.cli.main import main as arf

    _ = (
        transformers.AutoModelForImageTextToText,
        transformers.AutoTokenizer,
    )  # they are imported when first named
    torch.set_num_threads(1)  # a forked process has no thread pool to wait for
    rng = random.Random(int(sys.argv[1]))
    landed = []
    for kills, argv in commands:
        span, count = 0.05, 0
        for _ in range(kills):
            child = _start(arf, argv)
            time.sleep(rng.uniform(0, span))
            if os.waitpid(child, os.WNOHANG)[0]:
                break  # finished before the kill
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            count += 1
            span *= 1.3  # later and later, as less and less is left to do
        child = _start(arf, argv)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status:
            sys.exit(f"exit status {status} after {count} kills: {argv}")
        landed.append(count)
    print(json.dumps(landed))


def _start(arf, argv: list[str]) -> int:
    child = os.fork()
    if child:
        return child
    os.dup2(2, 1)
    status = 99
    try:
        status = arf(argv)
    finally:
        os._exit(status)


if __name__ == "__main__":
    main()
