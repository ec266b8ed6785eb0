"""Training curves from open_clip's log."""

from __future__ import annotations

from support.report import step

from arf_plugin.report.logs import parse_curves, term_name

# From a run of open_clip 3.3.0, unedited.
REAL = """\
2026-11-22,11:51:55 | INFO |   lr: 0.0005
2026-11-22,11:52:03 | INFO | Start epoch 0
2026-11-22,11:52:04 | INFO | Train Epoch: 0 [ 64/448 (14%)] Data (t): 0.391 Batch (t): 0.894, 71.6251/s, 71.6251/s/gpu \
LR: 0.000050 Logit Scale: 15.933 Contrastive_loss: 3.8566 (3.8566) Caption_anchor_loss: 3.8468 (3.8468) \
Pair_anchor_loss: 4.5822 (4.5822) Loss: 12.286 (12.286)
2026-11-22,11:52:08 | INFO | Train Epoch: 0 [320/448 (71%)] Data (t): 0.091 Batch (t): 0.827, 77.0/s, 77.0/s/gpu \
LR: 0.000250 Logit Scale: 15.921 Contrastive_loss: 3.6012 (3.7289) Caption_anchor_loss: 3.5 (3.6734) \
Pair_anchor_loss: 4.0000 (4.2911) Loss: 11.101 (11.693)
2026-11-22,11:52:08 | INFO | Eval Epoch: 1 [8 / 8]\tClip Loss: 1.234567\t
"""


def test_real_lines():
    curves = parse_curves(REAL.splitlines())
    assert list(curves.terms) == ["contrastive_loss", "caption_anchor_loss", "pair_anchor_loss", "loss"]
    assert curves.terms["pair_anchor_loss"] == [(64 / 448, 4.5822), (320 / 448, 4.0)]
    assert curves.terms["loss"][1] == (320 / 448, 11.101)
    assert not curves.faults


def test_a_resumed_run_counts_its_last_attempt():
    first = (
        step(0, 32, contrastive_loss=3.0)
        + step(0, 64, contrastive_loss=2.0)
        + step(1, 32, contrastive_loss=9.0)
    )
    again = step(1, 32, contrastive_loss=1.5) + step(1, 64, contrastive_loss=1.0)
    curves = parse_curves((first + again).splitlines())
    assert curves.terms["contrastive_loss"] == [(0.5, 3.0), (1.0, 2.0), (1.5, 1.5), (2.0, 1.0)]


def test_a_loss_that_is_no_number_is_noted():
    lines = step(0, 32, contrastive_loss=2.0) + step(0, 64, contrastive_loss=float("nan"))
    curves = parse_curves(lines.splitlines())
    assert curves.terms["contrastive_loss"] == [(0.5, 2.0)]
    assert curves.faults == [1.0]


def test_terms_of_other_losses_have_names():
    curves = parse_curves(step(0, 64, distill_loss=1.0, l2sp_loss=0.25).splitlines())
    assert curves.terms["l2sp_loss"] == [(1.0, 0.25)]
    assert term_name("l2sp_loss") == "l2sp"
    assert term_name("pair_anchor_loss") == "pair anchors: retrieved pairs"


def test_lines_of_other_kinds_are_passed_over():
    assert not parse_curves(["", "Train Epoch: x", "Train Epoch: 1 [1/2 (50%)] nothing more"]).terms
