"""Which ``--arf-*`` flags go together, and with which of the trainer's, before anything heavy starts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from arf_plugin.errors import FlagError
from arf_plugin.flags import ArfConfig, spelling
from arf_plugin.trainer_args import TrainerArgs

__all__ = ["ArfConfig", "resolve"]


def resolve(args: TrainerArgs) -> ArfConfig:
    """Checks the ARF flags against each other and the trainer's, and fills in defaults on ``args`` too.

    Args:
        args: The trainer's parsed arguments, ARF's included.

    Returns:
        The configuration. ``args.arf_*`` then hold the same values, so that the trainer's own log shows them.

    Raises:
        FlagError: A combination that cannot work.
    """
    fields = dataclasses.fields(ArfConfig)
    values = {field.name: getattr(args, f"arf_{field.name}", None) for field in fields}
    given: dict[str, Any] = {name: value for name, value in values.items() if value is not None}
    needs_anchors = [
        spelling(field.name) for field in fields if field.metadata["needs_anchors"] and field.name in given
    ]
    if "anchors" not in given and needs_anchors:
        raise FlagError(
            f"{', '.join(needs_anchors)} given without --arf-anchors.\n"
            "These flags describe how anchors are used: add --arf-anchors PATH, or drop them."
        )
    if given.get("anchors") == "":
        raise FlagError("--arf-anchors is empty; expected the folder or URL of an anchor set.")
    if "watch" in given:
        given["watch"] = tuple(given["watch"])
    elif stray := [spelling(name) for name in ("watch_drop", "watch_drift") if name in given]:
        raise FlagError(
            f"{', '.join(stray)} given without --arf-watch.\nName a folder to watch on: --arf-watch FOLDER"
        )
    if "teacher" not in given and (
        stray := [spelling(n) for n in ("teacher_weight", "teacher_every", "save_average") if n in given]
    ):
        raise FlagError(f"{', '.join(stray)} given without --arf-teacher.\nName one: --arf-teacher start")
    if "templates" in given and "classnames" not in given:
        raise FlagError(
            "--arf-templates given without --arf-classnames: templates need class names to fill in."
        )
    if "classnames" in given and "head" not in given:
        given.setdefault("templates", "imagenet")
    if "head" in given or not given.keys() & {"anchors", "classnames"}:
        given.setdefault("trim_text", "off")  # what trains as without the plugin keeps every bit
    if given.get("teacher") == "average" and given.keys() & {
        "deterministic",
        "checkpoint_every",
        "stop_file",
    }:
        given.setdefault("save_average", True)  # an epoch's checkpoint is open_clip's, without the average
    config = ArfConfig(**given)
    if config.anchors and config.caption_weight == 0 and config.pair_weight == 0:
        raise FlagError(
            "--arf-caption-weight 0 and --arf-pair-weight 0 leave no anchors; drop --arf-anchors instead."
        )
    _check_trainer(args, config)
    _check_features(args, config)
    _check_baselines(args, config)
    _check_teacher(args, config)
    for field in fields:
        setattr(args, f"arf_{field.name}", getattr(config, field.name))
    return config


def _check_trainer(args: TrainerArgs, config: ArfConfig) -> None:
    if "coca" in args.model.lower():
        raise FlagError(
            f"--model {args.model}: CoCa needs as many images as texts in a batch, which ARF's batches do not have.\n"
            "Use a CLIP or SigLIP model, or train CoCa without --arf-* flags."
        )
    if args.train_data is None:
        raise FlagError("--arf-* flags are for training, but --train-data is missing.")
    if args.dataset_type == "synthetic":
        raise FlagError(
            "--dataset-type synthetic has no sample ids to join anchors on; use webdataset or csv."
        )
    # A file of weights beside a model that brings its own is passed over by open_clip, which does not say so.
    pretrained = getattr(args, "pretrained", None)
    if pretrained and ":" in args.model and Path(pretrained).exists():
        raise FlagError(
            f"--model {args.model} brings its own weights along, and open_clip would pass over --pretrained "
            f"{pretrained}.\n"
            "Drop --pretrained, or name the architecture with --model and the file with --pretrained."
        )
    _check_resuming(args, config)
    for name in ("fsdp", "horovod", "torchscript"):
        if config.watch and getattr(args, name, False):
            raise FlagError(
                f"--arf-watch needs the whole model in each process, as --{name} has it not. Drop one."
            )
    if config.freeze_bn and getattr(args, "use_bn_sync", False):
        raise FlagError(
            "--arf-freeze-bn and --use-bn-sync contradict each other: frozen statistics are not synchronised. "
            "Drop one."
        )


def _check_resuming(args: TrainerArgs, config: ArfConfig) -> None:
    saving = "--arf-checkpoint-every" if config.checkpoint_every else "--arf-stop-file"
    if config.resumable and getattr(args, "horovod", False):
        asked = "--arf-deterministic" if config.deterministic else saving
        raise FlagError(f"{asked} and --horovod do not go together. Start the processes with torchrun.")
    if config.saves_steps and (getattr(args, "logs", None) or "none").lower() == "none":
        raise FlagError(f"{saving} with --logs none: there is no folder for checkpoints. Drop one.")
    if config.save_average and (getattr(args, "logs", None) or "none").lower() == "none":
        raise FlagError(
            "The averaged weights are to be saved (--arf-save-average, or a run that is to be resumed), with --logs "
            "none: there is no folder for them. Name one."
        )
    if config.stop_file and getattr(args, "remote_sync", None):
        raise FlagError(
            "--arf-stop-file and --remote-sync do not go together: open_clip's process for syncing ends with the "
            "whole run only. Drop one."
        )


def _check_features(args: TrainerArgs, config: ArfConfig) -> None:
    by_feature = [
        spelling(f"{kind}_loss")
        for kind, there in (("pair", config.pair_features), ("caption", config.caption_features))
        if there
    ]
    if by_feature and getattr(args, "resume", None) and not _start_is_known(args):
        raise FlagError(
            f"{by_feature[0]} holds features to those of the model that training started from, which --resume alone "
            "does not tell.\nName it with --pretrained, as when the run began."
        )
    if config.caption_features and config.missing_caption == "prompt":
        raise FlagError(
            "--arf-caption-loss feature and --arf-missing-caption prompt do not go together: the anchor set has no "
            "features of prompts. Drop one."
        )
    if config.pair_features and config.pair_loss == "difference" and getattr(args, "horovod", False):
        raise FlagError(
            "--arf-pair-loss difference and --horovod do not go together: processes would each have a mean of their "
            "own. Start them with torchrun."
        )


def _start_is_known(args: TrainerArgs) -> bool:
    return bool(getattr(args, "pretrained", None)) or ":" in args.model


def _check_baselines(args: TrainerArgs, config: ArfConfig) -> None:
    distill = [getattr(args, name, None) is not None for name in ("distill_model", "distill_pretrained")]
    if any(distill) and not all(distill):
        raise FlagError(
            "--distill-model and --distill-pretrained belong together: with one of them open_clip distils nothing, and "
            "does not say so.\nGive both; beside --distill-model local-dir:FOLDER any --distill-pretrained will do, "
            "since the folder brings its weights along."
        )
    if any(distill) and getattr(args, "siglip", False):
        raise FlagError("--distill-model with --siglip: open_clip distils the loss of CLIP only. Drop one.")
    if any(distill) and getattr(args, "accum_freq", 1) > 1:
        raise FlagError(
            f"--distill-model with --accum-freq {args.accum_freq}: open_clip distils without accumulation only.\n"
            "Use --accum-freq 1, with a larger --batch-size if memory allows."
        )
    if config.l2sp and getattr(args, "resume", None) and not (_start_is_known(args) or config.head):
        raise FlagError(
            "--arf-l2sp holds the weights to those that training started from, which --resume alone does not tell.\n"
            "Name them with --pretrained, as when the run began."
        )
    if config.head is None:
        return
    for flag, given, why in (
        (
            "--arf-anchors",
            config.anchors,
            "anchors need the contrastive loss, which the head takes the place of",
        ),
        ("--arf-templates", config.templates, "a head trains on class indices, not on prompts"),
        ("--distill-model", any(distill), "the teacher's texts are none that a head trains on"),
        ("--torchscript", getattr(args, "torchscript", False), "a compiled model cannot be given a head"),
    ):
        if given:
            raise FlagError(f"--arf-head and {flag} do not go together: {why}. Drop one.")
    if config.classnames is None:
        raise FlagError(
            "--arf-head needs --arf-classnames: the file that `arf probe --classnames` was given, so that the classes "
            "of head and data are known to be the same."
        )


def _check_teacher(args: TrainerArgs, config: ArfConfig) -> None:
    if config.teacher is None:
        return
    for flag, given, why in (
        ("--arf-head", config.head, "a head trains on labels, and there are no texts for a teacher to read"),
        ("--torchscript", getattr(args, "torchscript", False), "a compiled model cannot be copied"),
    ):
        if given:
            raise FlagError(f"--arf-teacher and {flag} do not go together: {why}. Drop one.")
    if config.teacher == "average":
        return
    if config.save_average:
        raise FlagError(
            "--arf-save-average saves what --arf-teacher average makes, and the teacher is the start."
        )
    if config.teacher_weight == 0:
        raise FlagError("--arf-teacher-weight 0 leaves nothing of --arf-teacher start; drop both.")
    if getattr(args, "resume", None) and not (_start_is_known(args) or config.random_weights):
        raise FlagError(
            "--arf-teacher start is the model that training started from, which --resume alone does not tell.\n"
            "Name its weights with --pretrained, as when the run began."
        )
