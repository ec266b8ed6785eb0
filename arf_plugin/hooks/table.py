"""THE list of upstream names that the plugin touches. Applying, undoing and ``arf doctor`` all walk it.

A name that open_clip's two forms of trainer use differently has a hook for each; `hooks` picks those of a release.
"""

from __future__ import annotations

from arf_plugin.errors import IncompatibleUpstreamError
from arf_plugin.hooks.engine import Hook
from arf_plugin.hooks.releases import CREATE_LOSS, CREATE_TASK, PACKAGE, SUPPORTED

BOTH = " or ".join(SUPPORTED)

HOOKS = (
    Hook(
        id="parse-args",
        target="open_clip_train.params:parse_args",
        versions=BOTH,
        wrapper="arf_plugin._boot:guard",
        when="start-up",
        why="sees the command line; without --arf-* flags it calls the original and nothing else is touched",
    ),
    Hook(
        id="parser",
        target="open_clip_train.params:argparse",
        versions=BOTH,
        wrapper="arf_plugin.hooks.params:argparse_with_flags",
        when="parsing",
        why="adds the ARF group to the trainer's own parser, so that --help and errors are in one place",
    ),
    Hook(
        id="create-model",
        target="open_clip_train.main:create_model_and_transforms",
        origin="open_clip:create_model_and_transforms",
        versions=BOTH,
        wrapper="arf_plugin.hooks.model:create_model_and_transforms",
        when="run",
        why="freezes BatchNorm statistics for --arf-freeze-bn, warns where BatchNorm makes ARF inexact; "
        "lets CLIP's text tower take trimmed texts; baselines: gives the model a head, notes where it starts",
    ),
    Hook(
        id="get-data",
        target="open_clip_train.main:get_data",
        origin="open_clip_train.data:get_data",
        versions=CREATE_LOSS,
        wrapper="arf_plugin.hooks.data:get_data",
        when="run",
        why="checks the anchor set; builds open_clip's own pipeline with class prompts, captions and pairs in it",
    ),
    Hook(
        id="get-data-of-task",
        target="open_clip_train.main:get_data",
        origin="open_clip_train.data:get_data",
        versions=CREATE_TASK,
        wrapper="arf_plugin.hooks.task:get_data",
        when="run",
        why="the same for batches that are dictionaries; gives the task its loss, since it is made before its data",
    ),
    Hook(
        id="create-loss",
        target="open_clip_train.main:create_loss",
        origin="open_clip:create_loss",
        versions=CREATE_LOSS,
        wrapper="arf_plugin.hooks.loss:create_loss",
        when="run",
        why="applies the trainer's own loss once per term; baselines: cross-entropy in its place, L2-SP beside it",
    ),
    Hook(
        id="create-task",
        target="open_clip_train.main:create_task",
        origin="open_clip:create_task",
        versions=CREATE_TASK,
        wrapper="arf_plugin.hooks.task:create_task",
        when="run",
        why="keeps the task for its loss, and lets it move batches whose parts meet on the device",
    ),
    Hook(
        id="train-one-epoch",
        target="open_clip_train.main:train_one_epoch",
        origin="open_clip_train.train:train_one_epoch",
        versions=CREATE_LOSS,
        wrapper="arf_plugin.hooks.epoch:train_one_epoch",
        when="run",
        why="calls the original with the trainer's own arguments; tells listeners before and after",
    ),
    Hook(
        id="train-one-epoch-of-task",
        target="open_clip_train.main:train_one_epoch",
        origin="open_clip_train.train:train_one_epoch",
        versions=CREATE_TASK,
        wrapper="arf_plugin.hooks.task:train_one_epoch",
        when="run",
        why="the same where the trainer's arguments are a state",
    ),
    Hook(
        id="latest-checkpoint",
        target="open_clip_train.main:get_latest_checkpoint",
        versions=BOTH,
        wrapper="arf_plugin.hooks.resume:get_latest_checkpoint",
        when="resumable run",
        why="--resume latest passes over a checkpoint that a kill left incomplete",
    ),
    Hook(
        id="load-checkpoint",
        target="open_clip_train.main:pt_load",
        origin="open_clip_train.file_utils:pt_load",
        versions=CREATE_LOSS,
        wrapper="arf_plugin.hooks.resume:pt_load",
        when="resumable run",
        why="sees whether the run goes on from a step checkpoint, and where; reads learning rates of numpy's types",
    ),
    Hook(
        id="load-checkpoint-of-task",
        target="open_clip_train.file_utils:pt_load",
        versions=CREATE_TASK,
        wrapper="arf_plugin.hooks.resume:pt_load",
        when="resumable run",
        why="the same where weights have one name for any number of processes",
    ),
    Hook(
        id="count-batches",
        target="open_clip_train.train:enumerate",
        origin="builtins:enumerate",
        versions=BOTH,
        wrapper="arf_plugin.hooks.resume:enumerate_batches",
        when="resumable run",
        why="counts on from the resumed batch, for schedule and logs; everything but the resumable loader from 0",
    ),
)


def hooks(when: str, version: str) -> tuple[Hook, ...]:
    """The hooks of one phase that were written for a release.

    Raises:
        IncompatibleUpstreamError: There is none: the phase is for other releases alone, or is misspelt.
    """
    phase = [hook for hook in HOOKS if hook.when == when]
    fitting = tuple(hook for hook in phase if hook.covers(version))
    if not fitting:
        there = " or ".join(sorted({hook.versions for hook in phase}))
        raise IncompatibleUpstreamError(
            f"no hook of the phase '{when}' was written for {PACKAGE} {version}.\n"
            f"  expected: {PACKAGE}{there}\n"
            "Drop the --arf-* flag that needs it, or install a release that has it: see README.md of arf-plugin."
        )
    return fitting
