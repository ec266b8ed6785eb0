"""``arf fit``: one command from images to a fine-tuned model, and to what it has kept."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from arf_plugin.cli import options

if TYPE_CHECKING:
    from arf_plugin.fitting.run import Fit

EXAMPLES = """\
  arf fit my-images --model ViT-B-16-quickgelu@openai --pool 'cc3m/{0000..0331}.tar' \\
      --captioner Salesforce/blip-image-captioning-base
  arf fit my-images --model local-dir:clip --dry-run         what would be done, with which settings and why
  arf fit images.csv --model my.pt --arch ViT-B-32 --keep held-out --baseline --seeds 3
  arf fit --config fit/config.yaml --out again               the same once more
  arf fit my-images --model ViT-B-32@openai --time 30m --set lr=5e-6 --max-forget 2

Stopped (Ctrl-C) or killed, the same command goes on where it was.
Exit status: 0 good, 1 the input is wrong or a stage failed, 2 usage, 3 forgot more than --max-forget, 130 interrupted.
"""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the parser of ``arf fit``."""
    parser = options.add_parser(
        subparsers,
        "fit",
        "from a folder of images to a fine-tuned model, with proof",
        "Makes task data, builds anchors, checks, trains, chooses on validation data how far to go, evaluates and\n"
        "reports. Settings follow from model and data, and are printed with their reasons.",
        EXAMPLES,
    )
    add = parser.add_argument
    images = "any form that arf data reads: class folders, CSV, parquet, tars ..."
    add("images", nargs="?", metavar="IMAGES", help=images)
    for flag, metavar, text in (
        ("--config", "FILE", "YAML with the same names; flags win"),
        ("--out", "DIR", "folder of all that is made (default: fit)"),
        ("--model", "M", "NAME@PRETRAINED, local-dir:FOLDER, hf-hub:NAME, or a checkpoint with --arch"),
        ("--arch", "NAME", "open_clip's name of the architecture of a checkpoint"),
        ("--pool", "DATA", "image-text data for pair anchors: tars, or any form of arf data --pool; none"),
        ("--captioner", "NAME", "captioner for caption anchors; none (default)"),
        ("--captioner-url", "URL", "server of chat completions (vLLM, SGLang, ...) that has the captioner"),
        ("--captioner-prompt", "TEXT", "what the captioner is asked"),
        ("--classnames", "FILE", "class names, one per line"),
        ("--templates", "FILE", "prompts, {c} for the name, one per line (default: OpenAI's seven)"),
        ("--time", "TIME", "as many epochs as fit into it, such as 30m"),
        ("--device", "D", "auto (default), cpu, cuda"),
    ):
        add(flag, metavar=metavar, help=text)
    val = "part of each class for validation (default: 0.15, if there are no validation images), or a source of them"
    add("--val", type=options.part_or_source, metavar="PART|IMAGES", help=val)
    add("--keep", nargs="+", metavar="FOLDER", help="evaluation sets whose accuracy is to be kept")
    add("--preset", choices=("recommended", "paper", "fast"), help="which loss terms (default: recommended)")
    flyp = "fine-tune with class prompts alone, too (FLYP)"
    add("--baseline", action="store_true", default=None, help=flyp)
    add("--seeds", type=int, metavar="N", help="runs of each (default: 1)")
    add(
        "--jobs",
        type=options.positive,
        metavar="N",
        help="runs that train side by side, and share the cores (1)",
    )
    add("--max-forget", type=float, metavar="POINTS", help="end with status 3 if more is lost")
    add("--set", action="append", metavar="FLAG=VALUE", help="any flag of the trainer; may be repeated")
    add("--dry-run", action="store_true", help="print the plan and stop")
    add("--json", action="store_true", help="print results as JSON")
    add("--quiet", action="store_true", help="print the result alone")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the fit."""
    from arf_plugin.fitting.outcome import table, verdict
    from arf_plugin.fitting.settings import FitSettings, overrides_of
    from arf_plugin.untrusted import printable

    given = {name: getattr(args, name, None) for name in FitSettings.model_fields}
    if given["set"] is not None:
        given["set"] = overrides_of(given["set"])
    fit = prepare(given, args.config, quiet=args.quiet or args.json)
    if args.dry_run:
        options.show(fit.plan(), args.json, "plan")
        return 0
    found = fit.run()
    if args.json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        model = f"The model: local-dir:{fit.out / 'best'} ({fit.out / 'best.pt'})"
        page = f"All of it: {fit.out / 'report' / 'index.html'}"
        print(printable(f"\n{table(found)}\n\n{verdict(found)}\n{model}\n{page}"))
    forgot, settings = found["forgot"], fit.settings
    return 3 if settings.max_forget is not None and forgot is not None and forgot > settings.max_forget else 0


def prepare(given: dict[str, Any], config: str | None, quiet: bool) -> Fit:
    """A fit with settings as they are given, which win over those of a file; its lines go to standard error.

    Raises:
        ArfError: A setting, or a flag of the trainer among them, that there is not or that cannot be.
    """
    from arf_plugin.errors import FitError
    from arf_plugin.fitting.run import Fit
    from arf_plugin.fitting.settings import FitSettings
    from arf_plugin.hooks.activation import check_args
    from arf_plugin.untrusted import printable
    from arf_plugin.validation import validated

    given = (_config(config) if config else {}) | {
        name: value for name, value in given.items() if value is not None
    }
    if "images" not in given or "model" not in given:
        raise FitError("Name the images and the model: arf fit IMAGES --model ViT-B-16-quickgelu@openai")
    settings = validated(FitSettings, given, config or "The settings", FitError)

    def say(line: str) -> None:  # in one piece, as runs side by side have lines, too
        if not quiet:
            print(f"{printable(line)}\n", end="", file=sys.stderr, flush=True)

    fit = Fit(settings, say)
    if own := settings.overrides():
        arm = next(iter(fit.arms.values()))
        check_args(["--train-data", "task.tar", "--arf-classnames", "imagenet", *fit.start, *arm, *own])
    return fit


def _config(path: str) -> dict[str, Any]:
    """Reads a file of settings: YAML of plain values.

    Raises:
        FitError: It cannot be read.
    """
    from pathlib import Path

    import yaml

    from arf_plugin.errors import FitError
    from arf_plugin.plain_yaml import read

    scalar = yaml.SafeLoader("").construct_document
    found, _ = read(Path(path), path, "settings of a fit", FitError, lambda node, _: scalar(node))
    found = {} if found is None else found
    if not isinstance(found, dict):
        raise FitError(f"{path} is no mapping. Expected lines such as model: ViT-B-16-quickgelu@openai")
    return found
