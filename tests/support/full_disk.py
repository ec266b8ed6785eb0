"""Runs ``arf`` commands on a small disk that grows, and on one that is read-only.

Usage: unshare -rm python full_disk.py MOUNT_POINT, with a JSON list of commands on standard input that write below
MOUNT_POINT. A tmpfs of 4 KiB is mounted there; each command is run, and each time it fails the disk grows by a third.
Prints JSON: {"failures": [[command number, message], ...], "read_only": [message per command]}; the folder is copied
to MOUNT_POINT + "-copy".
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import subprocess
import sys

LARGEST = 64 << 20  # bytes


def mount(options: str, at: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", at], check=True)


def main() -> None:
    from arf_plugin.cli.main import main as arf

    at, commands = sys.argv[1], json.load(sys.stdin)

    def run(argv: list[str]) -> str | None:
        errors = io.StringIO()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
            status = arf(argv)
        if status not in (0, 1):
            sys.exit(f"exit status {status}: {errors.getvalue()}")
        return errors.getvalue() if status else None

    size, failures, read_only = 4 << 10, [], []
    mount(f"size={size}", at)
    for number, argv in enumerate(commands):
        mount("remount,ro", at)
        read_only.append(run(argv))
        mount(f"remount,rw,size={size}", at)
        while message := run(argv):
            failures.append([number, message])
            size += max(4 << 10, size // 3 >> 12 << 12)
            if size > LARGEST:
                sys.exit(message)
            mount(f"remount,size={size}", at)
    shutil.copytree(at, f"{at}-copy")
    print(json.dumps({"failures": failures, "read_only": read_only}))


if __name__ == "__main__":
    main()
