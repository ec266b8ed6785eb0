"""``arf doctor``: is the plugin active in this environment, and does every hook fit the installed open_clip?"""

from __future__ import annotations

import argparse
import json
import sys

from arf_plugin.cli import options


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
    from arf_plugin.hooks.diagnosis import diagnose

    found = diagnose(imports=args.full)
    if args.json:
        json.dump(found, sys.stdout, indent=2)
        print()
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
