"""THE list of upstream names that the plugin touches, and which of them hold for the open_clip that is installed.

Applying, undoing and ``arf doctor`` all walk it. A name that open_clip's two forms of trainer use differently has a
hook for each; `hooks` picks those of a release.
"""

from __future__ import annotations

from importlib import metadata

from arf_plugin.errors import IncompatibleUpstreamError
from arf_plugin.hooks.engine import Hook, covers
from arf_plugin.hooks.releases import CREATE_LOSS, CREATE_TASK, PACKAGE, RELEASES, SUPPORTED

BOTH = " or ".join(SUPPORTED)

# fmt: off
HOOKS = tuple(Hook(*fields) for fields in (
    # id, name, its origin if it is imported there,
    # releases, wrapper, when,
    # what for
    ("parse-args", "open_clip_train.params:parse_args", None,
     BOTH, "arf_plugin._boot:guard", "start-up",
     "sees the command line; without --arf-* flags it calls the original and nothing else is touched"),
    ("parser", "open_clip_train.params:argparse", None,
     BOTH, "arf_plugin.hooks.activation:argparse_with_flags", "parsing",
     "adds the ARF group to the trainer's own parser, so that --help and errors are in one place"),
    ("create-model", "open_clip_train.main:create_model_and_transforms", "open_clip:create_model_and_transforms",
     BOTH, "arf_plugin.hooks.model:create_model_and_transforms", "run",
     "freezes BatchNorm statistics for --arf-freeze-bn, warns where BatchNorm makes ARF inexact; lets CLIP's text "
     "tower take trimmed texts; baselines: gives the model a head, notes where it starts"),
    ("get-data", "open_clip_train.main:get_data", "open_clip_train.data:get_data",
     CREATE_LOSS, "arf_plugin.hooks.data:get_data", "run",
     "checks the anchor set; builds open_clip's own pipeline with class prompts, captions and pairs in it"),
    ("get-data-of-task", "open_clip_train.main:get_data", "open_clip_train.data:get_data",
     CREATE_TASK, "arf_plugin.hooks.task:get_data", "run",
     "the same for batches that are dictionaries; gives the task its loss, since it is made before its data"),
    ("create-loss", "open_clip_train.main:create_loss", "open_clip:create_loss",
     CREATE_LOSS, "arf_plugin.hooks.loss:create_loss", "run",
     "applies the trainer's own loss once per term; baselines: cross-entropy in its place, L2-SP beside it"),
    ("create-task", "open_clip_train.main:create_task", "open_clip:create_task",
     CREATE_TASK, "arf_plugin.hooks.task:create_task", "run",
     "keeps the task for its loss, and lets it move batches whose parts meet on the device"),
    ("train-one-epoch", "open_clip_train.main:train_one_epoch", "open_clip_train.train:train_one_epoch",
     CREATE_LOSS, "arf_plugin.hooks.session:train_one_epoch", "run",
     "calls the original with the trainer's own arguments; tells listeners before and after"),
    ("train-one-epoch-of-task", "open_clip_train.main:train_one_epoch", "open_clip_train.train:train_one_epoch",
     CREATE_TASK, "arf_plugin.hooks.task:train_one_epoch", "run",
     "the same where the trainer's arguments are a state"),
    ("latest-checkpoint", "open_clip_train.main:get_latest_checkpoint", None,
     BOTH, "arf_plugin.hooks.resume:get_latest_checkpoint", "resumable run",
     "--resume latest passes over a checkpoint that a kill left incomplete"),
    ("load-checkpoint", "open_clip_train.main:pt_load", "open_clip_train.file_utils:pt_load",
     CREATE_LOSS, "arf_plugin.hooks.resume:pt_load", "resumable run",
     "sees whether the run goes on from a step checkpoint, and where; reads learning rates of numpy's types"),
    ("load-checkpoint-of-task", "open_clip_train.file_utils:pt_load", None,
     CREATE_TASK, "arf_plugin.hooks.resume:pt_load", "resumable run",
     "the same where weights have one name for any number of processes"),
    ("count-batches", "open_clip_train.train:enumerate", "builtins:enumerate",
     BOTH, "arf_plugin.hooks.resume:enumerate_batches", "resumable run",
     "counts on from the resumed batch, for schedule and logs; everything but the resumable loader from 0"),
))
# fmt: on


def hooks(when: str, version: str) -> tuple[Hook, ...]:
    """The hooks of one phase that were written for a release.

    Raises:
        IncompatibleUpstreamError: There is none: the phase is for other releases alone, or is misspelt.
    """
    fitting = tuple(hook for hook in HOOKS if hook.when == when and hook.covers(version))
    if not fitting:
        there = " or ".join(sorted({hook.versions for hook in HOOKS if hook.when == when}))
        raise IncompatibleUpstreamError(
            f"no hook of the phase '{when}' was written for {PACKAGE} {version}.\n"
            f"  expected: {PACKAGE}{there}\n"
            "Drop the --arf-* flag that needs it, or install a release that has it: see README.md of arf-plugin."
        )
    return fitting


def installed(package: str = PACKAGE) -> str | None:
    """Version of an installed distribution, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def upstream_version() -> str:
    """Version of the open_clip that training will use.

    Raises:
        IncompatibleUpstreamError: Its version cannot be told, as in a bare source checkout, or is none that the hooks
            were written for.
    """
    version = installed()
    if version is None:
        raise IncompatibleUpstreamError(
            f"{PACKAGE} is not installed as a distribution, so its version cannot be checked.\n"
            f"Install it with: pip install '{PACKAGE}{CREATE_LOSS}' (a checkout: pip install -e .)"
        )
    problem = unsupported(version)
    if problem is not None:
        raise IncompatibleUpstreamError(problem)
    return version


def unsupported(version: str) -> str | None:
    """Says why a release is refused; None if the hooks were written for it."""
    if any(covers(versions, version) for versions in SUPPORTED):
        return None
    return (
        f"the hooks were not written for the installed {PACKAGE}.\n"
        f"  found:    {PACKAGE} {version} is installed\n"
        f"  expected: {PACKAGE}{' or '.join(SUPPORTED)} (tested: {', '.join(r.version for r in RELEASES)})\n"
        "Training stops here rather than go on without anchors. See all hooks with: arf doctor\n"
        f"Then: pip install '{PACKAGE}{CREATE_LOSS}', or upgrade arf-plugin."
    )


def trains_tasks(version: str) -> bool:
    """Whether a release's trainer builds a task (`arf_plugin.hooks.task`) rather than a loss."""
    return covers(CREATE_TASK, version)
