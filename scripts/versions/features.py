"""The columns of the tables of releases and features: one entry each. A new one is run by the next matrix.py."""

from __future__ import annotations

from typing import NamedTuple

ANCHORED = ("Contrastive_loss", "Caption_anchor_loss", "Pair_anchor_loss")
TAUGHT = ("Contrastive_loss", "Teacher_loss")


class Feature(NamedTuple):
    """A way to run the trainer.

    Attributes:
        id: Name in the JSON file and on the command line.
        title: Column header.
        group: The table that it stands in.
        flags: Flags of open_clip's that make the feature; words in braces stand for files (see cells.py).
        arf: Flags of ours beside them, which the stock run leaves out.
        nproc: Processes.
        terms: Loss terms that the log has to show, finite and not zero throughout.
        kind: The function of cells.py that runs it.
    """

    id: str
    title: str
    group: str
    flags: tuple[str, ...] = ()
    arf: tuple[str, ...] = ("--arf-anchors", "{anchors}")
    nproc: int = 1
    terms: tuple[str, ...] = ANCHORED
    kind: str = "forked"


PROMPTS = ("--arf-classnames", "{classnames}", "--arf-templates", "{templates}")
DISTILL = ("--pretrained", "{weights}", "--distill-model", "tiny-vit", "--distill-pretrained", "{weights}")
BASICS, LOSS, PROCESSES = "Command line and data", "Loss", "Processes"
MODEL, PRECISION, CHEAPER, BASELINES = "Model", "Precision and compilation", "Cheaper steps", "Baselines"
RESUMABLE, WATCH = "Stop, resume, repeat", "Watch"
REMEMBERED = "Anchors by their features, and a teacher"
DETERMINISTIC = ("--arf-anchors", "{anchors}", "--arf-deterministic")

FEATURED = ("--arf-anchors", "{featured}", "--arf-pair-loss")
AVERAGED = ("--arf-teacher", "average", "--arf-save-average")

FEATURES = (
    Feature(
        "command-line",
        "`torchrun … --arf-anchors`",
        BASICS,
        kind="literal",
        arf=(*PROMPTS, "--arf-anchors", "{anchors}"),
    ),
    Feature("no-flags", "no `--arf-*` flag: bit-equal to no plugin", BASICS, kind="identity", arf=()),
    Feature("workers", "`--workers 2`", BASICS, ("--workers", "2"), kind="literal"),
    Feature("csv", "CSV", BASICS, ("--train-data", "{csv}"), ("--arf-anchors", "{csv_anchors}")),
    Feature("validation", "`--val-data`", BASICS, ("--val-data", "{task}", "--val-num-samples", "32")),
    Feature("resume", "`--resume latest`", BASICS, kind="resumed"),
    Feature("three-forwards", "equals three forwards, fp64", LOSS, kind="equivalence"),
    Feature("accum-freq", "`--accum-freq 2`", LOSS, ("--accum-freq", "2")),
    Feature("siglip", "`--siglip`", LOSS, ("--siglip",)),
    *(
        Feature(
            f"siglip-{way}", f"`--loss-dist-impl {way}`", LOSS, ("--siglip", "--loss-dist-impl", way), nproc=2
        )
        for way in ("bidir", "shift", "reduce", "gather")
    ),
    Feature("two-processes", "DDP, 2 processes", PROCESSES, nproc=2),
    Feature("local-loss", "`--local-loss`", PROCESSES, ("--local-loss",), nproc=2),
    Feature("gather-with-grad", "`--gather-with-grad`", PROCESSES, ("--gather-with-grad",), nproc=2),
    Feature("local-gather", "both", PROCESSES, ("--local-loss", "--gather-with-grad"), nproc=2),
    Feature("static-graph", "`--ddp-static-graph`", PROCESSES, ("--ddp-static-graph",), nproc=2),
    Feature("fsdp", "`--fsdp`", PROCESSES, ("--fsdp",), nproc=2),
    Feature("grad-checkpointing", "`--grad-checkpointing`", MODEL, ("--grad-checkpointing",)),
    Feature("lock-image", "`--lock-image`", MODEL, ("--lock-image",)),
    Feature("lock-text", "`--lock-text`", MODEL, ("--lock-text",)),
    Feature(
        "lock-text-norms",
        "`--lock-text --lock-text-freeze-layer-norm`",
        MODEL,
        ("--lock-text", "--lock-text-freeze-layer-norm"),
    ),
    Feature("distill", "`--distill-model`", MODEL, DISTILL, terms=(*ANCHORED, "Distill_loss")),
    *(
        Feature(f"precision-{name}", f"`{name}`", PRECISION, ("--precision", name))
        for name in ("fp32", "amp", "amp_bf16", "pure_bf16")
    ),
    Feature("torchcompile", "`--torchcompile`", PRECISION, ("--torchcompile",)),
    Feature(
        "torchcompile-step",
        "`--torchcompile-strategy step`",
        PRECISION,
        ("--torchcompile", "--torchcompile-strategy", "step", "--precision", "fp32"),
    ),
    *(
        Feature(
            name,
            f"`--arf-{name} {value}`",
            CHEAPER,
            arf=("--arf-anchors", "{anchors}", f"--arf-{name}", value),
        )
        for name, value in (("trim-text", "off"), ("every", "2"))
    ),
    *(
        Feature(name, title, REMEMBERED, ("--pretrained", "{weights}"), arf, terms=terms, kind=kind)
        for name, title, arf, terms, kind in (
            ("pair-feature", "`--arf-pair-loss feature`", (*FEATURED, "feature"), ANCHORED, "forked"),
            ("difference", "`--arf-pair-loss difference`", (*FEATURED, "difference"), ANCHORED, "forked"),
            (
                "caption-feature",
                "`--arf-caption-loss feature` too",
                (*FEATURED, "feature", "--arf-caption-loss", "feature"),
                ANCHORED,
                "forked",
            ),
            (
                "teacher-start",
                "`--arf-teacher start`",
                (*PROMPTS, "--arf-teacher", "start"),
                TAUGHT,
                "forked",
            ),
            ("teacher-average", "`--arf-teacher average`", (*PROMPTS, *AVERAGED), TAUGHT, "forked"),
            (
                "remembered-killed",
                "`difference` and `average`, killed, `--resume latest`",
                (*FEATURED, "difference", *AVERAGED, "--arf-deterministic"),
                (*ANCHORED, "Teacher_loss"),
                "killed",
            ),
        )
    ),
    Feature("flyp", "FLYP", BASELINES, arf=PROMPTS, terms=("Contrastive_loss",)),
    Feature(
        "l2sp",
        "`--arf-l2sp`",
        BASELINES,
        ("--precision", "fp32"),
        arf=("--arf-anchors", "{anchors}", "--arf-l2sp", "0.1"),
        terms=(*ANCHORED, "L2sp_loss"),
    ),
    Feature(
        "head",
        "`--arf-head`",
        BASELINES,
        arf=("--arf-head", "{probe}", "--arf-classnames", "{classnames}"),
        terms=("Cross_entropy_loss",),
    ),
    *(
        Feature(name, title, RESUMABLE, ("--workers", "2"), DETERMINISTIC, kind=name)
        for name, title in (
            ("deterministic", "`--arf-deterministic`"),
            ("killed", "`--arf-checkpoint-every 1`, killed, `--resume latest`"),
            ("stopped", "`--arf-stop-file`, `--resume latest`"),
        )
    ),
    *(
        Feature(name, title, WATCH, arf=("--arf-anchors", "{anchors}", *flags), kind="watched")
        for name, title, flags in (
            ("watch", "`--arf-watch`", ("--arf-watch", "{held_out}")),
            ("watch-drift", "`--arf-watch-drift`", ("--arf-watch", "{held_out}", "--arf-watch-drift")),
        )
    ),
)
