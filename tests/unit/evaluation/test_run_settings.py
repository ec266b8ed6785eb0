"""What is known of the run behind a checkpoint: found beside it, in it, or given; damaged or contradicting."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

import pytest

from arf_plugin.errors import EvaluationError
from arf_plugin.evaluation.run_settings import Settings, find_run, note, of_pretrained, read_params, resolve

PARAMS = """\
aug_cfg: {'scale': '(1.0,1.0)'}
batch_size: 4
force_context_length: 12
force_image_size: 48
force_quick_gelu: True
image_interpolation: bilinear
image_mean: [0.1, 0.2, 0.3]
image_resize_mode: None
image_std: [0.9, 0.9, 0.8]
model: ViT-B-16
name: image_mean: of my data
pretrained: None
"""
EXPECTED = Settings(
    image_mean=(0.1, 0.2, 0.3),
    image_std=(0.9, 0.9, 0.8),
    image_interpolation="bilinear",
    force_image_size=(48,),
    force_quick_gelu=True,
    force_context_length=12,
)


def run(folder: Path, text: str = PARAMS) -> Path:
    """A run's folder; returns its checkpoint."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "params.txt").write_text(text)
    (folder / "checkpoints" / "epoch_1.pt").touch()
    return folder / "checkpoints" / "epoch_1.pt"


def test_found_beside_the_checkpoint_and_through_links(tmp_path):
    path = run(tmp_path / "run")
    (tmp_path / "link.pt").symlink_to(path)
    (tmp_path / "run" / "copied.pt").touch()
    for place in (path, tmp_path / "link.pt", tmp_path / "run" / "copied.pt"):
        found = find_run(place)
        assert found is not None and found.settings == EXPECTED
        assert (found.model, found.pretrained) == ("ViT-B-16", None)
    (tmp_path / "run" / "other" / "deep").mkdir(parents=True)
    assert find_run(tmp_path / "run" / "other" / "deep" / "a.pt") is None  # not the trainer's layout


def test_what_counts_first(tmp_path):
    path = run(tmp_path / "run")
    flags = Settings(image_mean=(0.0, 0.0, 0.0), force_quick_gelu=False)
    way, known = resolve(path, None, "ViT-B-16", flags)
    assert known is not None
    assert way.image_mean == (0.0, 0.0, 0.0) and way.image_std == EXPECTED.image_std
    assert "force_quick_gelu" not in way.arguments() and "quick" not in (way.flags() or "")
    told = json.dumps({"image_std": [0.5, 0.5, 0.5]})
    way, known = resolve(path, told, "ViT-B-16", flags)  # the file itself counts more than its folder
    assert way.given() == {"image_mean": (0.0, 0.0, 0.0), "image_std": (0.5, 0.5, 0.5)}
    assert resolve(tmp_path / "alone.pt", None, "ViT-B-16", Settings()) == (Settings(), None)
    assert Settings().flags() is None


def test_equal_settings_are_equal_texts():
    assert EXPECTED.flags() == (
        "--image-mean 0.1 0.2 0.3 --image-std 0.9 0.9 0.8 --image-interpolation bilinear --force-image-size 48 "
        "--force-quick-gelu --force-context-length 12"
    )
    assert EXPECTED.arguments()["force_image_size"] == 48
    one = find_run(Path("a.pt"), '{"force_image_size": [48, 48], "image_mean": 1}')
    two = find_run(Path("a.pt"), '{"force_image_size": 48, "image_mean": [1.0, 1, 1]}')
    assert one is not None and two is not None and one.settings.flags() == two.settings.flags()


def test_weights_with_a_preparation_of_their_own():
    """SigLIP's images are prepared otherwise, and a checkpoint of a run from them by its model's name would not be."""
    found = of_pretrained("ViT-B-16-SigLIP", "webli")
    assert found.image_mean == (0.5, 0.5, 0.5) and found.image_resize_mode == "squash"
    assert of_pretrained("ViT-B-32", "laion2b_s34b_b79k") == Settings()  # as the model has it
    assert (
        of_pretrained("ViT-B-16-SigLIP", "no-such-tag") == of_pretrained("local-dir:x", "webli") == Settings()
    )


def test_a_run_from_weights_by_name(tmp_path):
    text = PARAMS.replace("model: ViT-B-16", "model: ViT-B-16-SigLIP").replace(
        "pretrained: None", "pretrained: webli"
    )
    way, known = resolve(run(tmp_path, text), None, "ViT-B-16-SigLIP", Settings())
    assert way.image_mean == (0.1, 0.2, 0.3) and way.image_resize_mode == "squash"
    again, _ = resolve(tmp_path / "mixed.pt", note(known, Settings()), "ViT-B-16-SigLIP", Settings())
    assert again == way  # also where the mixture lies elsewhere


def test_another_model_is_said(tmp_path):
    path = run(tmp_path / "run")
    with pytest.warns(UserWarning, match=r"epoch_1\.pt was trained as --model ViT-B-16 \(.*params\.txt\)"):
        resolve(path, None, "ViT-B-32", Settings())
    moved = run(
        tmp_path / "moved", PARAMS.replace("model: ViT-B-16", f"model: local-dir:{tmp_path}/old/clip")
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resolve(path, None, "ViT-B-16", Settings())
        resolve(moved, None, "local-dir:clip", Settings())


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("image_mean: [0.1, 0.2]", "image_mean is '[0.1, 0.2]', expected three numbers"),
        ("image_mean: [nan, 0, 0]", "expected three numbers"),
        ("image_mean: [1e999, 0, 0]", "expected three numbers"),
        ("image_std: [0.0, 1.0, 1.0]", "expected three numbers above 0"),
        ("image_mean: __import__('os').system('touch pwned')", "expected three numbers"),
        (f"image_mean: {'(' * 900}", "expected three numbers"),
        (f"image_mean: {'9' * 5000}", "expected three numbers"),
        ("image_interpolation: cubic", "expected one of bicubic, bilinear, random"),
        ("force_image_size: 1e9", "expected one or two whole numbers"),
        ("force_image_size: 999999999", "expected one or two whole numbers"),
        ("force_image_size: [1, 2, 3]", "expected one or two whole numbers"),
        ("force_quick_gelu: 1", "expected True or False"),
        ("force_context_length: -3", "expected a whole number"),
        ("model: other", "two values of model"),
    ],
)
def test_a_damaged_value_is_refused_unless_a_flag_replaces_it(tmp_path, monkeypatch, line, said):
    monkeypatch.chdir(tmp_path)
    name = line.partition(":")[0]
    kept = [each for each in PARAMS.splitlines() if name == "model" or not each.startswith(f"{name}:")]
    path = run(tmp_path / "run", "\n".join([*kept, line]))
    with pytest.raises(EvaluationError) as error:
        find_run(path)
    assert said in str(error.value) and "params.txt" in str(error.value)
    assert len(str(error.value)) < 500 and "\n" not in str(error.value)
    assert not (tmp_path / "pwned").exists()
    if name.startswith("image_mean"):
        find_run(path, but=Settings(image_mean=(0.0, 0.0, 0.0)))


def test_what_is_not_the_trainers(tmp_path):
    for number, text in enumerate(("", "hello\n", "x: 1\n" * 300_000, "\x00\xff" * 50)):
        path = run(tmp_path / str(number), text)
        with pytest.warns(UserWarning, match=r"params\.txt is not the trainer's"):
            assert find_run(path) is None
    path = run(tmp_path / "fifo")
    (tmp_path / "fifo" / "params.txt").unlink()
    os.mkfifo(tmp_path / "fifo" / "params.txt")
    with pytest.raises(EvaluationError, match="a pipe"):
        find_run(path)
    (tmp_path / "folder" / "params.txt").mkdir(parents=True)
    with pytest.raises(EvaluationError, match="a folder"):
        read_params(tmp_path / "folder" / "params.txt")


@pytest.mark.parametrize(
    "told", ["", "[]", "[" * 5000, '{"image_mean": "x"}', '{"force_image_size": 1e999}', 3, b"{}"]
)
def test_damaged_words_in_a_checkpoint(tmp_path, told):
    with pytest.raises(EvaluationError, match=r"a\.pt"):
        find_run(tmp_path / "a.pt", told)
