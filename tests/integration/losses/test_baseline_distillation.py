"""open_clip's own distillation beside class prompts and beside anchors, through the real trainer."""

from __future__ import annotations

from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from support import data, releases
from support.evaluation import save_config
from support.trainer import logged

from arf_plugin.errors import FlagError

ROOT = Path(__file__).parents[3]
PROMPTS = [f"a photo of a {data.CLASSNAMES[number % 4]}." for number in range(16)]


@pytest.fixture
def model(tmp_path, model_configs) -> str:
    """A tiny model as a folder, as open_clip takes it."""
    open_clip.add_model_config(model_configs)
    torch.manual_seed(3)
    folder = tmp_path / "model"
    name = save_config(folder)
    weights = open_clip.create_model("tiny-vit").state_dict()
    save_file(
        {name: value.contiguous() for name, value in weights.items()}, folder / "open_clip_model.safetensors"
    )
    torch.save(weights, folder / "weights.pt")
    return name


@pytest.fixture
def task(tmp_path) -> Path:
    """A CSV whose own texts are the class prompts of its only template."""
    (tmp_path / "classnames.txt").write_text("\n".join(data.CLASSNAMES))
    (tmp_path / "templates.txt").write_text("a photo of a {c}.")
    return data.write_csv_task(tmp_path / "task", 16, PROMPTS)


@pytest.fixture
def prompts(tmp_path):
    return ["--arf-classnames", tmp_path / "classnames.txt", "--arf-templates", tmp_path / "templates.txt"]


def own_teacher(task, model: str) -> list:
    """Flags of a run whose teacher is the model that it starts from."""
    return ["--train-data", task, "--model", model, "--distill-model", model, "--distill-pretrained", "local"]


@releases.FOLDERS_OF_MODELS
def test_class_prompts_are_distilled_as_open_clip_distils_them(train, model, task, prompts):
    """The starting model as its own teacher: bit-equal to stock open_clip on the same texts, if they stay whole."""
    flags, whole = own_teacher(task, model), [*prompts, "--arf-trim-text", "off"]
    stock, ours = train.forked(*flags, name="stock"), train.forked(*flags, *whole, name="ours")
    assert "FLYP" in ours.output and "ARF" not in stock.output
    assert logged(ours, "Distill_loss") == logged(stock, "Distill_loss") and logged(ours, "Distill_loss")
    for name, weight in stock.checkpoint["state_dict"].items():
        assert torch.equal(weight, ours.checkpoint["state_dict"][name]), name
    without = train.forked("--train-data", task, "--model", model, *prompts, name="without")
    assert not torch.equal(
        without.checkpoint["state_dict"]["visual.proj"], ours.checkpoint["state_dict"]["visual.proj"]
    )


def test_the_oldest_tested_release_distils_from_a_file(train, model, task, prompts):
    weights = Path(model.removeprefix("local-dir:")) / "weights.pt"
    run = train.forked(
        *("--train-data", task, "--pretrained", weights, *prompts),
        *("--distill-model", "tiny-vit", "--distill-pretrained", weights),
        open_clip=releases.folder("2.32.0"),
    )
    assert len(logged(run, "Distill_loss")) == 2 and all(value > 0 for value in logged(run, "Distill_loss"))


@releases.FOLDERS_OF_MODELS
def test_every_term_of_arf_is_distilled(train, tmp_path, model, task, prompts):
    """Captions that equal the prompts cost what the prompts cost: the contrastive and the distillation loss."""
    data.write_csv_captions(tmp_path / "anchors", task, PROMPTS)
    data.write_pairs(tmp_path / "anchors", shards=2, per_shard=8)
    flags = own_teacher(task, model)
    run = train.forked(*flags, *prompts, "--arf-anchors", tmp_path / "anchors")
    terms = zip(logged(run, "Contrastive_loss"), logged(run, "Distill_loss"), strict=True)
    task_loss = [contrastive + distilled for contrastive, distilled in terms]
    assert len(task_loss) == 2 and task_loss == pytest.approx(logged(run, "Caption_anchor_loss"), rel=1e-4)
    assert len(logged(run, "Pair_anchor_loss")) == 2
    assert min(logged(run, "Pair_anchor_loss")) > 1.5 * min(logged(run, "Contrastive_loss"))


def test_a_teacher_with_batch_norm_is_left_alone(train, task, prompts):
    """The student's statistics are frozen and said so once; the teacher is in evaluation mode anyway."""
    run = train.forked(
        *("--train-data", task, *prompts, "--arf-freeze-bn", "--model", "tiny-resnet"),
        *("--distill-model", "tiny-resnet", "--distill-pretrained", ""),
    )
    assert run.output.count("BatchNorm layers keep their pretrained statistics") == 1
    assert logged(run, "Distill_loss")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--distill-model", "m"], "--distill-model and --distill-pretrained belong together"),
        (["--distill-pretrained", "p"], "--distill-model and --distill-pretrained belong together"),
        (["--distill-model", "m", "--distill-pretrained", "p", "--accum-freq", 2], "with --accum-freq 2"),
        (["--distill-model", "m", "--distill-pretrained", "p", "--siglip"], "with --siglip"),
    ],
)
def test_what_open_clip_cannot_distil_is_refused(parse, flags, message):
    with pytest.raises(FlagError, match=message):
        parse("--train-data", "x.tar", "--arf-classnames", "n", *flags)
