"""Which ``--arf-*`` flags go together, and with which of the trainer's, before anything heavy starts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from arf_plugin.errors import FlagError
from arf_plugin.flags import PRESETS, ArfConfig, spelling
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
    if given.get("anchors") == "":
        raise FlagError("--arf-anchors is empty; expected the folder or URL of an anchor set.")
    for whole, parts, then in (
        (
            "anchors",
            [field.name for field in fields if field.metadata["needs_anchors"]],
            "These flags describe how anchors are used: add --arf-anchors PATH, or drop them.",
        ),
        ("watch", ["watch_drop", "watch_drift"], "Name a folder to watch on: --arf-watch FOLDER"),
        ("teacher", ["teacher_weight", "teacher_every", "save_average"], "Name one: --arf-teacher start"),
    ):
        if whole not in given and (stray := [spelling(part) for part in parts if part in given]):
            raise FlagError(f"{', '.join(stray)} given without {spelling(whole)}.\n{then}")
    if "templates" in given and "classnames" not in given:
        raise FlagError(
            "--arf-templates given without --arf-classnames: templates need class names to fill in."
        )
    for name, value in PRESETS.get(given.get("preset", ""), {}).items():
        given.setdefault(name, value(args) if callable(value) else value)
    if "watch" in given:
        given["watch"] = tuple(given["watch"])
    if "classnames" in given and "head" not in given:
        given.setdefault("templates", "imagenet")
    if "head" in given or not given.keys() & {"anchors", "classnames"}:
        given.setdefault("trim_text", "off")  # what trains as without the plugin keeps every bit
    resumes = given.keys() & {"deterministic", "checkpoint_every", "stop_file"}
    if given.get("teacher") == "average" and resumes:
        given.setdefault("save_average", True)  # an epoch's checkpoint is open_clip's, without the average
    config = ArfConfig(**given)
    for problem in _problems(args, config):
        raise FlagError(problem)
    for field in fields:
        setattr(args, f"arf_{field.name}", getattr(config, field.name))
    return config


def _problems(args: TrainerArgs, config: ArfConfig) -> Iterator[str]:
    """What cannot work, the first of it first."""

    def has(name: str) -> bool:  # not every release has every flag
        return bool(getattr(args, name, None))

    if config.anchors and config.caption_weight == 0 and config.pair_weight == 0:
        yield "--arf-caption-weight 0 and --arf-pair-weight 0 leave no anchors; drop --arf-anchors instead."
    if "coca" in args.model.lower():
        yield (
            f"--model {args.model}: CoCa needs as many images as texts in a batch, which ARF's batches do not have.\n"
            "Use a CLIP or SigLIP model, or train CoCa without --arf-* flags."
        )
    if args.train_data is None:
        yield "--arf-* flags are for training, but --train-data is missing."
    if args.dataset_type == "synthetic":
        yield "--dataset-type synthetic has no sample ids to join anchors on; use webdataset or csv."
    brings_weights = ":" in args.model
    # A file of weights beside a model that brings its own is passed over by open_clip, which does not say so.
    if brings_weights and has("pretrained") and Path(str(args.pretrained)).exists():
        yield (
            f"--model {args.model} brings its own weights along, and open_clip would pass over --pretrained "
            f"{args.pretrained}.\n"
            "Drop --pretrained, or name the architecture with --model and the file with --pretrained."
        )

    # Going on, and where to.
    saving = "--arf-checkpoint-every" if config.checkpoint_every else "--arf-stop-file"
    logs_nothing = (getattr(args, "logs", None) or "none").lower() == "none"
    if config.resumable and has("horovod"):
        asked = "--arf-deterministic" if config.deterministic else saving
        yield f"{asked} and --horovod do not go together. Start the processes with torchrun."
    if config.saves_steps and logs_nothing:
        yield f"{saving} with --logs none: there is no folder for checkpoints. Drop one."
    if config.save_average and logs_nothing:
        yield (
            "The averaged weights are to be saved (--arf-save-average, or a run that is to be resumed), with --logs "
            "none: there is no folder for them. Name one."
        )
    if config.stop_file and has("remote_sync"):
        yield (
            "--arf-stop-file and --remote-sync do not go together: open_clip's process for syncing ends with the "
            "whole run only. Drop one."
        )
    for name in ("fsdp", "horovod", "torchscript"):
        if config.watch and has(name):
            yield f"--arf-watch needs the whole model in each process, as --{name} has it not. Drop one."
    if config.freeze_bn and has("use_bn_sync"):
        yield (
            "--arf-freeze-bn and --use-bn-sync contradict each other: frozen statistics are not synchronised. "
            "Drop one."
        )

    # Features of the starting model.
    start_is_unknown = has("resume") and not (has("pretrained") or brings_weights)
    for kind, by_feature in (("pair", config.pair_features), ("caption", config.caption_features)):
        if by_feature and start_is_unknown:
            yield (
                f"{spelling(f'{kind}_loss')} holds features to those of the model that training started from, which "
                "--resume alone does not tell.\nName it with --pretrained, as when the run began."
            )
    if config.caption_features and config.missing_caption == "prompt":
        yield (
            "--arf-caption-loss feature and --arf-missing-caption prompt do not go together: the anchor set has no "
            "features of prompts. Drop one."
        )
    if config.pair_features and config.pair_loss == "difference" and has("horovod"):
        yield (
            "--arf-pair-loss difference and --horovod do not go together: processes would each have a mean of their "
            "own. Start them with torchrun."
        )

    # Baselines.
    distill = [getattr(args, name, None) is not None for name in ("distill_model", "distill_pretrained")]
    if any(distill) and not all(distill):
        yield (
            "--distill-model and --distill-pretrained belong together: with one of them open_clip distils nothing, and "
            "does not say so.\nGive both; beside --distill-model local-dir:FOLDER any --distill-pretrained will do, "
            "since the folder brings its weights along."
        )
    if any(distill) and has("siglip"):
        yield "--distill-model with --siglip: open_clip distils the loss of CLIP only. Drop one."
    if any(distill) and getattr(args, "accum_freq", 1) > 1:
        yield (
            f"--distill-model with --accum-freq {args.accum_freq}: open_clip distils without accumulation only.\n"
            "Use --accum-freq 1, with a larger --batch-size if memory allows."
        )
    if config.l2sp and start_is_unknown and not config.head:
        yield (
            "--arf-l2sp holds the weights to those that training started from, which --resume alone does not tell.\n"
            "Name them with --pretrained, as when the run began."
        )
    scripted = has("torchscript")
    for one, one_given, flag, given, why in (
        ("head", config.head, "--arf-anchors", config.anchors,
         "anchors need the contrastive loss, which the head takes the place of"),
        ("head", config.head, "--arf-templates", config.templates,
         "a head trains on class indices, not on prompts"),
        ("head", config.head, "--distill-model", any(distill),
         "the teacher's texts are none that a head trains on"),
        ("head", config.head, "--torchscript", scripted, "a compiled model cannot be given a head"),
        ("teacher", config.teacher, "--arf-head", config.head,
         "a head trains on labels, and there are no texts for a teacher to read"),
        ("teacher", config.teacher, "--torchscript", scripted, "a compiled model cannot be copied"),
    ):  # fmt: skip
        if one_given is not None and given:
            yield f"--arf-{one} and {flag} do not go together: {why}. Drop one."
    if config.head is not None and config.classnames is None:
        yield (
            "--arf-head needs --arf-classnames: the file that `arf probe --classnames` was given, so that the classes "
            "of head and data are known to be the same."
        )

    if config.teacher != "start":
        return
    if config.save_average:
        yield "--arf-save-average saves what --arf-teacher average makes, and the teacher is the start."
    if config.teacher_weight == 0:
        yield "--arf-teacher-weight 0 leaves nothing of --arf-teacher start; drop both."
    if start_is_unknown and not config.random_weights:
        yield (
            "--arf-teacher start is the model that training started from, which --resume alone does not tell.\n"
            "Name its weights with --pretrained, as when the run began."
        )
