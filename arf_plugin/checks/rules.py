"""The rules: each looks at one thing and says what it finds. THE list of what is checked before the first step.

Errors stop a run before its first step. A rule that is checked elsewhere, because what it needs is only known there
(the parser, the model, the trainer), is listed here all the same: docs/checks.md is generated from this list.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from arf_plugin.checks import anchor_rules, run_rules, task_rules
from arf_plugin.checks.finding import Finding
from arf_plugin.checks.inputs import Inputs, Unknown
from arf_plugin.errors import ArfError

Check = Callable[[Inputs], Iterator[Finding]]


@dataclass(frozen=True)
class Rule:
    """One row of the matrix.

    Attributes:
        id: its name.
        of: which input it looks at.
        checks: what is expected.
        happens: what happens if it is not so.
        check: says what it finds; None for what is checked where it is known.
        where: where that is.
    """

    id: str
    of: str
    checks: str
    happens: str
    check: Check | None = None
    where: str = "start of a run, `arf check`"


def findings(inputs: Inputs) -> Iterator[Finding]:
    """All that the rules find, in their order."""
    for rule in RULES:
        if rule.check is None:
            continue
        try:
            yield from rule.check(inputs)
        except Unknown:
            continue  # it has been said why
        except ArfError as cause:
            yield Finding("error", str(cause), type(cause))


RULES: tuple[Rule, ...] = (
    Rule(
        "flags",
        "command line",
        "flags that make sense alone, together and with this release of open_clip",
        "error of the parser, with the flags to change",
        where="parser",
    ),
    Rule(
        "class-names",
        "`--arf-classnames`, `--arf-templates`",
        "UTF-8 lines (a byte-order mark is no part of them), none empty; a place for the class name in every "
        "template",
        "error with the line",
        where="start of a run, `arf check --arf-classnames`",
    ),
    Rule(
        "watched-sets",
        "`--arf-watch`",
        "every set can be read: its classes, counts and images",
        "error; images that do not decode are found by the first look, before the first step",
        where="start of a run",
    ),
    Rule(
        "weights",
        "`--model`, `--pretrained`",
        "with anchors, every weight comes from a file (or `--arf-random-weights` says that it need not)",
        "error naming the weights that would be random",
        where="once the model is built",
    ),
    Rule(
        "anchor-set",
        "anchor set",
        "a folder with captions/*.parquet, pairs/*.tar or both, and a weight above 0 for one of them; names are no "
        "patterns, hidden files no shards",
        "error",
        anchor_rules.anchor_set,
    ),
    Rule(
        "whole",
        "anchors.json",
        "a format that is known; each half finished, with the files that its stage has written",
        "error; the same `arf` command finishes the set",
        anchor_rules.whole,
    ),
    Rule(
        "pair-workers",
        "pair tars",
        "a shard for each loader worker of the pairs",
        "error with the number for `--arf-workers`",
        anchor_rules.pair_workers,
    ),
    Rule(
        "task-workers",
        "task tars",
        "a shard for each loader worker of the task data (but for `--dataset-resampled`)",
        "error",
        run_rules.task_workers,
    ),
    Rule(
        "captions",
        "caption files",
        "parquet with columns `id` and `caption` of non-empty UTF-8 text",
        "error with file and row",
        anchor_rules.captions,
    ),
    Rule(
        "task-data",
        "task data",
        "tars or a CSV that can be read to their end, with images; where captions are joined, each id once",
        "error with the place; samples without an image: warning, as open_clip skips them",
        task_rules.task_data,
    ),
    Rule(
        "task-images",
        "task images in tars",
        "end as their format does (`--full`: decode)",
        "warning, as open_clip skips them",
        task_rules.images,
    ),
    Rule(
        "texts",
        "task texts",
        "a `txt`, or with `--arf-classnames` a `cls`, for every sample; a CSV's column without empty cells",
        "error; a warning where open_clip skips the samples (with class prompts: at most 1 % of them) or plain mixing "
        "takes them",
        task_rules.texts,
    ),
    Rule(
        "labels",
        "`cls`",
        "a whole number from 0 to one below the number of class names",
        "error with the sample and the count",
        task_rules.labels,
    ),
    Rule(
        "csv-images",
        "image files of a CSV",
        "are there, are files, end as their format does (`--full`: decode)",
        "error, as open_clip would end with a traceback when it comes to the first",
        task_rules.csv_images,
    ),
    Rule(
        "coverage",
        "captions and task data",
        "a caption for every sample whose image decodes",
        "error with samples' ids; with `--arf-missing-caption prompt` a warning",
        task_rules.coverage,
    ),
    Rule(
        "batches",
        "task data, `--batch-size`, `--accum-freq`, `--workers`",
        "each epoch has a step; in every epoch each loader worker's shards hold a batch",
        "error; `--train-num-samples` is filled in from the tars if it was not given",
        run_rules.batches,
    ),
    Rule(
        "pairs",
        "pair tars",
        "each pair has a whole image (`--full`: that decodes) and a UTF-8 text that is not empty",
        "error with the pair; fewer pairs than a batch, repeated images: warning",
        anchor_rules.pairs,
    ),
    Rule(
        "schedule",
        "`--lr`, `--warmup`",
        "a rate of at most 1e-4 for trained weights, a warm-up shorter than the run",
        "warning with better values",
        run_rules.schedule,
        where="start of a run",
    ),
    Rule(
        "resume",
        "`--resume` with `--arf-deterministic`",
        "a whole checkpoint without code in it; the same flags, class names, templates, task data, captions "
        "and pairs by "
        "the contents of all their files",
        "error that lists what has changed",
        where="start of a run",
    ),
    Rule(
        "first-loss",
        "first step",
        "the loss of the first step is not far above chance",
        "warning: are class names and labels of one order?",
        where="after the first step",
    ),
)
