"""What holds of merged weights, whatever the weights are."""

from __future__ import annotations

import hypothesis.strategies as st
import torch
from hypothesis import given

from arf_plugin.evaluation.merging import Merge, merge, stock_share

NUMBERS = st.floats(-1e3, 1e3, width=32)
TENSORS = st.lists(NUMBERS, min_size=1, max_size=12).map(torch.tensor)
DTYPES = st.sampled_from([torch.float16, torch.bfloat16, torch.float32])
NAME = "visual.transformer.resblocks.0.mlp.c_fc.weight"


@st.composite
def families(draw, smallest: int = 2) -> list[torch.Tensor]:
    """A start and its runs."""
    dtype, size, count = draw(DTYPES), draw(st.integers(1, 12)), draw(st.integers(1 + smallest, 6))
    numbers = st.lists(NUMBERS, min_size=size, max_size=size)
    return [torch.tensor(draw(numbers)).to(dtype) for _ in range(count)]


@given(TENSORS, DTYPES, st.integers(1, 7))
def test_a_soup_of_equal_runs_is_the_run(tensor, dtype, count):
    run = {NAME: tensor.to(dtype)}
    assert merge(Merge("soup"), [run] * count)[NAME].equal(run[NAME])


@given(families(1), st.integers(2, 5))
def test_model_stock_of_equal_runs_is_the_run(family, count):
    start, run = family[:2]
    found = merge(Merge("stock"), [{NAME: run}] * count, {NAME: start})[NAME]
    torch.testing.assert_close(
        found.double(), run.double(), rtol=1e-6, atol=1e-6 * float(start.abs().max() + 1)
    )


@given(families())
def test_model_stock_lies_between_the_start_and_the_mean(family):
    start, *runs = family
    assert 0.0 <= stock_share(start, runs) <= 1.0 + 1e-12
    found = merge(Merge("stock"), [{NAME: run} for run in runs], {NAME: start})[NAME].double()
    mean = torch.stack(runs).double().mean(0)
    slack = 1e-2 * (1 + torch.maximum(mean.abs(), start.double().abs()))  # of bfloat16
    assert (found >= torch.minimum(start.double(), mean) - slack).all()
    assert (found <= torch.maximum(start.double(), mean) + slack).all()


@given(families())
def test_the_order_of_runs_does_not_count(family):
    start, *runs = family
    for method in ("stock", "soup"):
        one, other = (
            merge(Merge(method), [{NAME: run} for run in order], {NAME: start})[NAME].double()
            for order in (runs, runs[::-1])
        )
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)


@given(families(1))
def test_lines_at_its_ends_is_the_run_and_the_start(family):
    start, run = family[:2]
    ends = [({NAME: run, "visual.proj": run}, {NAME: start, "visual.proj": start})]
    for tuned, original in ends:
        assert merge(Merge("lines", (1.0, 0.0)), [tuned], original)[NAME].equal(run)
        assert merge(Merge("lines", (0.0, 0.0)), [tuned], original)[NAME].equal(start)
