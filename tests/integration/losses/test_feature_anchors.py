"""Anchors held by their features, through the real trainer."""

from __future__ import annotations

import shutil

import open_clip
import pytest
import torch
from support import data
from support.trainer import logged

from arf_plugin.errors import FlagError

MODEL = {"model": "tiny-vit"}


@pytest.fixture(scope="module")
def featured(tmp_path_factory, task, model_configs):
    """A set with features, and the weights that they are of."""
    folder = tmp_path_factory.mktemp("featured")
    data.write_captions(folder / "anchors", {identity: f"a caption of {identity}" for identity in task.ids})
    data.write_pairs(folder / "anchors", shards=4, per_shard=6)
    open_clip.add_model_config(model_configs)
    model = data.start_of("tiny-vit", folder / "start.pt")
    data.write_features(folder / "anchors", model, "tiny-vit")
    return folder / "anchors", folder / "start.pt"


def flags(task, featured, *more):
    anchors, start = featured
    both = ("--arf-pair-loss", "feature", "--arf-caption-loss", "feature")
    common = [*task.flags, "--pretrained", start]
    return [*common, "--arf-anchors", anchors, *both, *more]


def test_both_terms_begin_at_0_and_grow(train, task, featured):
    """Pairs are not augmented, so the starting model's features are their own; weights are said at the start."""
    run = train.forked(*flags(task, featured, "--aug-cfg", "scale=(0.3,0.5)"), **MODEL)
    assert (
        "8 caption anchors (feature loss, weight 10) + 8 pair anchors (feature loss, weight 10)" in run.output
    )
    for term in ("Pair_anchor_loss", "Caption_anchor_loss"):
        first, *later = logged(run, term)
        assert first < 1e-4 < max(later), (term, first, later)


@pytest.mark.parametrize("precision", ["amp_bf16", "bf16"])
def test_mixed_precision_two_processes_and_any_number_of_pairs(train, task, featured, precision):
    more = (
        *("--precision", precision, "--arf-pair-batch-size", 3, "--arf-pair-loss", "difference"),
        *("--accum-freq", 2),
    )
    run = train.forked(*flags(task, featured, *more), nproc=2, batch_size=4, **MODEL)
    first, *later = logged(run, "Pair_anchor_loss")
    assert first < 0.01 < max(later) and "With --local-loss --gather-with-grad" in run.output


def test_a_csv_with_steps_between(train, tmp_path, featured):
    csv = data.write_csv_task(tmp_path / "csv", 32)
    anchors = tmp_path / "anchors"
    shutil.copytree(featured[0] / "pairs", anchors / "pairs")
    data.write_csv_captions(anchors, csv)
    model = open_clip.create_model("tiny-vit", pretrained=str(featured[1])).eval()
    data.write_features(anchors, model, "tiny-vit")
    run = train.forked(
        *("--train-data", csv, "--pretrained", featured[1], "--arf-anchors", anchors, "--arf-every", 2),
        *("--arf-pair-loss", "difference", "--arf-caption-loss", "feature"),
        **MODEL,
    )
    for term in ("Pair_anchor_loss", "Caption_anchor_loss"):
        first, second, third, fourth = logged(run, term)
        assert first < 1e-4 < third and second == fourth == 0


def test_a_distillation_teacher_has_no_part_in_them(train, task, featured):
    """open_clip's teacher distils the task's term; anchors keep to their features."""
    teacher = ("--distill-model", "tiny-vit", "--distill-pretrained", featured[1])
    run = train.forked(*flags(task, featured, *teacher), **MODEL)
    assert logged(run, "Pair_anchor_loss")[0] < 1e-4 and len(logged(run, "Distill_loss")) == 4


def test_features_of_other_weights_end_the_run(train, task, featured, tmp_path, model_configs):
    weights = torch.load(featured[1], weights_only=True)
    weights["visual.proj"] += 1e-6
    torch.save(weights, tmp_path / "other.pt")
    run = train.forked(
        *flags(task, featured, "--pretrained", tmp_path / "other.pt"),
        nproc=2,
        batch_size=4,
        check=False,
        **MODEL,
    )
    assert run.status != 0 and "are those of other weights than training starts from" in run.output
    assert "Train Epoch" not in run.output


def test_another_transform_ends_the_run(train, task, featured):
    run = train.forked(*flags(task, featured, "--image-mean", 0.1, 0.2, 0.3), check=False, **MODEL)
    assert run.status != 0 and "a cosine of" in run.output and "Train Epoch" not in run.output


def test_a_set_without_features_ends_the_run(train, task, featured, anchors):
    run = train.forked(*flags(task, (anchors, featured[1])), check=False, **MODEL)
    assert run.status != 0 and "has no features of its captions and pairs" in run.output
    assert "arf features" in run.output and "Train Epoch" not in run.output


def test_weights_depend_on_the_loss_and_what_contradicts_is_refused(parse):
    common = ("--train-data", "x.tar", "--arf-anchors", "a")
    found = parse(*common, "--arf-pair-loss", "difference")
    assert (found.caption_weight, found.pair_weight) == (1, 10)
    found = parse(
        *common, "--arf-pair-loss", "feature", "--arf-pair-weight", 3, "--arf-caption-loss", "feature"
    )
    assert (found.caption_weight, found.pair_weight) == (10, 3)
    assert parse(*common, "--arf-pair-weight", 0, "--arf-pair-loss", "feature").by_feature is False
    for given, said in (
        (("--arf-caption-loss", "feature", "--arf-missing-caption", "prompt"), "no features of prompts"),
        (("--arf-pair-loss", "difference", "--horovod"), "--horovod do not go together"),
        (("--arf-pair-loss", "feature", "--resume", "latest"), "Name it with --pretrained"),
    ):
        with pytest.raises(FlagError, match=said):
            parse(*common, *given)
