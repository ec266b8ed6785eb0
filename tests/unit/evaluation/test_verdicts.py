"""Verdicts: statistics against scipy and values of textbooks, coverage of intervals, and what is not compared."""

from __future__ import annotations

import re

import numpy as np
import pytest

from arf_plugin.errors import EvaluationError
from arf_plugin.evaluation.records import packed
from arf_plugin.evaluation.suites import Average
from arf_plugin.evaluation.verdicts import MEAN, as_cell, compare, find_arm, holm, joined, mcnemar, single


def record(right, name: str = "id", **fields) -> dict:
    right = np.asarray(right, dtype=bool)
    return {
        "format": 1, "set": name, "checkpoint": "runs/arf-0/weights.pt", "digest": "d", "alpha": None,
        "headline": "top1", "images": len(right), "metrics": {"top1": 100 * right.mean()}, "data": f"images of {name}",
        "right": packed(right), **fields,
    }  # fmt: skip


def arm(*runs: dict) -> dict:
    """Records by seed and set, of answers by set."""
    return {seed: {name: record(right, name) for name, right in run.items()} for seed, run in enumerate(runs)}


def answers(generator, images: int, *, seeds: int = 1, by_seed: float = 0.0, ahead: float = 0.0) -> tuple:
    """Two arms' answers by seed: images are as hard for both; arms have strengths of their own, and runs, too."""
    hard = generator.normal(size=images)
    found = []
    for gain in (ahead, 0.0):
        of_arm = hard + gain + 0.3 * generator.normal(size=images)
        of_runs = by_seed * generator.normal(size=(seeds, 1)) + 0.3 * generator.normal(size=(seeds, images))
        found.append(list(of_arm + of_runs > 0))
    return tuple(found)


def only(one, other, **named):
    found = compare(one, other, single(["id"]), **named)
    assert found.unpaired == {}
    return found.verdicts["id"]


def test_mcnemar_is_scipys_exact_test():
    from scipy import stats

    # 9 images that one arm alone has right, 1 that the other one has: p = 2 (1 + 10) / 2^10, as tables have it.
    one = np.array([True] * 9 + [False] + [True] * 20 + [False] * 7)
    other = np.array([False] * 9 + [True] + [True] * 20 + [False] * 7)
    assert mcnemar(one, other) == pytest.approx(22 / 1024, rel=1e-12)
    generator = np.random.default_rng(0)
    for images in (1, 2, 7, 100, 5000):
        one, other = (generator.random(images) < share for share in (0.5, 0.4))
        more, less = int((one & ~other).sum()), int((other & ~one).sum())
        expected = stats.binomtest(more, more + less).pvalue if more + less else 1.0
        assert mcnemar(one, other) == pytest.approx(expected, rel=1e-9)


def test_holm():
    """The example of Holm's procedure on Wikipedia and in R's documentation of p.adjust."""
    found = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert found == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


def test_one_seed_is_judged_by_the_exact_test():
    [one], [other] = answers(np.random.default_rng(1), 400, ahead=0.3)
    found = only(arm({"id": one}), arm({"id": other}))
    assert found.p == mcnemar(one, other)
    # The interval is that of the bootstrap: the usual standard error of a paired difference.
    less = one.astype(float) - other
    error = 100 * less.std() / 20
    assert (found.low, found.high) == pytest.approx(
        (100 * less.mean() - 1.966 * error, 100 * less.mean() + 1.966 * error), rel=0.08
    )
    assert (found.images, found.differ, found.seeds) == (400, int((one != other).sum()), 1)


def test_several_seeds_join_the_noise_of_images_and_seeds():
    from scipy import stats

    one, other = answers(np.random.default_rng(2), 500, seeds=3, by_seed=0.2, ahead=0.3)
    found = only(arm(*({"id": run} for run in one)), arm(*({"id": run} for run in other)))
    less = 100.0 * (np.stack(one).astype(float) - np.stack(other))
    of_images, of_seeds = less.mean(0).var() / 500, less.mean(1).var(ddof=1) / 3
    freedom = (of_images + of_seeds) ** 2 / (of_images**2 / 499 + of_seeds**2 / 2)
    half = stats.t.ppf(0.975, freedom) * (of_images + of_seeds) ** 0.5
    assert found.difference == pytest.approx(less.mean())
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.08)
    assert found.p == pytest.approx(
        2 * stats.t.sf(abs(less.mean()) / (of_images + of_seeds) ** 0.5, freedom), rel=0.4
    )


def test_exchanged_arms_give_the_opposite():
    generator = np.random.default_rng(3)
    runs = [answers(generator, images, seeds=3, by_seed=0.1, ahead=0.2) for images in (90, 70)]
    one, other = (arm(*({"a": runs[0][k][s], "b": runs[1][k][s]} for s in range(3))) for k in (0, 1))
    there, back = (compare(*arms, single("ab"), mean=True).verdicts for arms in ((one, other), (other, one)))
    assert set(there) == {"a", "b", MEAN}
    for name, verdict in there.items():
        opposite = back[name]
        assert verdict.difference == -opposite.difference and (verdict.one, verdict.other) == (
            opposite.other,
            opposite.one,
        )
        assert (verdict.low, verdict.high) == pytest.approx((-opposite.high, -opposite.low), rel=1e-12)
        assert verdict.p == pytest.approx(opposite.p, rel=1e-12)


@pytest.mark.parametrize("seeds", [1, 3])
def test_identical_arms_are_level(seeds):
    one, _ = answers(np.random.default_rng(4), 50, seeds=seeds)
    found = only(arm(*({"id": run} for run in one)), arm(*({"id": run} for run in one)))
    assert (found.difference, found.low, found.high, found.p, found.word) == (0.0, 0.0, 0.0, 1.0, "level")


@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_a_handful_of_images_proves_nothing(seeds):
    """Five images, all right in one arm and wrong in the other: the exact test gives 1/16, a bootstrap 0."""
    one, other = np.ones(5, dtype=bool), np.zeros(5, dtype=bool)
    found = only(arm(*[{"id": one}] * seeds), arm(*[{"id": other}] * seeds))
    assert (found.p, found.word) == (pytest.approx(1 / 16), "level")


@pytest.mark.process  # takes seconds
@pytest.mark.parametrize(
    ("seeds", "by_seed", "lowest"),
    [(1, 0.0, 0.92), (2, 0.0, 0.92), (3, 0.0, 0.92), (3, 0.3, 0.88), (5, 0.3, 0.90)],
)
def test_intervals_cover_the_truth(seeds, by_seed, lowest, monkeypatch):
    """300 simulated experiments, where arms do and do not depend on the seed; the truth is known by symmetry: 0."""
    monkeypatch.setattr("arf_plugin.evaluation.verdicts.REPLICATES", 300)
    generator = np.random.default_rng(5)
    covered = 0
    for _ in range(300):
        one, other = answers(generator, 120, seeds=seeds, by_seed=by_seed)
        found = only(arm(*({"id": run} for run in one)), arm(*({"id": run} for run in other)))
        covered += found.low <= 0 <= found.high
    assert lowest <= covered / 300 <= 0.99


@pytest.mark.process  # takes seconds
def test_intervals_cover_the_truth_of_several_grids(monkeypatch):
    """Pretrained models differ, and their seeds hardly: twelve runs are four models, and not twelve."""
    monkeypatch.setattr("arf_plugin.evaluation.verdicts.REPLICATES", 300)
    generator = np.random.default_rng(8)
    covered = together = 0
    for _ in range(200):
        grids = []
        for _ in range(4):
            gains = 0.5 * generator.normal(size=2)
            hard = generator.normal(size=200)
            grids.append(
                [
                    arm(*({"id": hard + gain + 0.1 * generator.normal(size=200) > 0} for _ in range(3)))
                    for gain in gains
                ]
            )
        found = only(*joined(*zip(*grids, strict=True)))
        assert found.seeds == 12
        covered += found.low <= 0 <= found.high
        less = only(
            *(
                dict(enumerate(run for grid in side for run in grid.values()))
                for side in zip(*grids, strict=True)
            )
        )
        together += less.low <= 0 <= less.high
    assert 0.9 <= covered / 200 <= 0.99 and together / 200 < 0.85


def test_pairing_finds_what_unpaired_scores_do_not():
    """Three points of 400 images: far within their binomial error, and sure, as the arms differ on few of them."""
    one = np.arange(400) < 200
    other = np.arange(400) < 188
    found = only(arm({"id": one}), arm({"id": other}))
    assert found.word == "ahead" and found.difference == pytest.approx(3.0)
    assert 1.96 * 100 * (2 * 0.25 / 400) ** 0.5 > 6
    assert as_cell(found.as_json()) == "+3.0 ± 1.7 ▲"


def test_averages_and_their_mean():
    generator = np.random.default_rng(6)
    runs = {name: answers(generator, images, seeds=2, ahead=0.4) for name, images in (("a", 300), ("b", 100))}
    one, other = (arm(*({n: run[k][s] for n, run in runs.items()} for s in range(2))) for k in (0, 1))
    averages = {
        "both": Average(kind="shift", of=("a", "b")),
        "b alone": Average(kind="zero-shot", of=("b",)),
        "known": Average(kind="class-split", of=("a",)),
        "new": Average(kind="class-split", of=("b",)),
        "H": Average(kind="class-split", harmonic=("known", "new")),
    }
    found = compare(one, other, averages, mean=True).verdicts
    score = {n: [np.mean([100 * r.mean() for r in run[k]]) for k in (0, 1)] for n, run in runs.items()}
    assert found["both"].one == pytest.approx((score["a"][0] + score["b"][0]) / 2)
    assert found[MEAN].difference == pytest.approx(
        (found["both"].difference + found["b alone"].difference) / 2
    )
    per_seed = [
        [2 / (1 / a.mean() + 1 / b.mean()) for a, b in zip(runs["a"][k], runs["b"][k], strict=True)]
        for k in (0, 1)
    ]
    assert found["H"].one == pytest.approx(100 * np.mean(per_seed[0]))
    assert found["H"].other == pytest.approx(100 * np.mean(per_seed[1]))
    # Sets are independent of each other: the variance of a mean over two is a quarter of their variances' sum.
    halves = {name: (verdict.high - verdict.low) / 2 for name, verdict in found.items()}
    assert halves["both"] == pytest.approx(np.hypot(halves["known"], halves["new"]) / 2, rel=0.35)
    assert (found["both"].images, found[MEAN].images, found["H"].images) == (400, 400, 400)
    main, split = (["both", "b alone"], ["known", "new", "H"])
    for family in (main, split):
        assert {n: found[n].corrected for n in family} == holm({n: found[n].p for n in family})
    assert found[MEAN].corrected == found[MEAN].p


def test_seeds_are_matched():
    [one], [other] = answers(np.random.default_rng(7), 60)
    three, two = arm(*[{"id": one}] * 3), {1: arm({"id": other})[0], 7: arm({"id": other})[0]}
    assert only(three, two).seeds == 1
    before = {None: two[1]}
    assert only(three, before).seeds == only(before, three).seeds == 3
    assert compare(three, {9: two[1]}, single(["id"])).verdicts == {}
    # Of several grids, seed 0 of one is no run of the other; single runs are paired whatever they are called.
    assert only(*joined([three, three], [two, before])).seeds == 4
    assert only(*joined([{0: three[0]}], [{5: two[1]}])).seeds == 1


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"right": None}, "does not say which images were right"),
        ({"data": "other images"}, r"on different images \(digests images of id and other images\)"),
        ({"headline": "mean_per_class"}, "its score is mean_per_class"),
    ],
)
def test_what_cannot_be_paired_is_said(fields, why):
    [one], [other] = answers(np.random.default_rng(8), 60)
    before, after = arm({"id": one, "b": one}), arm({"id": other, "b": other})
    before[0]["id"] |= fields
    found = compare(after, before, single(["id", "b"]), mean=True)
    assert set(found.verdicts) == {"b"} and set(found.unpaired) == {"id"}  # no mean over what is left
    assert re.search(why, found.unpaired["id"])


def test_every_seed_has_seen_the_same_images():
    """Such as of two grids, each of them on its own copy of the data."""
    [one], [other] = answers(np.random.default_rng(9), 60)
    before, after = arm(*[{"id": one}] * 2), arm(*[{"id": other}] * 2)
    for run in (before[1], after[1]):
        run["id"] |= {"data": "another copy"}
    assert "on different images" in compare(after, before, single(["id"])).unpaired["id"]


def test_arms_are_found_by_name_pattern_and_mixture():
    def of(checkpoint: str, alpha=None, **fields) -> dict:
        return record([True, False], checkpoint=checkpoint, digest=checkpoint, alpha=alpha, **fields)

    records = [
        of("runs/before-0/weights.pt"),
        *(of(f"runs/{name}-{seed}/weights.pt") for name in ("arf", "arf-random") for seed in (0, 1)),
        *(of("runs/arf-0/weights.pt", alpha, original_digest="start.pt") for alpha in (0.25, 0.5)),
        of("start.pt"),
    ]
    assert set(find_arm(records, "arf")) == {0, 1}
    assert set(find_arm(records, "arf-random")) == {0, 1}
    assert set(find_arm(records, "runs/arf-1/*")) == {1}
    assert set(find_arm(records, "before")) == set(find_arm(records, "start.pt")) == {None}
    assert find_arm(records, "arf+wise@0.25")[0]["id"]["alpha"] == 0.25
    with pytest.raises(
        EvaluationError, match=r"means both runs/arf-0/weights.pt\+wise@0.25 and .*\+wise@0.5"
    ):
        find_arm(records, "arf+wise")
    with pytest.raises(
        EvaluationError, match=r"means both runs/arf-0.* and runs/arf-random-0.*, which are of one seed"
    ):
        find_arm(records, "runs/arf-*")
    with pytest.raises(EvaluationError, match=r"no records of 'flyp' \(found: runs/before-0/weights.pt, "):
        find_arm(records, "flyp")
