"""One optimizer step of the real trainer with anchors, against three separate passes of stock open_clip, in fp64."""

from __future__ import annotations

import pytest
import torch
from support import reference, releases, steps

CASES = steps.FEW_CASES if releases.ONE_RELEASE else steps.CASES
SLOW_CASES = steps.slow_cases()


@pytest.fixture(scope="module")
def runs(tmp_path_factory, model_configs):
    """Every case through the trainer and through the reference: case -> (run, path that the records begin with)."""
    return steps.run(CASES, tmp_path_factory.mktemp("steps"), model_configs)


@pytest.fixture(scope="module")
def slow_runs(tmp_path_factory, model_configs):
    """The same of the other cases."""
    return steps.run(SLOW_CASES, tmp_path_factory.mktemp("slow-steps"), model_configs)


def compare(result) -> None:
    run, record = result
    assert run.status == 0, run.output
    terms = torch.load(f"{record}.reference", weights_only=True)
    assert reference.relative_error(str(record), terms) <= steps.BOUND


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_of_one_step_equal_three_forwards(runs, case):
    compare(runs[case])


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW_CASES, ids=str)
def test_gradients_in_every_distributed_combination(slow_runs, case):
    """Static graph, checkpointing, compilation and FSDP change no gradient: the reference does without them."""
    compare(slow_runs[case])


def test_the_trainer_saw_trimmed_texts(runs):
    """The references above pad every text to the tower's 32 positions."""
    _, record = runs[CASES[0]]
    _, texts = torch.load(f"{record}.0", weights_only=True)["inputs"][0]
    assert texts.shape[1] < 32 and texts.shape[1] % 8 == 0


@pytest.mark.parametrize("missing", range(3), ids=["task", "caption", "pair"])
def test_the_comparison_notices_a_missing_term(runs, missing):
    """The comparison above can fail: without any one of the terms the reference is far off."""
    _, record = runs[CASES[0]]
    terms = torch.load(f"{record}.reference", weights_only=True)
    assert reference.relative_error(str(record), terms[:missing] + terms[missing + 1 :]) > 0.1


@pytest.mark.parametrize("case", [case for case in CASES if case.teacher], ids=str)
def test_the_comparison_notices_a_missing_teacher(runs, case):
    _, record = runs[case]
    terms = torch.load(f"{record}.reference", weights_only=True)
    assert reference.relative_error(str(record), terms[:-1]) > 0.01
