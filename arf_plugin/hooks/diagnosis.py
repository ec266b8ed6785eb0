"""What ``arf doctor`` reports: every hook of the table against the installed open_clip."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

from arf_plugin import _boot
from arf_plugin.hooks.engine import Engine, Hook
from arf_plugin.hooks.releases import CREATE_LOSS, PACKAGE, SUPPORTED
from arf_plugin.hooks.table import HOOKS
from arf_plugin.hooks.versions import installed, unsupported

REPORTED = (
    "arf-plugin",
    PACKAGE,
    "torch",
    "torchvision",
    "webdataset",
    "transformers",
    "faiss-cpu",
    "clip-benchmark",
)


def diagnose(imports: bool = False) -> dict[str, Any]:
    """Examines the environment.

    Args:
        imports: Imports the trainer, which takes seconds, rather than read its sources.

    Returns:
        ``versions`` (distribution -> version or None), ``supported``, ``startup`` (``active``, ``detail``), ``hooks``
        (one entry per hook of the installed release, or per hook of all if there are none: ``id``, ``target``,
        ``versions``, ``when``, ``why``, ``applies``, ``problem``), ``ok``.
    """
    versions = {name: installed(name) for name in REPORTED}
    startup = _startup()
    version = versions[PACKAGE]
    fits = version is not None and unsupported(version) is None
    hooks = [_examine(hook, version, imports) for hook in HOOKS if not fits or hook.covers(str(version))]
    return {
        "versions": versions,
        "supported": f"{PACKAGE}{' or '.join(SUPPORTED)}",
        "startup": startup,
        "hooks": hooks,
        "ok": startup["active"] and all(hook["applies"] for hook in hooks),
    }


def _examine(hook: Hook, version: str | None, imports: bool) -> dict[str, Any]:
    if version is None:
        problem: str | None = (
            f"{PACKAGE} is not installed; install it with: pip install '{PACKAGE}{CREATE_LOSS}'"
        )
    else:
        problem = Engine(PACKAGE).check(hook, version, imports=imports)
    return {
        "id": hook.id,
        "target": hook.target,
        "versions": hook.versions,
        "when": hook.when,
        "why": hook.why,
        "applies": problem is None,
        "problem": problem,
    }


def _startup() -> dict[str, Any]:
    """Whether a fresh interpreter of this environment has the finder, which this process may have added itself."""
    code = f"import sys; m = sys.modules.get({_boot.__name__!r}); print(bool(m and m.is_installed()))"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSTARTUP"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    active = done.stdout.strip() == "True"
    if active:
        detail = (
            f"a new {sys.executable} hooks {_boot.TARGET}; `python -m open_clip_train.main` knows --arf-*"
        )
    else:
        detail = (
            f"a new {sys.executable} does not load it, so `python -m open_clip_train.main` knows no --arf-* flag.\n"
            "  Reinstall with `pip install --force-reinstall --no-deps arf-plugin` (and do not run "
            "Python with -S), or start runs with: arf train ..."
        )
    return {"active": active, "detail": detail}
