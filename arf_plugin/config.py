"""The ``--arf-*`` flags of the trainer: declared here, once, and checked before anything heavy starts."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from arf_plugin.errors import FlagError

EPILOG = """\
Anchor-based Robust Fine-tuning (arf-plugin):
  torchrun --nproc_per_node 8 -m open_clip_train.main --model ViT-B-16-quickgelu --pretrained openai \\
      --train-data 'imagenet/{000..999}.tar' --arf-classnames imagenet --arf-templates imagenet \\
      --arf-anchors ANCHORS
  A run that is killed goes on where it was, and ends equal to the bit, when the same command is given again:
      ... --arf-deterministic --arf-checkpoint-every 500 --resume latest
  Build ANCHORS with `arf anchors`, look at it with `arf check`. docs: README.md of arf-plugin.
"""

WATCH = """\
Does the model forget? Sets of classes that are not fine-tuned on show it: the accuracy of before the first step, and
then after every epoch, in the trainer's log, TensorBoard and wandb, and in LOGS/NAME/arf_watch.jsonl.
  ... --arf-watch held-out/imagenet-sketch-500 held-out/pets-500 --arf-watch-drift --report-to tensorboard
"""

BASELINES = """\
Other ways to fine-tune robustly, on the same data. Two more need no flag of their own:
  zero-shot distillation: --distill-model and --distill-pretrained with the starting model as the teacher, beside
      --arf-classnames. With --arf-anchors every term is distilled.
  plain mixing: --train-data 'task/{..}.tar::ANCHORS/pairs/{..}.tar' --dataset-resampled
      --train-data-upsampling-factors 1::1 --arf-classnames FILE. Samples with a `cls` get class prompts, the others
      keep their own `txt`. A factor weighs each shard of its part, not the part as a whole. Only pairs can be mixed:
      caption anchors have no images of their own.
"""


@dataclasses.dataclass(frozen=True)
class ArfConfig:
    """What the user asked for, with defaults filled in.

    Attributes:
        anchors: Folder or fsspec URL of the anchor set; None means no anchors (FLYP, or plain open_clip).
        caption_weight: Weight of the caption-anchor loss; 0 switches the term and its data off.
        pair_weight: Weight of the pair-anchor loss; 0 switches the term and its data off.
        pair_batch_size: Pairs per process and micro-batch (A); None means ``--batch-size`` (B).
        workers: Loader workers for pair anchors; None means a share of ``--workers``.
        missing_caption: ``error`` or ``prompt`` (use the class prompt in the caption's place).
        classnames: File of class names, one per line, or ``imagenet``.
        templates: File of prompt templates, one per line, or ``imagenet``.
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
    workers: int | None = None
    missing_caption: str = "error"
    classnames: str | None = None
    templates: str | None = None
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
    "arf_workers",
    "arf_missing_caption",
)


def add_arf_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the ARF group to a parser. Defaults are None, so that a flag which was given can be told apart."""
    group = parser.add_argument_group("Anchor-based Robust Fine-tuning (arf-plugin)")
    group.add_argument(
        "--arf-anchors", metavar="PATH", help="Anchor set (folder or fsspec URL); turns ARF on."
    )
    group.add_argument(
        "--arf-caption-weight",
        type=_weight,
        metavar="W",
        help="Weight of the caption-anchor loss; 0 switches the term and its data off (default: 1.0).",
    )
    group.add_argument(
        "--arf-pair-weight",
        type=_weight,
        metavar="W",
        help="Weight of the pair-anchor loss; 0 switches the term and its data off (default: 1.0).",
    )
    group.add_argument(
        "--arf-pair-batch-size",
        type=_positive,
        metavar="A",
        help="Anchor pairs per process and micro-batch (default: --batch-size).",
    )
    group.add_argument(
        "--arf-workers",
        type=_not_negative,
        metavar="N",
        help="How many of the --workers load pair anchors (default: a share by images loaded).",
    )
    group.add_argument(
        "--arf-missing-caption",
        choices=("error", "prompt"),
        help="A task sample without a caption: stop, or use its class prompt (default: error).",
    )
    group.add_argument(
        "--arf-classnames",
        metavar="FILE",
        help="Class names, one per line, or 'imagenet': builds class prompts from each sample's `cls`.",
    )
    group.add_argument(
        "--arf-templates",
        metavar="FILE",
        help="Prompt templates, one per line with {c} for the class name, or 'imagenet' (OpenAI's list, the "
        "default with --arf-classnames). One random template per sample.",
    )
    group.add_argument(
        "--arf-freeze-bn",
        action="store_true",
        default=None,
        help="Keep BatchNorm layers on their pretrained statistics, which makes ARF exact for towers with them.",
    )
    _add_resume_flags(parser)
    _add_watch_flags(parser)
    _add_baseline_flags(parser)
    parser.epilog = EPILOG


def _add_resume_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "Reproducible and resumable training (arf-plugin), with anchors or without"
    )
    group.add_argument(
        "--arf-deterministic",
        action="store_true",
        default=None,
        help="Two runs with the same flags and --seed end equal to the bit: seeded order and augmentation of all data "
        "for any number of workers, deterministic kernels. The number of processes, workers and threads counts.",
    )
    group.add_argument(
        "--arf-checkpoint-every",
        type=_steps,
        metavar="N",
        help="Save a step checkpoint every N optimizer steps, epoch_E_step_S.pt beside open_clip's own; --resume "
        "latest goes on in the middle of the epoch. The newest is kept. With --arf-deterministic the resumed run ends "
        "equal to an undisturbed one to the bit; without it the rest of the epoch sees data in a fresh order.",
    )
    group.add_argument(
        "--arf-stop-file",
        metavar="FILE",
        help="Once FILE is there: finish the step, save a step checkpoint, remove FILE and end with status 0. For jobs "
        "that are told to make room: trap 'touch FILE' USR1. The first process looks after every step.",
    )


def _add_watch_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Anchor-based Robust Fine-tuning (arf-plugin), watching", WATCH)
    group.add_argument(
        "--arf-watch",
        nargs="+",
        metavar="FOLDER",
        help="Small held-out sets, as `arf evaluate --data` reads them: zero-shot accuracy before the first step and "
        "after every epoch. Needs no other ARF flag, and changes no bit of the training.",
    )
    group.add_argument(
        "--arf-watch-drop",
        type=_share,
        metavar="PART",
        help="Warn when more than this part of the starting accuracy is lost (default: 0.1).",
    )
    group.add_argument(
        "--arf-watch-drift",
        action="store_true",
        default=None,
        help="Also measure how far the features of the watched images and classes have moved from where training "
        "started: mean cosine similarity and linear CKA (Kornblith et al. 2019).",
    )


def _add_baseline_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Anchor-based Robust Fine-tuning (arf-plugin), baselines", BASELINES)
    group.add_argument(
        "--arf-l2sp",
        type=_weight,
        metavar="W",
        help="L2-SP (Li et al. 2018): adds W/2 times the squared distance of all trained parameters from where the run "
        "started; biases, norms and the logit scale count. Goes with every loss, ARF's too (default: 0, off).",
    )
    group.add_argument(
        "--arf-head",
        metavar="CHECKPOINT",
        help="LP-FT (Kumar et al. 2022): trains with cross-entropy on each sample's `cls` from the weights and the "
        "linear head of CHECKPOINT, made by `arf probe`. The text tower rests. Needs the probe's --arf-classnames.",
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
    _check_resuming(args, config)
    for name in ("fsdp", "horovod", "torchscript"):
        if config.watch and getattr(args, name, False):
            raise FlagError(
                f"--arf-watch needs the whole model in each process, as --{name} has it not. Drop one."
            )
    if config.freeze_bn and getattr(args, "use_bn_sync", False):
        raise FlagError(
            "--arf-freeze-bn and --use-bn-sync contradict each other: frozen statistics are not synchronised. Drop one."
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
            "--arf-stop-file and --remote-sync do not go together: open_clip's process for syncing ends with the whole "
            "run only. Drop one."
        )


def _check_baselines(args: Any, config: ArfConfig) -> None:
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
            "--arf-head needs --arf-classnames: the file that `arf probe --classnames` was given, so that the classes "
            "of head and data are known to be the same."
        )


def _spelling(dest: str) -> str:
    return "--" + dest.replace("_", "-")


def _weight(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number >= 0")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a part, above 0 and up to 1 (0.1 is a tenth)")
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a whole number >= 1 (to drop pairs: --arf-pair-weight 0)"
        )
    return value


def _steps(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of steps >= 1")
    return value


def _not_negative(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number >= 0")
    return value
