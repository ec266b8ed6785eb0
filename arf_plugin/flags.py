"""The ``--arf-*`` flags of the trainer, as its parser declares them; what they mean together says config.py."""

from __future__ import annotations

import argparse

from arf_plugin.number_types import number_type

EPILOG = """\
Anchor-based Robust Fine-tuning (arf-plugin):
  torchrun --nproc_per_node 8 -m open_clip_train.main --model ViT-B-16-quickgelu --pretrained openai \\
      --train-data 'imagenet/{000..999}.tar' --arf-classnames imagenet --arf-templates imagenet \\
      --arf-anchors ANCHORS
  A run that is killed goes on where it was, and ends equal to the bit, when the same command is given again:
      ... --arf-deterministic --arf-checkpoint-every 500 --resume latest
  A step for less, ours and not the paper's: a quarter as many pairs as task images; anchors on every second step only:
      ... --batch-size 64 --arf-pair-batch-size 16            ... --arf-every 2
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


_weight = number_type(float, lambda value: 0 <= value < float("inf"), "a finite number >= 0")
_share = number_type(float, lambda value: 0 < value <= 1, "a part, above 0 and up to 1 (0.1 is a tenth)")
_count = number_type(int, lambda value: value >= 0, "a whole number >= 0")
_steps = number_type(int, lambda value: value >= 1, "a whole number of steps >= 1")
_batch = number_type(
    int, lambda value: value >= 1, "a whole number >= 1 (to drop pairs: --arf-pair-weight 0)"
)


def add_arf_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the ARF group to a parser. Defaults are None, so that a flag which was given can be told apart."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter  # keeps the lines of the examples
    parser.epilog = EPILOG
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
        type=_batch,
        metavar="A",
        help="Anchor pairs per process and micro-batch (default: --batch-size).",
    )
    group.add_argument(
        "--arf-every",
        type=_steps,
        metavar="N",
        help="Anchors on every N-th optimizer step only, counted over the whole run, with N times the weight: the same "
        "gradient on average. The steps between load no pairs and cost what FLYP costs (default: 1).",
    )
    group.add_argument(
        "--arf-workers",
        type=_count,
        metavar="N",
        help="How many of the --workers load pair anchors (default: a share by images loaded).",
    )
    group.add_argument(
        "--arf-missing-caption",
        choices=("error", "prompt"),
        help="A task sample without a caption: stop, or use its class prompt (default: error).",
    )
    group.add_argument(
        "--arf-random-weights",
        action="store_true",
        default=None,
        help="Train with anchors although weights of the model come from no file. Without it that is an error: a "
        "forgotten or misspelt --pretrained trains a model that there is nothing to keep of.",
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
        "--arf-trim-text",
        choices=("auto", "off"),
        help="Cut each batch's texts to the longest one. 'auto' does so for towers where features and gradients stay "
        "the same, which are CLIP's own: causal, pooled at the end of the text (default: auto with anchors or class "
        "prompts).",
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
