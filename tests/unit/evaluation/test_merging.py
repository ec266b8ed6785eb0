"""Merging runs: each method against its formula in fp64, mergekit's result, layers by name, what is refused."""

from __future__ import annotations

import math
import sys
import warnings
from pathlib import Path

import pytest
import torch
from support.memory import peak, save_large

from arf_plugin.errors import EvaluationError
from arf_plugin.evaluation.candidates import Candidate
from arf_plugin.evaluation.checkpoints import open_checkpoint
from arf_plugin.evaluation.merging import Merge, check_moved, depths, merge, stock_share, write_merges

STOCK, SOUP, LINES = Merge("stock"), Merge("soup"), Merge("lines", (0.0, 1.0))


def family(count: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[dict, list[dict]]:
    """A start and runs whose updates agree in part; names are those of open_clip's ViT."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "positional_embedding": (7, 4),
        "logit_scale": (),
        "visual.conv1.weight": (4, 3, 2, 2),
        **{f"visual.transformer.resblocks.{n}.mlp.c_fc.weight": (8, 4) for n in range(4)},
        "visual.ln_post.bias": (4,),
        "visual.proj": (4, 5),
        **{f"transformer.resblocks.{n}.ln_1.weight": (4,) for n in range(3)},
        "text_projection": (4, 5),
    }

    def noise(shape) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    start = {name: noise(shape) for name, shape in shapes.items()}
    shared = {name: noise(shape) for name, shape in shapes.items()}
    runs = [
        {name: start[name] + 0.1 * shared[name] + 0.1 * noise(shape) for name, shape in shapes.items()}
        for _ in range(count)
    ]
    cast = [{name: tensor.to(dtype) for name, tensor in weights.items()} for weights in (start, *runs)]
    return cast[0], cast[1:]


def stock_by_hand(start: list[float], runs: list[list[float]]) -> list[float]:
    """Model Stock of one tensor, number by number."""
    updates = [[w - w0 for w, w0 in zip(run, start, strict=True)] for run in runs]
    cosines = []
    for i, one in enumerate(updates):
        for other in updates[:i]:
            product = math.fsum(a * b for a, b in zip(one, other, strict=True))
            lengths = [math.sqrt(math.fsum(a * a for a in update)) for update in (one, other)]
            cosines.append(product / (lengths[0] * lengths[1]) if all(lengths) else 0.0)
    cosine, count = sum(cosines) / len(cosines), len(runs)
    share = max(0.0, count * cosine / (1 + (count - 1) * cosine)) if cosine > 0 else 0.0
    means = [math.fsum(values) / count for values in zip(*runs, strict=True)]
    return [share * mean + (1 - share) * w0 for mean, w0 in zip(means, start, strict=True)]


@pytest.mark.parametrize("count", [2, 3, 5])
def test_model_stock_is_its_formula(count):
    start, runs = family(count)
    found = merge(STOCK, runs, start)
    for name, tensor in found.items():
        flat = [weights[name].flatten().tolist() for weights in (start, *runs)]
        if name == "logit_scale":
            expected = [sum(value[0] for value in flat[1:]) / count]
        else:
            expected = stock_by_hand(flat[0], flat[1:])
        assert tensor.shape == start[name].shape
        worst = max(abs(a - b) for a, b in zip(tensor.flatten().tolist(), expected, strict=True))
        assert worst <= 1e-10, name
    shares = [
        stock_share(start[name], [run[name] for run in runs]) for name in start if name != "logit_scale"
    ]
    assert 0.3 < sum(shares) / len(shares) < 0.95  # neither end


@pytest.mark.parametrize("count", [2, 4])
def test_model_stock_is_mergekits(count, monkeypatch):
    folder = Path(__file__).parents[3] / ".venvs" / "mergekit-0.1.5"  # scripts/test.sh puts it there
    if not folder.is_dir():
        pytest.skip("scripts/test.sh puts mergekit beside the environment")
    monkeypatch.syspath_prepend(folder)
    from mergekit.merge_methods import merge_state_dicts

    start, runs = family(count, seed=1)
    models = {"start": start, **{str(n): run for n, run in enumerate(runs)}}
    expected = merge_state_dicts(models, "model_stock", base="start", dtype=torch.float64)
    found = merge(STOCK, runs, start)
    # Of one number mergekit takes the cosine, too, and it does not stop at the start where runs disagree.
    shared = [
        name
        for name in found
        if start[name].numel() > 1 and stock_share(start[name], [r[name] for r in runs])
    ]
    assert len(shared) >= 10
    for name in shared:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-10)
    for name in [name for name in sys.modules if name.partition(".")[0] == "mergekit"]:
        monkeypatch.delitem(sys.modules, name)


def test_large_tensors_are_merged_in_parts():
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(1_500_001, generator=generator)
    runs = [start + 0.1 * torch.randn(1_500_001, generator=generator) + 0.1 for _ in range(3)]
    updates = torch.stack(runs).double() - start.double()
    cosine = torch.stack(
        [torch.cosine_similarity(updates[i], updates[j], dim=0) for i, j in ((0, 1), (0, 2), (1, 2))]
    )
    share = (3 * cosine.mean() / (1 + 2 * cosine.mean())).item()
    assert stock_share(start, runs) == pytest.approx(share, abs=1e-10)
    found = merge(STOCK, [{"w": run} for run in runs], {"w": start})["w"]
    expected = share * torch.stack(runs).double().mean(0) + (1 - share) * start.double()
    assert (found.double() - expected).abs().max() < 3e-7 and found.dtype == torch.float32


def test_what_model_stock_leaves_open():
    start = {
        "still": torch.ones(3),
        "one_moves": torch.zeros(2),
        "opposite": torch.ones(2),
        "logit_scale": torch.tensor(1.0),
        "bn.running_mean": torch.zeros(2),
        "bn.num_batches_tracked": torch.tensor(0),
        "empty": torch.zeros(0, 3),
    }
    runs = []
    for sign, count in ((1.0, 4), (-1.0, 9)):
        runs.append(
            {
                "still": torch.ones(3),
                "one_moves": torch.full((2,), max(sign, 0.0)),
                "opposite": torch.ones(2) + sign * torch.tensor([1.0, 0.5]),
                "logit_scale": torch.tensor(2.0 + sign),
                "bn.running_mean": torch.full((2,), 3.0 + sign),
                "bn.num_batches_tracked": torch.tensor(count),
                "empty": torch.zeros(0, 3),
            }
        )
    found = merge(STOCK, runs, start)
    for name in ("still", "one_moves", "opposite", "empty"):
        assert torch.equal(found[name], start[name]), name
    assert found["logit_scale"] == 2.0
    assert found["bn.running_mean"].tolist() == [3.0, 3.0]
    assert found["bn.num_batches_tracked"] == 4 and found["bn.num_batches_tracked"].dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("method", [STOCK, SOUP])
def test_sums_are_rounded_once_whatever_the_checkpoints_have(method, dtype):
    start, runs = family(3, seed=2, dtype=dtype)
    found = merge(method, runs, start)
    wide = [{name: tensor.double() for name, tensor in weights.items()} for weights in (start, *runs)]
    exact = merge(method, wide[1:], wide[0])
    for name, tensor in found.items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, exact[name].to(dtype)), name


def test_a_soup_is_the_mean():
    start, runs = family(3)
    for name, tensor in merge(SOUP, runs).items():
        expected = sum(run[name] for run in runs) / 3
        assert (tensor - expected).abs().max() <= 1e-10
    assert start.keys() == merge(SOUP, runs, start).keys()


@pytest.mark.parametrize(("a", "b"), [(0.0, 1.0), (0.2, 0.5), (0.9, -0.4)])
def test_lines_scales_layer_by_layer(a, b):
    start, (run,) = family(1)
    found = merge(Merge("lines", (a, b)), [run], start)
    depth = {
        "positional_embedding": 0,
        "visual.conv1.weight": 0,
        **{f"visual.transformer.resblocks.{n}.mlp.c_fc.weight": n / 3 for n in range(4)},
        **{f"transformer.resblocks.{n}.ln_1.weight": n / 2 for n in range(3)},
        **dict.fromkeys(("visual.ln_post.bias", "visual.proj", "text_projection", "logit_scale"), 1),
    }
    assert depth.keys() == found.keys()
    for name, tensor in found.items():
        expected = start[name] + (a + b * depth[name]) * (run[name] - start[name])
        assert (tensor - expected).abs().max() <= 1e-10, name
    assert merge(LINES, [run], start)["visual.proj"].equal(run["visual.proj"])


@pytest.mark.parametrize(
    ("tower", "names", "expected"),
    [
        ("visual", "conv3.weight bn1.bias layer1.0.conv1.weight", [0, 0, 1]),
        ("visual", "layer1.0.bn1.bias layer2.0.bn1.bias layer4.1.downsample.0.weight", [0, 0.5, 1]),
        ("visual", "layer1.0.bn1.bias layer1.1.bn1.bias attnpool.positional_embedding", [0, 1, 1]),
        ("visual.trunk", "patch_embed.proj.weight blocks.0.attn.qkv.weight", [0, 1]),
        ("visual.trunk", "blocks.2.norm1.bias blocks.10.norm1.bias norm.bias", [0, 1, 1]),
        ("visual.trunk", "stem.0.bias stages.0.blocks.0.norm.bias stages.1.downsample.0.bias", [0, 0, 1]),
        ("visual.trunk", "stages.0.blocks.0.a stages.1.downsample.0.b stages.1.blocks.1.c", [0, 0.5, 1]),
        ("visual.trunk", "head.norm.bias attn_pool.latent layers.0.blocks.0.norm1.bias", [1, 1, 1]),
        ("visual", "head.proj.weight", [1]),
        ("text", "token_embedding.weight transformer.resblocks.0.ln_1.bias ln_final.bias", [0, 1, 1]),
        ("text.transformer", "resblocks.0.ln_1.bias resblocks.1.ln_1.bias", [0, 1]),
        (
            "text.transformer",
            "embeddings.word.weight encoder.layer.0.output.bias pooler.dense.bias",
            [0, 1, 1],
        ),
        ("text.transformer", "encoder.layer.0.output.bias encoder.layer.1.output.bias", [0, 1]),
        ("text.transformer", "block.0.layer.0.q.weight block.1.layer.1.wi.weight", [0, 1]),
        ("text", "proj.0.weight", [1]),
    ],
)
def test_layers_are_known_by_name(tower, names, expected):
    assert list(depths(f"{tower}.{name}" for name in names.split()).values()) == expected


def test_what_belongs_to_no_tower_is_of_the_last_layer():
    assert set(depths(["logit_scale", "logit_bias", "arf_head.weight", "text_projection"]).values()) == {1.0}


@pytest.mark.process  # timm takes seconds for some of them
@pytest.mark.parametrize(
    "name",
    ["RN50", "ViT-B-16", "ViT-B-16-SigLIP", "convnext_base", "EVA02-B-16", "MobileCLIP-S1", "ViTamin-S"],
)
def test_all_parameters_of_open_clips_towers_have_a_layer(name):
    from open_clip import get_model_config
    from open_clip.model import CLIP, CustomTextCLIP

    config = get_model_config(name)
    assert config is not None
    kind = CustomTextCLIP if config.get("custom_text") else CLIP
    parts = ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "init_logit_bias")
    config["vision_cfg"] = {**config["vision_cfg"], "timm_model_pretrained": False}
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = kind(**{key: config[key] for key in parts if key in config}).state_dict()
    found = depths(state)
    assert found.keys() == state.keys()
    for tower in (True, False):
        values = {value for key, value in found.items() if key.startswith("visual.") == tower}
        assert {0.0, 1.0} < values and len(values) >= 12


def test_names_that_tell_no_layer_are_named():
    with pytest.raises(
        EvaluationError, match=r"tell no layer: 'a\.weight'; 'visual\.b'\. Expected the towers"
    ):
        depths(["a.weight", "visual.b", "visual.proj"])


def save(path: Path, weights: dict) -> Path:
    torch.save({"epoch": 1, "state_dict": {f"module.{name}": t for name, t in weights.items()}}, path)
    return path


@pytest.fixture
def files(tmp_path):
    """A start and two runs, opened."""
    start, runs = family(2, dtype=torch.float32)
    paths = [
        save(tmp_path / f"{name}.pt", w) for name, w in (("start", start), ("a", runs[0]), ("b", runs[1]))
    ]
    original, *tuned = map(open_checkpoint, paths)
    return original, tuned


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_written_files_hold_what_merging_in_memory_gives(files, tmp_path, suffix):
    original, tuned = files
    write_merges(original, tuned, {tmp_path / f"{how}{suffix}": how for how in (STOCK, SOUP)})
    write_merges(original, tuned[:1], {tmp_path / f"lines 0 1{suffix}": LINES})
    for how, runs in ((STOCK, tuned), (SOUP, tuned), (LINES, tuned[:1])):
        found = open_checkpoint(tmp_path / f"{how}{suffix}").weights
        expected = merge(how, [run.weights for run in runs], original.weights)
        assert found.keys() == expected.keys()
        assert all(found[name].equal(expected[name]) for name in found)


def test_what_cannot_be_merged_is_refused(files, tmp_path):
    original, tuned = files
    weights = tuned[0].weights
    other = open_checkpoint(save(tmp_path / "other.pt", {**weights, "visual.proj": torch.zeros(4, 6)}))
    with pytest.raises(
        EvaluationError, match=r"a\.pt and .*other\.pt are of different .*'visual\.proj' is \[4, 6\]"
    ):
        write_merges(original, [tuned[0], other], {tmp_path / "x.pt": SOUP})
    fewer = open_checkpoint(
        save(tmp_path / "fewer.pt", {k: v for k, v in weights.items() if k != "visual.proj"})
    )
    with pytest.raises(EvaluationError, match=r"fewer\.pt are of different .*'visual\.proj' is missing"):
        write_merges(original, [tuned[0], fewer], {tmp_path / "x.pt": STOCK})
    with pytest.raises(EvaluationError, match="stock merges two fine-tuned checkpoints or more; 1 given"):
        write_merges(original, tuned[:1], {tmp_path / "x.pt": STOCK})
    with pytest.raises(EvaluationError, match="lines takes one fine-tuned checkpoint, 2 were given"):
        write_merges(original, tuned, {tmp_path / "x.pt": LINES})
    head = {"arf_head.weight": torch.zeros(3, 5), "arf_head.bias": torch.zeros(3)}
    headed = [
        open_checkpoint(save(tmp_path / f"{n}.pt", {
            **weights, **head, "arf_head.classnames": torch.full((32,), n, dtype=torch.uint8)
        })) for n in (1, 2)
    ]  # fmt: skip
    with pytest.raises(EvaluationError, match="for different class names"):
        write_merges(original, headed, {tmp_path / "x.pt": SOUP})
    with pytest.raises(EvaluationError, match=r"1\.pt has a classification head and .*a\.pt has none"):
        write_merges(original, [tuned[0], headed[0]], {tmp_path / "x.pt": SOUP})
    assert not (tmp_path / "x.pt").exists()
    for method, lines in (("slerp", ()), ("lines", ()), ("soup", (0.0, 1.0)), ("lines", (0.5, 0.6))):
        with pytest.raises(EvaluationError):
            Merge(method, lines)
    with pytest.raises(EvaluationError, match="all but a soup the original"):
        Candidate(tuned[0].path, merge=STOCK, others=(tuned[1].path,))


def test_runs_that_have_not_moved_are_said(files, tmp_path):
    original, tuned = files
    copied = open_checkpoint(save(tmp_path / "copy.pt", tuned[0].weights))
    with pytest.raises(EvaluationError, match=r"a\.pt and .*copy\.pt hold the same weights"):
        check_moved(original, [tuned[0], copied])
    with pytest.warns(
        UserWarning, match=r"start\.pt holds the weights of .*start\.pt: it has not been fine-tuned"
    ):
        check_moved(original, [tuned[0], original])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_moved(original, tuned)


STOCK_OF_THREE = """
from arf_plugin.evaluation.merging import Merge, write_merges
original, *runs = (open_checkpoint(Path(path)) for path in sys.argv[1:5])
write_merges(original, runs, {Path(sys.argv[5]): Merge("stock")})
"""


@pytest.mark.process
def test_memory_is_that_of_one_model_however_many_runs(tmp_path):
    paths = [tmp_path / f"{name}.safetensors" for name in "oabc"]
    size, *_ = (save_large(path, 15, seed) for seed, path in enumerate(paths))
    libraries, highest = peak(STOCK_OF_THREE, *paths, tmp_path / "stock.pt")
    # Sums in fp64 and the allocator take some 80 MB, whatever the model; three runs and their start would be 4 * size.
    assert 0.9 * size < highest - libraries < 1.15 * size + 100e6
