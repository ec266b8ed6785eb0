"""``arf doctor``: is the plugin active in this environment, and does every hook fit the installed open_clip?"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

from arf_plugin.cli import options

if TYPE_CHECKING:
    from arf_plugin.hooks.engine import Hook

REPORTED = [
    "arf-plugin",
    "open_clip_torch",
    "torch",
    "torchvision",
    "webdataset",
    "transformers",
    "faiss-cpu",
    "clip-benchmark",
]


def register(subparsers: options.Subparsers) -> None:
    """Adds the parser of ``arf doctor``."""
    parser = options.add_parser(
        subparsers,
        "doctor",
        "show versions, the start-up file and every hook",
        "Shows versions, whether the start-up file is active, and for every hook whether it would apply.\n"
        "Exits with status 1 if training with --arf-* flags would be refused.",
        "  arf doctor\n  arf doctor --full --json | jq .hooks",
    )
    parser.add_argument(
        "--full", action="store_true", help="import the trainer, rather than read its sources; takes seconds"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints the diagnosis."""
    found = diagnose(imports=args.full)
    if args.json:
        print(json.dumps(found, indent=2))
        return 0 if found["ok"] else 1
    print("versions")
    for name, version in found["versions"].items():
        print(f"  {name:18} {version or 'not installed'}")
    print("start-up file")
    print(f"  {'active' if found['startup']['active'] else 'NOT ACTIVE'}: {found['startup']['detail']}")
    print("hooks")
    for hook in found["hooks"]:
        verdict = "ok " if hook["applies"] else "NO "
        print(f"  {verdict} {hook['id']:13} {hook['target']}  ({hook['versions']}; {hook['when']})")
        print(f"      {hook['why']}")
        if hook["problem"]:
            print("      " + hook["problem"].replace("\n", "\n      "))
    print("everything fits" if found["ok"] else "training with --arf-* flags would be refused; see NO above")
    return 0 if found["ok"] else 1


def diagnose(imports: bool = False) -> dict[str, Any]:
    """Examines the environment; ``imports`` imports the trainer, which takes seconds, rather than read its sources.

    Returns:
        ``versions`` (distribution -> version or None), ``supported``, ``startup`` (``active``, ``detail``), ``hooks``
        (of the installed release, or of all if it has none: the fields of a hook that people read, ``applies``,
        ``problem``), ``ok``.
    """
    from arf_plugin.hooks.releases import PACKAGE, SUPPORTED
    from arf_plugin.hooks.table import HOOKS, installed, unsupported

    versions = {name: installed(name) for name in REPORTED}
    version = versions[PACKAGE]
    fits = version is not None and unsupported(version) is None
    hooks = [_examine(hook, version, imports) for hook in HOOKS if not fits or hook.covers(str(version))]
    startup = _startup()
    return {
        "versions": versions,
        "supported": f"{PACKAGE}{' or '.join(SUPPORTED)}",
        "startup": startup,
        "hooks": hooks,
        "ok": startup["active"] and all(hook["applies"] for hook in hooks),
    }


def _examine(hook: Hook, version: str | None, imports: bool) -> dict[str, Any]:
    from arf_plugin.hooks.engine import Engine
    from arf_plugin.hooks.releases import CREATE_LOSS, PACKAGE

    if version is None:
        install = f"pip install '{PACKAGE}{CREATE_LOSS}'"
        problem: str | None = f"{PACKAGE} is not installed; install it with: {install}"
    else:
        problem = Engine(PACKAGE).check(hook, version, imports=imports)
    said = {name: getattr(hook, name) for name in ("id", "target", "versions", "when", "why")}
    return {**said, "applies": problem is None, "problem": problem}


def _startup() -> dict[str, Any]:
    """Whether a fresh interpreter of this environment has the finder, which this process may have added itself."""
    from arf_plugin import _boot  # not at the top: importing it switches the plugin on

    code = f"import sys; m = sys.modules.get({_boot.__name__!r}); print(bool(m and m.is_installed()))"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSTARTUP"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.stdout.strip() == "True":
        detail = (
            f"a new {sys.executable} hooks {_boot.TARGET}; `python -m open_clip_train.main` knows --arf-*"
        )
        return {"active": True, "detail": detail}
    detail = (
        f"a new {sys.executable} does not load it, so `python -m open_clip_train.main` knows no --arf-* flag.\n"
        "  Reinstall with `pip install --force-reinstall --no-deps arf-plugin` (and do not run "
        "Python with -S), or start runs with: arf train ..."
    )
    return {"active": False, "detail": detail}
