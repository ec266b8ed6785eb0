"""The trainer's side of what is checked before the first step: the first error stops the run, the rest is logged.

Only headers are read, and scans are cached, so a million samples cost seconds. Remote shards would have to be
downloaded for it and are left to ``arf check``. The rules are those of :mod:`arf_plugin.checks.rules`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from arf_plugin.checks.inputs import Inputs, Run
from arf_plugin.checks.rules import findings
from arf_plugin.config import ArfConfig
from arf_plugin.data.captions import open_captions


def inputs_of_run(
    args: Any, config: ArfConfig, classes: Sequence[str] | None, run: Callable[[Inputs], Run]
) -> Inputs:
    """What a run's flags say of its inputs.

    Args:
        args: The trainer's arguments.
        config: The ARF flags.
        classes: Class names, if class prompts or a head need them.
        run: Finds the shape of the run, which depends on how many shards of pairs there are.
    """

    def caption_ids() -> Any:
        store = open_captions(config.anchors or "")
        assert store is not None, "there are files of captions"
        return store.ids

    inputs = Inputs(
        anchors=config.anchors,
        caption_weight=config.caption_weight,
        pair_weight=config.pair_weight,
        missing_caption=config.missing_caption,
        train_data=args.train_data,
        dataset_type=args.dataset_type,
        csv_img_key=args.csv_img_key,
        csv_caption_key=args.csv_caption_key,
        csv_separator=args.csv_separator,
        classes=classes,
        head=bool(config.head),
        texts_known=True,
        training=True,
        caption_ids=caption_ids,
    )
    inputs.run = run(inputs)
    return inputs


def check_inputs(inputs: Inputs) -> int | None:
    """Checks everything that is known before the first step.

    Returns:
        The number of samples that training can use, if it is known: what ``--train-num-samples`` asks for.

    Raises:
        ArfError: The first error that the rules find.
    """
    logging.info("ARF: looking at the inputs (headers only, cached)")
    for finding in findings(inputs):
        if finding.level == "error":
            raise finding.error(finding.text)
        log = logging.warning if finding.level == "warning" else logging.info
        log(f"ARF: {finding.text}")
    if inputs.csv:
        return len(inputs.frame)
    return None if inputs.remote_task else sum(inputs.usable())
