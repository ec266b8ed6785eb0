"""Evaluation agrees with a direct computation; interpolation has exact end points; bad input is named."""

from __future__ import annotations

import io
import json

import open_clip
import pytest
import torch
from support import building

from arf_plugin.errors import EvaluationError
from arf_plugin.evaluation.checkpoints import read_weights
from arf_plugin.evaluation.interpolation import interpolate, interpolate_files
from arf_plugin.evaluation.run import evaluate
from arf_plugin.evaluation.sets import find_sets

NAMES = [f"{colour} thing" for colour in building.COLOURS]


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    """A tiny open_clip model with random weights."""
    folder = tmp_path_factory.mktemp("clip")
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    vision = {"image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    return f"local-dir:{folder}"


def checkpoint(clip: str, path, seed: int, prefix: str = ""):
    torch.manual_seed(seed)
    # Larger than at the start of training, so that the images' features differ and so do the predictions.
    weights = {k: 5 * v if v.ndim > 1 else v for k, v in open_clip.create_model(clip).state_dict().items()}
    torch.save({"epoch": 1, "state_dict": {prefix + k: v for k, v in weights.items()}, "optimizer": {}}, path)
    return path


@pytest.fixture
def images(tmp_path):
    """A set of two tars of drawings with six classes."""
    root = tmp_path / "sets" / "shapes"
    for shard in range(2):
        members = []
        for n in range(9 * shard, 9 * shard + 9):
            members += [(f"{n:03d}.jpg", building.drawing(n)), (f"{n:03d}.cls", str(n % 6).encode())]
        building.write_tar(root / "test" / f"{shard}.tar", members)
    (root / "test" / "nshards.txt").write_text("2\n")
    (root / "classnames.txt").write_text("\n".join(NAMES) + "\n")
    (root / "zeroshot_classification_templates.txt").write_text("a drawing of a {c}.\nthis is a {c}\n")
    return root


def direct(clip: str, path) -> float:
    """Top-1 in percent, by hand."""
    from PIL import Image

    model, _, preprocess = open_clip.create_model_and_transforms(clip)
    model.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    model.eval()
    tokenizer = open_clip.get_tokenizer(clip)
    hits = 0
    with torch.no_grad():
        columns = []
        for name in NAMES:
            texts = model.encode_text(tokenizer([f"a drawing of a {name}.", f"this is a {name}"]))
            mean = torch.nn.functional.normalize(texts, dim=-1).mean(0)
            columns.append(mean / mean.norm())
        for n in range(18):
            image = preprocess(Image.open(io.BytesIO(building.drawing(n))).convert("RGB"))[None]
            hits += int((model.encode_image(image) @ torch.stack(columns, 1)).argmax()) == n % 6
    return 100 * hits / 18


def test_accuracy_of_several_checkpoints_agrees_with_a_direct_computation(clip, images, tmp_path):
    paths = [checkpoint(clip, tmp_path / f"{seed}.pt", seed) for seed in range(4)]
    result = evaluate(paths, clip, [images.parent], batch_size=5)
    expected = {str(path): direct(clip, path) for path in paths}
    assert {name: figures["shapes"] for name, figures in result["accuracy"].items()} == pytest.approx(
        expected
    )
    assert len(set(expected.values())) > 1  # else the comparison would show nothing
    assert result["samples"] == {"shapes": 18}


def test_wise_evaluates_the_mixed_checkpoint(clip, images, tmp_path):
    paths = [checkpoint(clip, tmp_path / f"{seed}.pt", seed) for seed in range(2)]
    interpolate_files(*paths, 0.5, tmp_path / "mixed.pt")
    mixed = evaluate([tmp_path / "mixed.pt"], clip, [images])["accuracy"][str(tmp_path / "mixed.pt")]
    assert evaluate(paths, clip, [images], wise=0.5)["accuracy"][f"{paths[1]}+wise"] == mixed


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_end_points_are_bit_equal(clip, tmp_path, alpha):
    paths = [checkpoint(clip, tmp_path / f"{seed}.pt", seed, prefix="module.") for seed in range(2)]
    interpolate_files(*paths, alpha, tmp_path / "out.pt")
    end = read_weights(paths[int(alpha)])
    mixed = read_weights(tmp_path / "out.pt")
    assert mixed.keys() == end.keys()
    assert all(torch.equal(mixed[name], end[name]) for name in end)


def test_the_middle_is_the_mean_and_counters_are_not_mixed():
    original = {"w": torch.tensor([1.0, 3.0]), "bn.num_batches_tracked": torch.tensor(4)}
    tuned = {"w": torch.tensor([2.0, -1.0]), "bn.num_batches_tracked": torch.tensor(9)}
    mixed = interpolate(original, tuned, 0.5)
    assert mixed["w"].tolist() == [1.5, 1.0]
    assert mixed["bn.num_batches_tracked"].item() == 9


def test_another_architecture_is_named(tmp_path, clip, images):
    with pytest.raises(EvaluationError, match=r"'w' is \[3\] and not \[2\]"):
        interpolate({"w": torch.zeros(2)}, {"w": torch.zeros(3)}, 0.5)
    torch.save({"state_dict": {"visual.other": torch.zeros(1)}}, tmp_path / "other.pt")
    with pytest.raises(EvaluationError, match="checkpoint of another architecture than --model"):
        evaluate([tmp_path / "other.pt"], clip, [images])


def test_alpha_outside_zero_to_one_is_refused():
    with pytest.raises(EvaluationError, match=r"alpha is 1\.5"):
        interpolate({"w": torch.zeros(2)}, {"w": torch.zeros(2)}, 1.5)


class Evil:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return (print, ("executed",))


def test_a_checkpoint_with_code_is_refused(tmp_path, capsys):
    torch.save({"state_dict": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(EvaluationError, match="cannot be read as a checkpoint"):
        read_weights(tmp_path / "evil.pt")
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [{"state_dict": {}}, {"epoch": 3}, [1]])
def test_a_file_without_weights_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "empty.pt")
    with pytest.raises(EvaluationError, match="holds no weights"):
        read_weights(tmp_path / "empty.pt")


def test_a_set_that_is_not_there(tmp_path):
    with pytest.raises(EvaluationError, match="no evaluation set"):
        find_sets(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("classnames.txt", "", "is empty"),
        ("zeroshot_classification_templates.txt", "a photo\n", "has no {c}"),
        ("test/nshards.txt", "many\n", "expected the number of tars"),
    ],
)
def test_a_malformed_set_is_named(images, name, content, message):
    (images / name).write_text(content)
    with pytest.raises(EvaluationError, match=message):
        find_sets(images)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.jpg", building.drawing(0))], "expected an image and a cls"),
        ([("a.jpg", building.drawing(0)), ("a.cls", b"6")], "expected a number from 0 to 5"),
        ([("a.jpg", building.drawing(0)[:200]), ("a.cls", b"1")], "the image cannot be decoded"),
        ([("../a.jpg", building.drawing(0)), ("../a.cls", b"1")], "leaves the folder"),
    ],
)
def test_a_bad_sample_is_named(images, members, message):
    building.write_tar(images / "test" / "1.tar", members)
    [found] = find_sets(images)
    with pytest.raises(EvaluationError, match=message) as error:
        list(found.images())
    assert "1.tar" in str(error.value)


def test_the_command_prints_a_table_and_writes_json(clip, images, tmp_path, run_arf):
    path = checkpoint(clip, tmp_path / "a.pt", 0)
    done = run_arf("evaluate", path, "--model", clip, "--data", images, "--json", tmp_path / "out.json")
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["accuracy"][str(path)]["shapes"] == pytest.approx(direct(clip, path))
    assert "shapes" in done.stdout
    wrong = run_arf("evaluate", tmp_path / "none.pt", "--model", clip, "--data", images, check=False)
    assert wrong.returncode == 1
    assert "There is no checkpoint at" in wrong.stderr


def test_the_interpolate_command(clip, tmp_path, run_arf):
    paths = [checkpoint(clip, tmp_path / f"{seed}.pt", seed) for seed in range(2)]
    run_arf("interpolate", *paths, "--alpha", 0.25, "--out", tmp_path / "out.pt")
    a, b = (read_weights(path)["visual.proj"] for path in paths)
    assert torch.allclose(read_weights(tmp_path / "out.pt")["visual.proj"], 0.75 * a + 0.25 * b)
