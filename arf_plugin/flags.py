"""The ``--arf-*`` flags: each is declared once, as a field of `ArfConfig`, from which the trainer's parser is made.

What they mean together, and beside the trainer's own flags, says :mod:`arf_plugin.config`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import io
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar
from urllib.parse import urlsplit

from arf_plugin.errors import FlagError, did_you_mean

Number = TypeVar("Number", int, float)

ANCHORS = "Anchor-based Robust Fine-tuning (arf-plugin)"
RESUME = "Reproducible and resumable training (arf-plugin), with anchors or without"
TEACHER = f"{ANCHORS}, teacher"
WATCH = f"{ANCHORS}, watching"
BASELINES = f"{ANCHORS}, baselines"

FEATURE_WEIGHT = 10.0  # of a term of features, where none is given

PAIR_SHARE = 4  # task images to a pair, in the recommended setting

# What --arf-preset stands for: values of flags that are not given, some of them by the trainer's own.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"caption_loss": "contrastive", "pair_loss": "contrastive"},
    "recommended": {
        "pair_loss": "feature",
        "pair_batch_size": lambda args: max(1, args.batch_size // PAIR_SHARE),
    },
}

EPILOG = """\
Anchor-based Robust Fine-tuning (arf-plugin):
  torchrun --nproc_per_node 8 -m open_clip_train.main --model ViT-B-16-quickgelu --pretrained openai \\
      --train-data 'imagenet/{000..999}.tar' --arf-classnames imagenet --arf-templates imagenet \\
      --arf-anchors ANCHORS
  A run that is killed goes on where it was, and ends bitwise identical, when the same command is given again:
      ... --arf-deterministic --arf-checkpoint-every 500 --resume latest
  A step for less, ours and not the paper's: a quarter as many pairs as task images; anchors on every second step only:
      ... --batch-size 64 --arf-pair-batch-size 16            ... --arf-every 2
  Build ANCHORS with `arf anchors`, look at it with `arf check`. docs: README.md of arf-plugin.
"""

GROUPS: dict[str, str | None] = {
    ANCHORS: None,
    TEACHER: """\
Holds the features of the task batch to those that a teacher gives the same images and texts: the model that the run
starts from, or the average of its weights so far. Goes with anchors and without. Ours, not the ARF paper's. A copy of
the model is kept in memory, and run without gradient on the steps that have the term.
""",
    RESUME: None,
    WATCH: """\
Does the model forget? Sets of classes that are not fine-tuned on show it: the accuracy of before the first step, and
then after every epoch, in the trainer's log, TensorBoard and wandb, and in LOGS/NAME/arf_watch.jsonl.
  ... --arf-watch held-out/imagenet-sketch-500 held-out/pets-500 --arf-watch-drift --report-to tensorboard
""",
    BASELINES: """\
Other ways to fine-tune robustly, on the same data. Two more need no flag of their own:
  zero-shot distillation: --distill-model and --distill-pretrained with the starting model as the teacher, beside
      --arf-classnames. With --arf-anchors every term is distilled.
  plain mixing: --train-data 'task/{..}.tar::ANCHORS/pairs/{..}.tar' --dataset-resampled
      --train-data-upsampling-factors 1::1 --arf-classnames FILE. Samples with a `cls` get class prompts, the others
      keep their own `txt`. A factor weighs each shard of its part, not the part as a whole. Only pairs can be mixed:
      caption anchors have no images of their own.
""",
}


def wants_arf(argv: Sequence[str]) -> bool:
    """Whether a trainer's command line concerns the plugin: an ``--arf-*`` flag, or a request for help."""
    return any(arg.startswith("--arf") or arg in ("-h", "--help") for arg in argv)


@contextlib.contextmanager
def parsing_errors() -> Iterator[None]:
    """Turns what an argparse parser prints before it exits into an error."""
    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output):
            yield
    except SystemExit:
        raise FlagError(output.getvalue().strip().rpartition("error: ")[2]) from None


class Parser(argparse.ArgumentParser):
    """A parser whose errors say what was probably meant."""

    def error(self, message: str) -> NoReturn:
        """Ends the process, as argparse does."""
        words = message.partition("unrecognized arguments: ")[2].split()
        flags = [word.partition("=")[0] for word in words if word.startswith("--")]
        meant = "".join(did_you_mean(flag, self._option_string_actions) for flag in flags)
        if not flags and any(Path(word).exists() for word in words):
            meant = " Was that a glob, or braces? Put it in quotes, or the shell makes several words of it."
            message = " ".join(message.split()[:5]) + (
                f" ... ({len(words)} in all)" if len(words) > 3 else ""
            )
        if choice := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message):
            meant = did_you_mean(choice[1], re.findall(r"[\w.-]+", choice[2]))
        super().error(f"{message}.{meant}" if meant else message)


def number_type(
    kind: Callable[[str], Number], allows: Callable[[Number], bool], expected: str
) -> Callable[[str], Number]:
    """Makes a type for argparse, which the flags of the trainer and of the commands share.

    Args:
        kind: `int` or `float`.
        allows: whether a number is in the range.
        expected: the range in words, for the error: "'x' is not EXPECTED".
    """

    def parse(text: str) -> Number:
        with contextlib.suppress(ValueError):
            if allows(value := kind(text)):
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")

    return parse


def check_service(flag: str, url: str | None, timeout: float, patience: float, example: str) -> None:
    """Checks the flags ``FLAG-url``, ``FLAG-timeout`` and ``FLAG-patience`` of a service.

    Raises:
        FlagError: no address such as the example, or a wait that is impossible.
    """
    try:
        parts = urlsplit(url or example)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError
    except ValueError:
        raise FlagError(f"{flag}-url {url}: expected an address such as {example}.") from None
    if not 0 < timeout < threading.TIMEOUT_MAX:
        raise FlagError(f"{flag}-timeout {timeout:g}: expected seconds, more than 0.")
    if not patience >= 0:
        raise FlagError(f"{flag}-patience {patience:g}: expected seconds, 0 or more.")


def _number(metavar: str, kind: Any, allows: Callable[[Any], bool], expected: str) -> dict[str, Any]:
    return {"metavar": metavar, "type": number_type(kind, allows, expected)}


# What a flag takes, as `add_argument` is told.
_weight = _number("W", float, lambda value: 0 <= value < float("inf"), "a finite number >= 0")
_part = _number("PART", float, lambda value: 0 < value <= 1, "a part, above 0 and up to 1 (0.1 is a tenth)")
_count = _number("N", int, lambda value: value >= 0, "a whole number >= 0")
_steps = _number("N", int, lambda value: value >= 1, "a whole number of steps >= 1")
_batch = _number(
    "A", int, lambda value: value >= 1, "a whole number >= 1 (to drop pairs: --arf-pair-weight 0)"
)
_switch, _file = {"action": "store_true"}, {"metavar": "FILE"}


def _flag(group: str, default: Any, takes: dict[str, Any], text: str, needs_anchors: bool = False) -> Any:
    """A field of `ArfConfig`, and the flag that sets it; some mean nothing without an anchor set."""
    metadata = {"group": group, "needs_anchors": needs_anchors, "options": {**takes, "help": text}}
    return dataclasses.field(default=default, metadata=metadata)


_arf, _resume = functools.partial(_flag, ANCHORS), functools.partial(_flag, RESUME)
_anchors = functools.partial(_flag, ANCHORS, needs_anchors=True)
_teacher = functools.partial(_flag, TEACHER)
_watch, _baseline = functools.partial(_flag, WATCH), functools.partial(_flag, BASELINES)


@dataclasses.dataclass(frozen=True)
class ArfConfig:
    """What the user asked for, with defaults filled in; the help of each flag says what its field is."""

    anchors: str | None = _arf(None, {"metavar": "PATH"}, "Anchor set (folder or fsspec URL); turns ARF on.")
    preset: str | None = _anchors(
        None,
        {"choices": tuple(PRESETS)},
        "Values for the flags of anchors that are not given, printed at the start: 'paper', ARF as published; or "
        "'recommended', ours: pairs by their features, a quarter as many as task images (default: paper).",
    )
    caption_weight: float = _anchors(
        None,
        _weight,
        "Weight of the caption-anchor loss; 0 switches the term and its data off (default: 1, or 10 where "
        "captions are held by features).",
    )
    pair_weight: float = _anchors(
        None,
        _weight,
        "Weight of the pair-anchor loss; 0 switches the term and its data off (default: 1, or 10 where pairs "
        "are held by features).",
    )
    caption_loss: str = _anchors(
        "contrastive",
        {"choices": ("contrastive", "feature")},
        "What holds captions: the contrastive loss with their images, as in the paper; or 'feature', the features that "
        "the starting model gives them, kept in the anchor set (default: contrastive).",
    )
    pair_loss: str = _anchors(
        "contrastive",
        {"choices": ("contrastive", "feature", "difference")},
        "What holds pairs: the contrastive loss; 'feature', the starting model's features of image and text, kept in "
        "the anchor set; 'difference', that all features move alike (DiVE, Suzuki et al. 2025) (default: contrastive).",
    )
    pair_batch_size: int | None = _anchors(
        None, _batch, "Anchor pairs per process and micro-batch (default: --batch-size)."
    )
    every: int = _anchors(
        1,
        _steps,
        "Anchors on every N-th optimizer step only, counted over the whole run, with N times the weight: the same "
        "gradient on average. The steps between load no pairs and cost what FLYP costs (default: 1).",
    )
    workers: int | None = _anchors(
        None, _count, "How many of the --workers load pair anchors (default: a share by images loaded)."
    )
    missing_caption: str = _anchors(
        "error",
        {"choices": ("error", "prompt")},
        "A task sample without a caption: stop, or use its class prompt (default: error).",
    )
    random_weights: bool = _arf(
        False,
        _switch,
        "Train with anchors or a teacher although weights of the model come from no file. Without it that is an error: "
        "a forgotten or misspelt --pretrained trains a model that there is nothing to keep of.",
    )
    classnames: str | None = _arf(
        None,
        _file,
        "Class names, one per line, or 'imagenet': builds class prompts from each sample's `cls`.",
    )
    templates: str | None = _arf(
        None,
        _file,
        "Prompt templates, one per line with {c} for the class name, or 'imagenet' (OpenAI's list, the default with "
        "--arf-classnames). One random template per sample.",
    )
    trim_text: str = _arf(
        "auto",
        {"choices": ("auto", "off")},
        "Cut each batch's texts to the longest one. 'auto' does so for towers where features and gradients stay the "
        "same, which are CLIP's own: causal, pooled at the end of the text (default: auto with anchors or class "
        "prompts).",
    )
    freeze_bn: bool = _arf(
        False,
        _switch,
        "Keep BatchNorm layers on their pretrained statistics, which makes ARF exact for towers with them.",
    )
    teacher: str | None = _teacher(
        None,
        {"choices": ("start", "average")},
        "The teacher: the starting model, or the average of the weights of all steps so far, as TRACER weighs them "
        "(Asadollahzadeh et al. 2026); adds mean(|f - f_T|^2 + |g - g_T|^2) over task images and their texts.",
    )
    teacher_weight: float = _teacher(
        10.0, _weight, "Weight of the term; 0 with an average keeps the average and no term (default: 10)."
    )
    teacher_every: int = _teacher(
        1,
        _steps,
        "The term on every N-th optimizer step only, counted over the whole run, with N times the weight. The steps "
        "between do not run the teacher (default: 1).",
    )
    save_average: bool = _teacher(
        False,
        _switch,
        "Save the averaged weights as average_E.pt beside each epoch_E.pt: a checkpoint for --pretrained, `arf "
        "evaluate` and `arf interpolate`. On by itself in runs that are deterministic or save step checkpoints, since "
        "a run that goes on from epoch_E.pt needs it.",
    )
    deterministic: bool = _resume(
        False,
        _switch,
        "Two runs with the same flags and --seed end bitwise identical: seeded order and augmentation of all data for"
        " any number of workers, deterministic kernels. The number of processes, workers and threads counts.",
    )
    checkpoint_every: int = _resume(
        0,
        _steps,
        "Save a step checkpoint every N optimizer steps, epoch_E_step_S.pt beside open_clip's own; --resume latest "
        "goes on in the middle of the epoch. The newest is kept. With --arf-deterministic the resumed run ends "
        "bitwise identical to an undisturbed one; without it the rest of the epoch sees data in a fresh order.",
    )
    stop_file: str | None = _resume(
        None,
        _file,
        "Once FILE is there: finish the step, save a step checkpoint, remove FILE and end with status 0. For jobs "
        "that are told to make room: trap 'touch FILE' USR1. The first process looks after every step.",
    )
    watch: tuple[str, ...] = _watch(
        (),
        {"metavar": "FOLDER", "nargs": "+"},
        "Small held-out sets, as `arf evaluate --data` reads them: zero-shot accuracy before the first step and after"
        " every epoch. Needs no other ARF flag, and changes no bit of the training.",
    )
    watch_drop: float = _watch(
        0.1, _part, "Warn when more than this part of the starting accuracy is lost (default: 0.1)."
    )
    watch_drift: bool = _watch(
        False,
        _switch,
        "Also measure how far the features of the watched images and classes have moved from where training started: "
        "mean cosine similarity and linear CKA (Kornblith et al. 2019).",
    )
    l2sp: float = _baseline(
        0.0,
        _weight,
        "L2-SP (Li et al. 2018): adds W/2 times the squared distance of all trained parameters from where the run "
        "started; biases, norms and the logit scale count. Goes with every loss, ARF's too (default: 0, off).",
    )
    head: str | None = _baseline(
        None,
        {"metavar": "CHECKPOINT"},
        "LP-FT (Kumar et al. 2022): trains with cross-entropy on each sample's `cls` from the weights and the linear "
        "head of CHECKPOINT, made by `arf probe`. The text tower is frozen. Needs the probe's --arf-classnames.",
    )

    def __post_init__(self) -> None:
        for kind in ("caption", "pair"):  # a weight that was not given depends on the loss
            if getattr(self, f"{kind}_weight") is None:
                loss = getattr(self, f"{kind}_loss")
                object.__setattr__(self, f"{kind}_weight", 1.0 if loss == "contrastive" else FEATURE_WEIGHT)

    @property
    def caption_features(self) -> bool:
        """Whether captions are held by their features."""
        return bool(self.anchors and self.caption_weight) and self.caption_loss != "contrastive"

    @property
    def pair_features(self) -> bool:
        """Whether pairs are held by their features."""
        return bool(self.anchors and self.pair_weight) and self.pair_loss != "contrastive"

    @property
    def by_feature(self) -> bool:
        """Whether any anchors are held by their features."""
        return self.caption_features or self.pair_features

    @property
    def saves_steps(self) -> bool:
        """Whether step checkpoints may be saved."""
        return bool(self.checkpoint_every or self.stop_file)

    @property
    def resumable(self) -> bool:
        """Whether the run asks for more than open_clip's order of data and checkpoints."""
        return self.deterministic or self.saves_steps


def spelling(field: str) -> str:
    """The flag of a field.

    >>> spelling("pair_batch_size")
    '--arf-pair-batch-size'
    """
    return f"--arf-{field.replace('_', '-')}"


def add_arf_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the ARF groups to a parser. Defaults are None, so that a flag which was given can be told apart."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter  # keeps the lines of the examples
    parser.epilog = EPILOG
    groups = {title: parser.add_argument_group(title, text) for title, text in GROUPS.items()}
    for field in dataclasses.fields(ArfConfig):
        groups[field.metadata["group"]].add_argument(
            spelling(field.name), default=None, **field.metadata["options"]
        )
