"""One optimizer step of the real trainer with anchors, against three separate passes of stock open_clip, in fp64."""

from __future__ import annotations

import pytest
import torch
from support import reference, releases, steps

from arf_plugin.hooks.releases import RELEASES

ALL_CASES = [
    steps.Case(siglip, accum_freq, pair_size, nproc, local_loss)
    for siglip in (False, True)
    for accum_freq in (1, 2)
    for pair_size in (steps.TASK_SIZE, 4)
    for nproc, local_loss in ((1, False), (2, False), (2, True))
]
# The releases that are not tested on every change: both losses, with and without accumulation, one and two processes.
EVERY_CHANGE = [release.version for release in RELEASES if release.every_change]
CASES = ALL_CASES if releases.current() in EVERY_CHANGE else steps.FEW_CASES


@pytest.fixture(scope="module")
def runs(tmp_path_factory, model_configs):
    """Every case through the trainer and through the reference."""
    return steps.run(CASES, tmp_path_factory.mktemp("steps"), model_configs)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_of_one_step_equal_three_forwards(runs, case):
    run, record = runs[case]
    assert run.status == 0, run.output
    terms = torch.load(f"{record}.reference", weights_only=True)
    assert reference.relative_error(str(record), terms) <= steps.BOUND


@pytest.mark.parametrize("missing", range(3), ids=["task", "caption", "pair"])
def test_the_comparison_notices_a_missing_term(runs, missing):
    """The comparison above can fail: without any one of the terms the reference is far off."""
    _, record = runs[CASES[0]]
    terms = torch.load(f"{record}.reference", weights_only=True)
    assert reference.relative_error(str(record), terms[:missing] + terms[missing + 1 :]) > 0.1
