"""What the ``--arf-*`` flags of a run ask for, checked with the trainer's own flags before anything heavy starts."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from arf_plugin.errors import FlagError


@dataclasses.dataclass(frozen=True)
class ArfConfig:
    """What the user asked for, with defaults filled in.

    Attributes:
        anchors: Folder or fsspec URL of the anchor set; None means no anchors (FLYP, or plain open_clip).
        caption_weight: Weight of the caption-anchor loss; 0 switches the term and its data off.
        pair_weight: Weight of the pair-anchor loss; 0 switches the term and its data off.
        pair_batch_size: Pairs per process and micro-batch (A); None means ``--batch-size`` (B).
        every: One optimizer step in so many has anchors, with so many times their weight.
        workers: Loader workers for pair anchors; None means a share of ``--workers``.
        missing_caption: ``error`` or ``prompt`` (use the class prompt in the caption's place).
        random_weights: Whether a run with anchors may start from weights that come from no file.
        classnames: File of class names, one per line, or ``imagenet``.
        templates: File of prompt templates, one per line, or ``imagenet``.
        trim_text: ``auto`` (cut each batch's texts to the longest where that is exact) or ``off``.
        freeze_bn: Keep BatchNorm layers on their pretrained statistics.
        deterministic: Make two runs with the same seed equal to the bit.
        checkpoint_every: Optimizer steps between step checkpoints; 0 saves none.
        stop_file: File whose appearance ends the run after a last step checkpoint.
        l2sp: Weight of the L2-SP penalty, a baseline; 0 is off.
        head: Checkpoint of ``arf probe`` to go on from with cross-entropy (LP-FT), a baseline.
        watch: Folders of evaluation sets to measure zero-shot accuracy on before the first step and every epoch.
        watch_drop: Part of the starting accuracy whose loss is warned about.
        watch_drift: Whether to measure how far features have moved, too.
    """

    anchors: str | None = None
    caption_weight: float = 1.0
    pair_weight: float = 1.0
    pair_batch_size: int | None = None
    every: int = 1
    workers: int | None = None
    missing_caption: str = "error"
    random_weights: bool = False
    classnames: str | None = None
    templates: str | None = None
    trim_text: str = "auto"
    freeze_bn: bool = False
    deterministic: bool = False
    checkpoint_every: int = 0
    stop_file: str | None = None
    l2sp: float = 0.0
    head: str | None = None
    watch: tuple[str, ...] = ()
    watch_drop: float = 0.1
    watch_drift: bool = False

    @property
    def saves_steps(self) -> bool:
        """Whether step checkpoints may be saved."""
        return bool(self.checkpoint_every or self.stop_file)

    @property
    def resumable(self) -> bool:
        """Whether the run asks for more than open_clip's order of data and checkpoints."""
        return self.deterministic or self.saves_steps


# Flags that mean nothing without an anchor set, by their argparse destination.
NEED_ANCHORS = (
    "arf_caption_weight",
    "arf_pair_weight",
    "arf_pair_batch_size",
    "arf_every",
    "arf_workers",
    "arf_missing_caption",
    "arf_random_weights",
)


def resolve(args: argparse.Namespace) -> ArfConfig:
    """Checks the ARF flags against each other and the trainer's, and fills in defaults on ``args`` too.

    Args:
        args: The trainer's parsed arguments, ARF's included.

    Returns:
        The configuration. ``args.arf_*`` then hold the same values, so that the trainer's own log shows them.

    Raises:
        FlagError: A combination that cannot work.
    """
    given = {
        name: value for name, value in vars(args).items() if name.startswith("arf_") and value is not None
    }
    if "arf_anchors" not in given:
        stray = [_spelling(name) for name in NEED_ANCHORS if name in given]
        if stray:
            raise FlagError(
                f"{', '.join(stray)} given without --arf-anchors.\n"
                "These flags describe how anchors are used: add --arf-anchors PATH, or drop them."
            )
    elif not given["arf_anchors"]:
        raise FlagError("--arf-anchors is empty; expected the folder or URL of an anchor set.")
    if "arf_watch" in given:
        given["arf_watch"] = tuple(given["arf_watch"])
    elif stray := [_spelling(name) for name in ("arf_watch_drop", "arf_watch_drift") if name in given]:
        raise FlagError(
            f"{', '.join(stray)} given without --arf-watch.\nName a folder to watch on: --arf-watch FOLDER"
        )
    if "arf_templates" in given and "arf_classnames" not in given:
        raise FlagError(
            "--arf-templates given without --arf-classnames: templates need class names to fill in."
        )
    if "arf_classnames" in given and "arf_head" not in given:
        given.setdefault("arf_templates", "imagenet")
    if "arf_head" in given or not given.keys() & {"arf_anchors", "arf_classnames"}:
        given.setdefault("arf_trim_text", "off")  # what trains as without the plugin keeps every bit
    config = ArfConfig(**{name.removeprefix("arf_"): value for name, value in given.items()})
    if config.anchors and config.caption_weight == 0 and config.pair_weight == 0:
        raise FlagError(
            "--arf-caption-weight 0 and --arf-pair-weight 0 leave no anchors; drop --arf-anchors instead."
        )
    _check_trainer(args, config)
    _check_baselines(args, config)
    for field in dataclasses.fields(ArfConfig):
        setattr(args, f"arf_{field.name}", getattr(config, field.name))
    return config


def _check_trainer(args: Any, config: ArfConfig) -> None:
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
    _check_weights(args)
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


def _check_weights(args: Any) -> None:
    """A file of weights beside a model that brings its own is passed over by open_clip, which does not say so."""
    pretrained = getattr(args, "pretrained", None)
    if pretrained and ":" in args.model and Path(pretrained).exists():
        raise FlagError(
            f"--model {args.model} brings its own weights along, and open_clip would pass over --pretrained "
            f"{pretrained}.\n"
            "Drop --pretrained, or name the architecture with --model and the file with --pretrained."
        )


def _check_resuming(args: Any, config: ArfConfig) -> None:
    saving = "--arf-checkpoint-every" if config.checkpoint_every else "--arf-stop-file"
    if config.resumable and getattr(args, "horovod", False):
        asked = "--arf-deterministic" if config.deterministic else saving
        raise FlagError(f"{asked} and --horovod do not go together. Start the processes with torchrun.")
    if config.saves_steps and (getattr(args, "logs", None) or "none").lower() == "none":
        raise FlagError(f"{saving} with --logs none: there is no folder for checkpoints. Drop one.")
    if config.stop_file and getattr(args, "remote_sync", None):
        raise FlagError(
            "--arf-stop-file and --remote-sync do not go together: open_clip's process for syncing ends with "
            "the whole "
            "run only. Drop one."
        )


def _check_baselines(args: Any, config: ArfConfig) -> None:
    distill = [getattr(args, name, None) is not None for name in ("distill_model", "distill_pretrained")]
    if any(distill) and not all(distill):
        raise FlagError(
            "--distill-model and --distill-pretrained belong together: with one of them open_clip distils "
            "nothing, and "
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
    start_is_known = getattr(args, "pretrained", None) or ":" in args.model or config.head
    if config.l2sp and getattr(args, "resume", None) and not start_is_known:
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
            "--arf-head needs --arf-classnames: the file that `arf probe --classnames` was given, so that the "
            "classes "
            "of head and data are known to be the same."
        )


def _spelling(dest: str) -> str:
    return "--" + dest.replace("_", "-")
