"""Evaluation agrees with a direct computation, however it is shared out; bad checkpoints are named."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import open_clip
import pytest
import torch
from support import building
from support.evaluation import (
    NAMES,
    TEMPLATES,
    save_checkpoint,
    save_config,
    save_model,
    select,
    write_folders,
    write_set,
)
from support.tars import write_tar

from arf_plugin.errors import EvaluationError
from arf_plugin.evaluation import run
from arf_plugin.evaluation.candidates import Candidate
from arf_plugin.evaluation.head import names_digest
from arf_plugin.evaluation.merging import interpolate_files
from arf_plugin.evaluation.records import read_records, right_images
from arf_plugin.evaluation.run import evaluate
from arf_plugin.evaluation.sets import find_sets


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    """A tiny open_clip model without weights."""
    return save_config(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def paths(clip, tmp_path_factory) -> list[Path]:
    """Three checkpoints of it."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return [save_checkpoint(clip, folder / f"{seed}.pt", seed) for seed in range(3)]


@pytest.fixture
def sets(tmp_path):
    """Two sets: 18 drawings in two tars, and twelve in folders with other prompts."""
    write_set(tmp_path / "sets" / "shapes")
    write_folders(tmp_path / "folders")
    return [*find_sets(tmp_path / "sets"), *find_sets(tmp_path / "folders")]


def direct(clip: str, path) -> list[bool]:
    """Which drawings are right, by hand."""
    from PIL import Image

    model, _, preprocess = open_clip.create_model_and_transforms(clip)
    open_clip.load_checkpoint(model, str(path))
    model.eval()
    tokenizer = open_clip.get_tokenizer(clip)
    hits = []
    with torch.no_grad():
        columns = []
        for name in NAMES:
            texts = model.encode_text(tokenizer([template.format(c=name) for template in TEMPLATES]))
            mean = torch.nn.functional.normalize(texts, dim=-1).mean(0)
            columns.append(mean / mean.norm())
        for n in range(18):
            image = preprocess(Image.open(io.BytesIO(building.drawing(n))).convert("RGB"))[None]
            hits.append(int((model.encode_image(image) @ torch.stack(columns, 1)).argmax()) == n % 6)
    return hits


def scores(records) -> list[tuple]:
    """What was measured, without where and when."""
    return [(record["set"], record["alpha"], record["metrics"]) for record in records]


def test_accuracy_of_several_checkpoints_agrees_with_a_direct_computation(clip, paths, sets):
    records = evaluate(paths, clip, sets[:1], batch_size=5, workers=0)
    assert [record["checkpoint"] for record in records] == list(map(str, paths))
    expected = [direct(clip, path) for path in paths]
    assert [right_images(record).tolist() for record in records] == expected
    found = [record["metrics"]["top1"] for record in records]
    assert found == pytest.approx([100 * sum(right) / 18 for right in expected])
    assert len(set(found)) > 1  # else the comparison would show nothing


def test_a_record_holds_what_its_score_depends_on(clip, paths, sets):
    [record] = evaluate(paths[:1], clip, sets[:1], suite="own", workers=0)
    import hashlib

    assert record["digest"] == hashlib.sha256(paths[0].read_bytes()).hexdigest()
    assert {name: record[name] for name in ("suite", "set", "split", "model", "images", "classes", "headline")} == {
        "suite": "own", "set": "shapes", "split": "test", "model": clip, "images": 18, "classes": 6, "headline": "top1",
    }  # fmt: skip
    assert record["prompts"] == sets[0].prompts
    assert (
        record["versions"]["torch"] == torch.__version__.split("+")[0]
        or record["versions"]["torch"] == torch.__version__
    )
    assert set(record["metrics"]) == {"top1", "top5", "mean_per_class", "macro_f1", "ece"}
    assert (record["alpha"], record["original"], record["precision"], record["device"]) == (
        None,
        None,
        "fp32",
        "cpu",
    )


@pytest.mark.process
def test_groups_of_models_and_workers_give_the_same_scores(clip, paths, sets, tmp_path):
    own = save_checkpoint(clip, tmp_path / "own.pt", seed=7)
    clip = save_model(tmp_path / "clip", seed=7)  # the same weights, as the model's own
    asked = [*map(Candidate, paths), Candidate(paths[1], paths[0], 0.3), Candidate(None)]
    together = evaluate(asked, clip, sets, batch_size=7, workers=0)
    apart = evaluate(asked, clip, sets, batch_size=7, workers=2, models_at_once=2)
    assert scores(together[-2:]) == scores(evaluate([own], clip, sets, workers=0, batch_size=7))
    assert scores(together) == scores(apart)
    assert len(together) == 10
    assert len({str(each) for each in scores(together)}) > 6


def test_a_mixture_equals_its_written_checkpoint(clip, paths, sets, tmp_path):
    interpolate_files(*paths[:2], 0.5, tmp_path / "mixed.pt")
    [written] = evaluate([tmp_path / "mixed.pt"], clip, sets[:1], workers=0)
    records = evaluate(
        [Candidate(paths[1], paths[0], alpha) for alpha in (0, 0.5, 1)], clip, sets[:1], workers=0
    )
    assert [record["alpha"] for record in records] == [0, 0.5, 1]
    assert records[1]["metrics"] == written["metrics"]
    ends = evaluate(paths[:2], clip, sets[:1], workers=0)
    assert [records[0]["metrics"], records[2]["metrics"]] == [record["metrics"] for record in ends]
    assert (records[1]["checkpoint"], records[1]["original"]) == (str(paths[1]), str(paths[0]))


def test_finished_records_are_not_measured_again(clip, paths, sets, tmp_path, monkeypatch):
    out = tmp_path / "results.jsonl"
    first = evaluate(paths[:2], clip, sets, out=out, workers=0)
    written = out.read_bytes()
    assert sorted(read_records(out), key=str) == sorted(first, key=str)
    monkeypatch.setattr(run, "build", None)  # with nothing left to do, not even the model is built
    assert evaluate(paths[:2], clip, sets, out=out, workers=0) == first
    assert out.read_bytes() == written


def test_only_what_is_missing_is_measured(clip, paths, sets, tmp_path, monkeypatch):
    out = tmp_path / "results.jsonl"
    evaluate(paths[:1], clip, sets[:1], out=out, workers=0)
    decoded = []
    original = run.batches.decode
    monkeypatch.setattr(
        run.batches,
        "decode",
        lambda sets, *rest: decoded.extend(s.name for s in sets) or original(sets, *rest),
    )
    records = evaluate([*paths[:1], Candidate(paths[1], paths[0], 0.5)], clip, sets, out=out, workers=0)
    assert len(records) == len(read_records(out)) == 4
    assert decoded == ["folders", "shapes"]  # in one go, the first for both candidates
    assert scores(records) == scores(
        evaluate([*paths[:1], Candidate(paths[1], paths[0], 0.5)], clip, sets, workers=0)
    )


def test_what_has_changed_is_measured_again(clip, paths, tmp_path):
    out = tmp_path / "results.jsonl"
    root = write_set(tmp_path / "shapes")
    path = shutil.copy(paths[0], tmp_path / "weights.pt")

    def measured(alpha=0.5, **more) -> int:
        evaluate([Candidate(path, paths[1], alpha)], clip, find_sets(root), out=out, workers=0, **more)
        return len(read_records(out))

    assert measured() == measured() == 1
    assert measured(alpha=0.25) == 2
    assert measured(precision="amp") == 3
    shutil.copy(paths[2], path)
    assert measured() == 4
    (root / "classnames.txt").write_text("\n".join(NAMES[::-1]) + "\n")
    assert measured() == 5
    write_set(root, images=12)
    assert measured() == 6


def test_names_for_records(clip, paths, sets, tmp_path):
    out = tmp_path / "results.jsonl"
    mixture = Candidate(paths[1], paths[0], 0.5, name="runs/arf-0/weights.pt", original_name="before")
    evaluate([Candidate(paths[1], name="runs/arf-0/weights.pt"), mixture], clip, sets[:1], out=out, workers=0)
    assert [
        record["original"] for record in select(read_records(out), checkpoint="runs/arf-0/weights.pt")
    ] == [None, "before"]


def test_a_head_classifies_the_set_it_was_made_for(clip, paths, sets, tmp_path):
    """A head that always answers class 2 has 3 of 18 right; the other set is classified by its prompts."""
    weights = torch.load(paths[0], weights_only=True)
    digest = torch.tensor(list(names_digest(NAMES)), dtype=torch.uint8)
    bias = torch.tensor([0.0, 0, 9, 0, 0, 0])
    head = {"arf_head.weight": torch.zeros(6, 16), "arf_head.bias": bias, "arf_head.classnames": digest}
    torch.save({"state_dict": {**weights["state_dict"], **head}}, tmp_path / "probe.pt")
    records = evaluate([tmp_path / "probe.pt", paths[0]], clip, sets, workers=0)
    assert [record["classifier"] for record in records] == ["head", "zero-shot", "zero-shot", "zero-shot"]
    assert records[0]["metrics"]["top1"] == pytest.approx(100 / 6)
    assert right_images(records[0]).tolist() == [n % 6 == 2 for n in range(18)]
    confidence = torch.softmax(bias, 0).max().item()
    assert records[0]["metrics"]["ece"] == pytest.approx(100 * (confidence - 1 / 6), abs=1e-3)
    assert records[1]["metrics"] == records[3]["metrics"]


def test_an_incomplete_set_is_warned_of_and_recorded(clip, paths, sets):
    from dataclasses import replace

    with pytest.warns(UserWarning, match="has 18 images, a whole copy has 20"):
        [record] = evaluate(paths[:1], clip, [replace(sets[0], expected_images=20)], workers=0)
    assert (record["images"], record["expected_images"]) == (18, 20)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_named(clip, paths, tmp_path, workers):
    root = write_set(tmp_path / "shapes")
    members = [("a.jpg", building.drawing(0)[:200]), ("a.cls", b"1")]
    write_tar(root / "test" / "1.tar", members)
    with pytest.raises(EvaluationError, match=r"1\.tar, sample a: the image cannot be decoded") as error:
        evaluate(paths[:1], clip, find_sets(root), workers=workers)
    assert "Traceback" not in str(error.value)


def test_another_architecture_is_named(clip, paths, sets, tmp_path):
    torch.save({"state_dict": {"visual.other": torch.zeros(1)}}, tmp_path / "other.pt")
    with pytest.raises(EvaluationError, match="checkpoint of another architecture than --model"):
        evaluate([tmp_path / "other.pt"], clip, sets)
    with pytest.raises(EvaluationError, match="different architectures"):
        evaluate([Candidate(tmp_path / "other.pt", paths[0], 0.5)], clip, sets)


def test_a_checkpoint_that_is_not_there(clip, paths, sets, tmp_path):
    with pytest.raises(EvaluationError, match=r"There is no checkpoint at .*none\.pt"):
        evaluate([paths[0], tmp_path / "none.pt"], clip, sets)


def test_a_model_that_open_clip_does_not_know(paths, sets):
    with pytest.raises(EvaluationError, match="open_clip cannot load the model 'ViT-B-61'"):
        evaluate(paths[:1], "ViT-B-61", sets)


class Evil:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return (print, ("executed",))


def test_a_checkpoint_with_code_is_refused(clip, sets, tmp_path, capsys):
    torch.save({"state_dict": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(EvaluationError, match="cannot be read as a checkpoint"):
        evaluate([tmp_path / "evil.pt"], clip, sets)
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [{"state_dict": {}}, {"epoch": 3}, [1]])
def test_a_file_without_weights_is_refused(clip, sets, tmp_path, content):
    torch.save(content, tmp_path / "empty.pt")
    with pytest.raises(EvaluationError, match="holds no weights"):
        evaluate([tmp_path / "empty.pt"], clip, sets)


def test_weights_that_open_clip_would_make_up_or_ignore(clip, paths, sets):
    with pytest.raises(EvaluationError, match="nothing to evaluate: 'ViT-B-32' is an architecture"):
        evaluate([Candidate(None)], "ViT-B-32", sets)
    with pytest.raises(EvaluationError, match="cannot load the model"):  # a folder without weights
        evaluate([Candidate(None)], clip, sets)
    with pytest.raises(EvaluationError, match="has weights of its own"):
        evaluate([Candidate(None)], clip, sets, pretrained=str(paths[0]))


def test_two_sets_of_one_name(clip, paths, sets):
    with pytest.raises(EvaluationError, match="Two sets are called 'shapes'"):
        evaluate(paths[:1], clip, [sets[0], sets[0]])
