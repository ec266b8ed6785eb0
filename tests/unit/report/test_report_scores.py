"""The arithmetic of reports: averages, noise, verdicts, and the sentences made of them."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence

import pytest
from support import report as made

from arf_plugin.errors import ArfError, ReportError
from arf_plugin.report.output import as_json, as_page
from arf_plugin.report.report import Options, gather
from arf_plugin.report.scores import Difference, Score, binomial, difference
from arf_plugin.report.tables import markdown


@pytest.fixture
def usual(tmp_path):
    return made.Made(tmp_path / "grid").usual()


def record(found: dict, kind: str, /, **wanted) -> dict:
    [one] = [r for r in found[kind] if all(r[key] == value for key, value in wanted.items())]
    return one


def test_averages_are_means_over_sets_and_seeds(usual):
    found = as_json(gather([usual.write()], Options()))
    flyp = record(found, "results", arm="flyp", alpha=None, name="shift")
    assert flyp["seeds"] == {"0": 24.0, "1": 25.0, "2": 26.0}
    assert (flyp["mean"], flyp["sd"], flyp["n"]) == (25.0, 1.0, 3)
    before = record(found, "results", arm="before", alpha=None, name="shift")
    assert (before["seeds"], before["sd"]) == ({"None": 30.0}, None)
    assert record(found, "results", arm="arf", alpha=0.5, name="ID")["mean"] == pytest.approx(60.0)
    assert record(found, "sets", arm="arf", alpha=None, name="shift/b")["mean"] == 35
    harmonic = record(found, "results", arm="flyp", alpha=None, name="H")["seeds"]["1"]
    assert harmonic == pytest.approx(statistics.harmonic_mean([60, 20]), abs=1e-4)
    assert record(found, "calibration", arm="flyp", alpha=None, name="ID")["mean"] == pytest.approx(6.0)


def test_the_error_of_the_test_images_goes_through_the_averages(usual):
    found = as_json(gather([usual.write()], Options()))
    parts = [math.sqrt(p * (1 - p) / 100) * 100 for p in (0.35, 0.15)]
    expected = math.hypot(*parts) / 2
    assert record(found, "results", arm="flyp", alpha=None, name="shift")["image_error"] == pytest.approx(
        expected, abs=1e-3
    )
    a, b = binomial(60, 400), binomial(20, 200)  # H = 2ab / (a + b)
    slopes = 2 * 20**2 / 80**2, 2 * 60**2 / 80**2
    harmonic = math.hypot(slopes[0] * a, slopes[1] * b)
    assert record(found, "results", arm="flyp", alpha=None, name="H")["image_error"] == pytest.approx(
        harmonic, rel=1e-3
    )


def test_differences_are_paired_by_seed(usual):
    found = as_json(gather([usual.write()], Options()))
    of_arf = {"table": "tuned", "arm": "arf", "against": "flyp"}
    shift = record(found, "differences", **of_arf, name="shift")
    # ARF: (54, 35), (55, 35), (56, 35); FLYP: (34, 14), (35, 15), (36, 16)
    assert shift["seeds"] == {"0": 20.5, "1": 20.0, "2": 19.5}
    assert shift["standard_error"] == pytest.approx(0.5 / math.sqrt(3), abs=1e-4)
    low, high = shift["interval95"]
    assert (low, high) == pytest.approx((20 - 4.303 * 0.2887, 20 + 4.303 * 0.2887), abs=1e-3)
    assert (shift["verdict"], found["reference"]) == ("ahead", "before")
    assert record(found, "differences", **of_arf, name="ID")["verdict"] == "level"
    # +0.9, +1, +1.1: clear of zero over the seeds, far below the error of 200 images.
    assert record(found, "differences", **of_arf, name="zero-shot")["verdict"] == "ahead here"
    less_before = record(found, "differences", table="tuned", arm="flyp", name="shift")
    assert less_before["seeds"] == {"0": -6.0, "1": -5.0, "2": -4.0}
    asked = as_json(gather([usual.folder], Options(reference="flyp")))
    assert record(asked, "differences", table="tuned", arm="before", name="shift")["mean"] == 5


@pytest.mark.parametrize(
    ("seeds", "image_error", "verdict"),
    [
        ({0: 5.0, 1: 5.1, 2: 4.9}, 1.0, "ahead"),
        ({0: 5.0, 1: 5.1, 2: 4.9}, 3.0, "ahead here"),
        ({0: -5.0, 1: -5.1, 2: -4.9}, 1.0, "behind"),
        ({0: 5.0, 1: 1.0, 2: 3.0}, 0.1, "level"),  # in every seed, but 3 +- 4.303 * 1.15
        ({0: 0.0, 1: 0.0, 2: 0.0}, 0.0, "level"),
        ({0: 5.0}, 1.0, "ahead here"),  # one seed alone says no more
        ({0: 1.0}, 1.0, "level"),
    ],
)
def test_verdicts(seeds, image_error, verdict):
    assert Difference(seeds, image_error).verdict == verdict


def test_the_interval_is_students():
    # Mean 2, standard error 1 / sqrt(3) or sqrt(5 / 6) / 2; quantiles as any printed table of t has them.
    for seeds, quantile in (((1.0, 2.0, 3.0), 4.3027), ((0.5, 1.5, 2.5, 3.5), 3.1824)):
        one = Difference(dict(enumerate(seeds)), 0.0)
        half = quantile * statistics.stdev(seeds) / math.sqrt(len(seeds))
        assert one.interval == pytest.approx((2.0 - half, 2.0 + half), abs=1e-4)


def test_only_shared_seeds_are_compared():
    one, other = Score({0: 5.0, 1: 6.0}, 3.0), Score({1: 4.0, 2: 9.0}, 4.0)
    assert difference(one, other) == Difference({1: 2.0}, 5.0)
    assert difference(Score({0: 5.0}, 0), Score({1: 5.0}, 0)) is None


def paired_rows(grid: made.Made, gains: Sequence[int], **more: object) -> None:
    """Seeds of FLYP and ARF on 400 images, of which ARF has some more right."""
    for seed, gain in enumerate(gains):
        for arm, right in (("flyp", 200), ("arf", 200 + gain)):
            fields = {**made.bits([n < right for n in range(400)], "id"), **(more if arm == "arf" else {})}
            grid.rows.append(made.row(f"runs/{arm}-{seed}/weights.pt", "id", 0.0, **fields))


def test_pairing_by_image_sees_more_than_noise(tmp_path):
    """A difference of 3.7 standard errors over three seeds: within Student's interval, and sure image by image."""
    grid = made.Made(tmp_path)
    paired_rows(grid, (10, 19, 28))
    report = gather([grid.write()], Options())
    [found] = [r for r in as_json(report)["differences"] if (r["arm"], r["name"]) == ("arf", "ID")]
    assert found["mean"] / found["standard_error"] < 4.303  # what three seeds' interval takes
    assert found["verdict"] == found["paired"]["verdict"] == "ahead"
    assert found["interval95"] == pytest.approx(found["paired"]["interval95"])
    assert found["paired"]["corrected"] < 0.05 and found["paired"]["seeds"] == 3
    assert not any("paired" in note for note in report.notes)
    page = as_page(report)
    assert "paired by seed and image" in page and "95 % interval over images and 3 seeds +" in page
    for row in grid.rows:  # as an earlier version would have written them
        del row["right"]
    report = gather([grid.write()], Options())
    [found] = [r for r in as_json(report)["differences"] if (r["arm"], r["name"]) == ("arf", "ID")]
    assert (found["verdict"], found["paired"]) == ("level", None)
    [note] = [note for note in report.notes if "paired" in note]
    assert note.startswith(
        "Differences on ID, seen are not all paired by image: a record does not say which images"
    )
    assert "paired by seed and image" not in as_page(report)


def test_other_images_are_not_paired(tmp_path):
    grid = made.Made(tmp_path)
    paired_rows(grid, (20, 20), data="a copy with other images")
    report = gather([grid.write()], Options())
    assert all(found["paired"] is None for found in as_json(report)["differences"])
    assert any("on different images (digests a copy with  and images of id)" in note for note in report.notes)


def test_bits_of_another_record_are_refused(tmp_path):
    grid = made.Made(tmp_path)
    paired_rows(grid, (20, 20))
    grid.rows[-1]["right"] = grid.rows[0]["right"]
    with pytest.raises(
        ArfError, match=r"runs/arf-1/weights.pt on 'id': 'right' has 200 right images of 400, but top1"
    ):
        gather([grid.write()], Options())


def test_controls_are_compared_with_the_subject(tmp_path):
    grid = made.Made(tmp_path, {"flyp": "baseline", "arf": "arf", "arf-random": "control"})
    for seed in (0, 1, 2):
        grid.measure("flyp", seed, id=50 + seed)
        grid.measure("arf", seed, id=90 + seed)
        grid.measure("arf-random", seed, id=70 + seed)
    found = as_json(gather([grid.write()], Options(suite=[str(tmp_path / "made-up.yaml")])))
    assert record(found, "differences", arm="arf", against="arf-random", name="ID")["mean"] == 20
    asked = as_json(gather([tmp_path], Options(compare=[("arf-random", "arf")])))
    assert record(asked, "differences", arm="arf-random", against="arf", name="ID")["mean"] == -20
    with pytest.raises(ReportError, match="no arm 'nobody'"):
        gather([tmp_path], Options(compare=[("arf", "nobody")]))


def test_validation_chooses_alpha(usual):
    wise = {"flyp": {"chosen": 0.75}, "arf": {"chosen": 0.25}}
    folder = usual.write()
    (folder / "choices.json").write_text(json.dumps({"arms": {}, "wise": wise}))
    report = gather([folder], Options())
    assert [one.key for one in report.slices] == ["tuned", "wise", "chosen"]
    by_alpha = as_json(report)["results"]
    expected = next(
        r["mean"] for r in by_alpha if (r["arm"], r["alpha"], r["name"]) == ("flyp", 0.75, "shift")
    )
    assert report.slices[2].scores["flyp"]["shift"].mean == pytest.approx(expected, abs=1e-3)
    assert report.slices[2].alphas == {"flyp": 0.75, "arf": 0.25}


def test_alpha_is_chosen_on_validation_rows_where_no_grid_has_done_it(usual):
    """The rows of the test sets play no part in it: they would choose another one."""
    for arm, best in (("flyp", 0.25), ("arf", 0.75)):
        for alpha in (0.25, 0.5, 0.75):
            top1 = 90.0 if alpha == best else 10.0
            usual.rows.append(made.row(f"runs/{arm}-0/weights.pt", "id", top1, alpha, split="validation"))
    assert gather([usual.write()], Options()).slices[2].alphas == {"flyp": 0.25, "arf": 0.75}


def test_one_table_where_both_alphas_are_the_same(usual):
    folder = usual.write()
    (folder / "choices.json").write_text(
        json.dumps({"wise": {"flyp": {"chosen": 0.5}, "arf": {"chosen": 0.5}}})
    )
    slices = gather([folder], Options()).slices
    assert [one.key for one in slices] == ["tuned", "wise"]
    assert slices[1].title == "WiSE-FT at α = 0.5, which validation chose for every arm"


def test_markdown(usual):
    report = gather([usual.write()], Options())
    text = markdown(report.found, report.slices, report.results.unit)
    assert text.splitlines()[:5] == [
        "| top-1 %, as fine-tuned | ID | shift | zero-shot | seen | held out | H |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| BEFORE | 50.0 | 30.0 | **30.0** | 50.0 | **30.0** | **37.5** |",
        "| FLYP | **60.0 ± 1.0** | 25.0 ± 1.0 | 20.0 ± 0.0 | **60.0 ± 1.0** | 20.0 ± 0.0 | 30.0 ± 0.1 |",
        "| ARF | **60.0 ± 1.0** | **45.0 ± 0.5** | 21.0 ± 0.1 | **60.0 ± 1.0** | 21.0 ± 0.1 | 31.1 ± 0.0 |",
    ]


def test_markdown_of_a_hostile_label(tmp_path):
    grid = made.Made(tmp_path, {"arf": "arf"}, reference=None)
    content = json.loads((tmp_path / "grid.json").read_text())
    content["arms"][0]["label"] = "a | b <script> *c*\nd"
    (tmp_path / "grid.json").write_text(json.dumps(content))
    grid.measure("arf", 0, id=50)
    report = gather([grid.write()], Options())
    line = markdown(report.found, report.slices, "%").splitlines()[2]
    assert line == r"| a \| b \<script\> \*c\* d | **50.0** | **50.0** |"


def test_unfinished_measurements_are_left_out_and_said(tmp_path):
    grid = made.Made(tmp_path)
    for seed in (0, 1, 2):
        grid.measure("flyp", seed, id=60, shift_a=30, shift_b=20)
    grid.measure("arf", 0, id=60, shift_a=30, shift_b=20)
    grid.measure("arf", 1, id=60, shift_a=30)  # shift/b has not been measured
    report = gather([grid.write()], Options())
    scores = report.slices[0].scores["arf"]
    assert set(scores["ID"].seeds) == {0, 1} and set(scores["shift"].seeds) == {0}
    assert "ARF: seed 1, 2 has not been measured on every average." in report.notes


def test_truncated_copies_are_said(tmp_path):
    grid = made.Made(tmp_path)
    grid.rows.append(made.row("runs/flyp-0/weights.pt", "id", 50.0, images=90, expected_images=1000))
    assert "id has 90 images where a whole copy has 1,000." in gather([grid.write()], Options()).notes


def test_without_a_suite_every_set_is_a_column(tmp_path):
    path = tmp_path / "results.jsonl"
    rows = [
        made.row(f"logs/arf-{seed}/weights.pt", name, 50 + seed, suite=None)
        for seed in (0, 1)
        for name in ("b", "a")
    ]
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    report = gather([path], Options())
    assert list(report.results.averages.known) == ["a", "b"]
    assert report.slices[0].scores["arf"]["a"].mean == 50.5
