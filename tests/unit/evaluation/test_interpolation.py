"""Interpolation: exact end points, files that torch and safetensors read, little memory, bad input named."""

from __future__ import annotations

import json
import zipfile

import open_clip
import pytest
import safetensors.torch
import torch
from support.memory import peak, save_large

from arf_plugin.errors import EvaluationError
from arf_plugin.evaluation.candidates import Candidate
from arf_plugin.evaluation.checkpoints import open_checkpoint
from arf_plugin.evaluation.merging import Merge, interpolate_files, merge, mix, write_merges


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    """A tiny open_clip model with BatchNorm in its image tower."""
    folder = tmp_path_factory.mktemp("clip")
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    return f"local-dir:{folder}"


@pytest.fixture(scope="module")
def ends(clip, tmp_path_factory):
    """A model before and after a real step of training, saved as open_clip's trainer saves them."""
    folder = tmp_path_factory.mktemp("ends")
    torch.manual_seed(0)
    model = open_clip.create_model(clip)
    torch.save({"epoch": 0, "name": "before", "state_dict": model.state_dict()}, folder / "before.pt")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    images, texts, scale = model(torch.randn(4, 3, 32, 32), torch.randint(1, 49407, (4, 16)))
    torch.nn.functional.cross_entropy(scale * images @ texts.T, torch.arange(4)).backward()
    optimizer.step()
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    content = {"epoch": 1, "name": "after", "state_dict": state, "optimizer": optimizer.state_dict()}
    torch.save(content, folder / "after.pt")
    return folder / "before.pt", folder / "after.pt"


def logits(clip: str, path) -> torch.Tensor:
    """Logits of fixed images and texts, of a checkpoint as open_clip itself loads it."""
    model = open_clip.create_model(clip)
    open_clip.load_checkpoint(model, str(path))
    model.eval()
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(5, 3, 32, 32, generator=generator)
    texts = torch.randint(1, 49407, (7, 16), generator=generator)
    with torch.no_grad():
        found, described, scale = model(images, texts)
    return scale * found @ described.T


@pytest.mark.parametrize(("alpha", "suffix"), [(0.0, ".pt"), (1.0, ".safetensors")])
def test_logits_at_the_end_points_are_those_of_the_end_points(clip, ends, tmp_path, alpha, suffix):
    interpolate_files(*ends, alpha, tmp_path / f"out{suffix}")
    assert torch.equal(logits(clip, tmp_path / f"out{suffix}"), logits(clip, ends[int(alpha)]))
    assert not torch.equal(logits(clip, tmp_path / f"out{suffix}"), logits(clip, ends[1 - int(alpha)]))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_streamed_files_hold_what_mixing_in_memory_gives(ends, tmp_path, suffix):
    targets = {tmp_path / f"{alpha}{suffix}": Merge("wise", (alpha,)) for alpha in (0.0, 0.1, 0.5, 1.0)}
    original, tuned = map(open_checkpoint, ends)
    write_merges(original, [tuned], targets)
    before = torch.load(ends[0], weights_only=True)["state_dict"]
    after = torch.load(ends[1], weights_only=True)["state_dict"]
    after = {name.removeprefix("module."): tensor for name, tensor in after.items()}
    for path, how in targets.items():
        if suffix == ".pt":
            found = torch.load(path, weights_only=True)["state_dict"]
            mapped = torch.load(path, weights_only=True, mmap=True)["state_dict"]
            assert all(torch.equal(found[name], mapped[name]) for name in found)
            assert zipfile.ZipFile(path).testzip() is None
        else:
            found = safetensors.torch.load_file(path)
        expected = merge(how, [after], before)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor), name
    counter = next(name for name in after if name.endswith("num_batches_tracked"))
    assert [int(found[counter]), int(after[counter]), int(before[counter])] == [1, 1, 0]


def test_every_type_and_shape_survives(tmp_path):
    tensors = {
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 3),
        "half": torch.randn(3, 5).half(),
        "bfloat": torch.randn(4).bfloat16(),
        "double": torch.randn(2, 2).double(),
        "transposed": torch.randn(3, 4).T,
        "flags": torch.tensor([True, False, True]),
        "counts": torch.arange(3),
        "bytes": torch.arange(5, dtype=torch.uint8),
    }
    torch.save(tensors, tmp_path / "a.pt")
    for suffix in (".pt", ".safetensors"):
        interpolate_files(tmp_path / "a.pt", tmp_path / "a.pt", 0.3, tmp_path / f"out{suffix}")
        found = open_checkpoint(tmp_path / f"out{suffix}").weights
        for name, tensor in tensors.items():
            assert found[name].dtype == tensor.dtype
            assert found[name].shape == tensor.shape
            torch.testing.assert_close(found[name], tensor)
            if suffix == ".pt" and tensor.numel():
                assert found[name].data_ptr() % 64 == 0


def test_equal_weights_are_equal_bytes(ends, tmp_path):
    for name in ("a.pt", "b.pt"):
        interpolate_files(*ends, 0.5, tmp_path / name)
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()


def test_a_mixture_is_loaded_into_a_model(clip, ends, tmp_path):
    interpolate_files(*ends, 0.4, tmp_path / "out.pt")
    model = open_clip.create_model(clip)
    Candidate(ends[1], ends[0], 0.4).load(model)
    expected = torch.load(tmp_path / "out.pt", weights_only=True)["state_dict"]
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_sums_are_rounded_once():
    start, end = torch.randn(5000), torch.randn(5000)
    expected = torch.tensor([0.7 * a + 0.3 * b for a, b in zip(start.tolist(), end.tolist(), strict=True)])
    assert torch.equal(mix(start, end, 0.3), expected)


def test_learning_rates_of_numpy_are_read_and_other_objects_are_not(ends, tmp_path):
    """open_clip before 2.30 leaves its learning rate in the checkpoint as numpy's float64."""
    import fractions

    import numpy as np

    state = torch.load(ends[0], weights_only=True)
    torch.save({**state, "optimizer": {"lr": np.float64(1e-3)}}, tmp_path / "numpy.pt")
    interpolate_files(tmp_path / "numpy.pt", ends[1], 0.0, tmp_path / "out.pt")
    found = torch.load(tmp_path / "out.pt", weights_only=True)["state_dict"]
    assert all(torch.equal(tensor, state["state_dict"][name]) for name, tensor in found.items())
    torch.save({**state, "optimizer": fractions.Fraction(1, 2)}, tmp_path / "object.pt")
    with pytest.raises(EvaluationError, match=r"object\.pt"):
        interpolate_files(tmp_path / "object.pt", ends[1], 0.0, tmp_path / "out2.pt")


def test_files_of_before_torch_1_6_are_read(ends, tmp_path):
    state = torch.load(ends[0], weights_only=True)
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    interpolate_files(tmp_path / "old.pt", ends[1], 0.0, tmp_path / "out.pt")
    found = torch.load(tmp_path / "out.pt", weights_only=True)["state_dict"]
    assert all(torch.equal(tensor, state["state_dict"][name]) for name, tensor in found.items())


MIXTURES = """
from arf_plugin.evaluation.merging import Merge, write_merges
original, tuned = (open_checkpoint(Path(path)) for path in sys.argv[1:3])
write_merges(original, [tuned], {Path(out): Merge("wise", (float(Path(out).stem),)) for out in sys.argv[3:]})
"""


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_interpolating_a_checkpoint_of_1_gb_takes_1_3_gb_of_its_own_at_most(tmp_path, suffix):
    paths = [tmp_path / f"{name}{suffix}" for name in ("original", "tuned")]
    assert [save_large(path, 50, seed) for seed, path in enumerate(paths)] == [10**9, 10**9]
    libraries, highest = peak(MIXTURES, *paths, tmp_path / f"0.5{suffix}")
    print(f"{suffix}: {highest / 1e9:.2f} GB at the peak, {libraries / 1e9:.2f} GB of it libraries")
    assert highest - libraries < 1.3e9


@pytest.mark.process
def test_memory_is_that_of_one_mixture_however_many_are_written(tmp_path):
    paths = [tmp_path / f"{name}.pt" for name in ("original", "tuned")]
    size, _ = (save_large(path, 15, seed) for seed, path in enumerate(paths))
    libraries, highest = peak(MIXTURES, *paths, tmp_path / "0.25.pt", tmp_path / "0.75.pt")
    mixtures = (highest - libraries) / size
    assert 0.9 < mixtures < 1.3, mixtures  # one; two models and a result would be 3


def test_another_architecture_is_named(tmp_path, ends, clip):
    torch.save({"state_dict": {"visual.other": torch.zeros(1)}}, tmp_path / "other.pt")
    with pytest.raises(
        EvaluationError, match=r"before.pt and .*other.pt are of different architectures"
    ) as error:
        interpolate_files(ends[0], tmp_path / "other.pt", 0.5, tmp_path / "out.pt")
    assert "is missing" in str(error.value)
    with pytest.raises(EvaluationError, match=r"'w' is \[3\] and not \[2\]"):
        merge(Merge("wise", (0.5,)), [{"w": torch.zeros(3)}], {"w": torch.zeros(2)})
    other = tmp_path / "other.pt"
    with pytest.raises(EvaluationError, match=r"--model and .*other.pt are of different architectures"):
        Candidate(other, other, 0.5).load(open_clip.create_model(clip))
    assert not (tmp_path / "out.pt").exists()


@pytest.mark.parametrize("alpha", [-0.1, 1.5, float("nan")])
def test_alpha_outside_zero_to_one_is_refused(ends, tmp_path, alpha):
    with pytest.raises(EvaluationError, match=f"alpha is {alpha}"):
        interpolate_files(*ends, alpha, tmp_path / "out.pt")


class Evil:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return (print, ("executed",))


def test_bad_files_are_named(ends, tmp_path, capsys):
    torch.save({"state_dict": Evil()}, tmp_path / "evil.pt")
    torch.save({"state_dict": {"w": [1, 2]}}, tmp_path / "list.pt")
    torch.save({"epoch": 3}, tmp_path / "none.pt")
    torch.save([torch.zeros(1)], tmp_path / "bare.pt")
    (tmp_path / "damaged.safetensors").write_bytes(b"\x10" * 100)
    (tmp_path / "cut.pt").write_bytes(ends[1].read_bytes()[:5000])
    for name, message in (
        ("missing.pt", "There is no checkpoint at"),
        ("evil.pt", "cannot be read as a checkpoint"),
        ("list.pt", "holds no weights"),
        ("none.pt", "holds no weights"),
        ("bare.pt", "holds no weights"),
        ("damaged.safetensors", "cannot be read as a checkpoint"),
        ("cut.pt", "cannot be read as a checkpoint"),
    ):
        with pytest.raises(EvaluationError, match=message) as error:
            interpolate_files(ends[0], tmp_path / name, 0.5, tmp_path / "out.pt")
        assert name in str(error.value)
    assert "executed" not in capsys.readouterr().out
    assert not list(tmp_path.glob("*out.pt"))


def test_a_full_disk_is_said_before_anything_is_written(ends, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    with pytest.raises(EvaluationError, match=r"1 checkpoint\(s\) needs? .* GB free"):
        interpolate_files(*ends, 0.5, tmp_path / "out.pt")


def test_heads_are_mixed_if_they_are_for_the_same_classes(tmp_path):
    def save(name: str, digest: int | None, value: float):
        head = {} if digest is None else {
            "arf_head.weight": torch.full((3, 2), value),
            "arf_head.bias": torch.full((3,), value),
            "arf_head.classnames": torch.full((32,), digest, dtype=torch.uint8),
        }  # fmt: skip
        torch.save({"state_dict": {"w": torch.zeros(2), **head}}, tmp_path / name)
        return tmp_path / name

    probe, tuned = save("probe.pt", 7, 0.0), save("tuned.pt", 7, 1.0)
    interpolate_files(probe, tuned, 0.25, tmp_path / "out.pt")
    found = torch.load(tmp_path / "out.pt", weights_only=True)["state_dict"]
    assert found["arf_head.bias"].tolist() == [0.25] * 3
    assert found["arf_head.classnames"].tolist() == [7] * 32
    with pytest.raises(EvaluationError, match=r"tuned.pt has a classification head and .*bare.pt has none"):
        interpolate_files(save("bare.pt", None, 0.0), tuned, 0.5, tmp_path / "no.pt")
    with pytest.raises(EvaluationError, match="for different class names"):
        interpolate_files(save("other.pt", 8, 0.0), tuned, 0.5, tmp_path / "no.pt")
