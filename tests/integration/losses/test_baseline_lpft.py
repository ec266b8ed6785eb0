"""Linear probe and LP-FT: the probe against scikit-learn, fine-tuning against a step written by hand."""

from __future__ import annotations

import json
import re

import numpy as np
import open_clip
import pytest
import torch
from packaging.version import Version
from support import data, reference, releases
from support.tars import write_tar
from torch.nn import functional

from arf_plugin.errors import FlagError
from arf_plugin.evaluation.checkpoints import read_weights, write_weights
from arf_plugin.evaluation.head import Head, names_digest, split_head

IMAGES = 16


@pytest.fixture
def probe(tmp_path, start, task):
    """A checkpoint as `arf probe` writes it, with a head of random numbers."""
    generator = torch.Generator().manual_seed(0)
    classes = len(data.CLASSNAMES)
    head = Head(
        torch.randn(classes, 16, generator=generator),
        torch.randn(classes, generator=generator),
        names_digest(data.CLASSNAMES),
    )
    path = tmp_path / "probe.pt"
    write_weights(path, {**read_weights(start), **head.tensors()}, "probe")
    return path


def adamw_step(model: torch.nn.Module, head: list[torch.nn.Parameter], loss: torch.Tensor) -> None:
    """One step of open_clip's recipe: lr 1e-3, weight decay 0.2 on matrices, CLIP's betas; no text tower.

    Epsilon is large: attention's key biases have no gradient but rounding, of which AdamW would make steps.

    open_clip 4 decays no embeddings either: its models name what they leave out.
    """
    left_out = model.no_weight_decay() if Version(releases.current()).major >= 4 else set()
    named = [(name, p) for name, p in model.named_parameters() if name.startswith("visual.")]
    named += [("head", p) for p in head]
    gradients = torch.autograd.grad(loss, [p for _, p in named])
    for (name, p), gradient in zip(named, gradients, strict=True):
        first, second = 0.1 * gradient, 0.02 * gradient**2
        decays = p.ndim >= 2 and name not in left_out
        decayed = p.detach() * (1 - 1e-3 * 0.2) if decays else p.detach()
        p.data = decayed - 1e-3 * (first / 0.1) / ((second / 0.02).sqrt() + 1e-3)


@pytest.mark.parametrize(
    ("nproc", "accum_freq", "release"),
    [(1, 1, None), (2, 2, None), (1, 1, "2.32.0")],
    ids=["plain", "two-processes-accumulation", "open_clip-2.32"],
)
def test_one_step_equals_one_written_by_hand(tmp_path, train, task, start, probe, nproc, accum_freq, release):
    """All 16 images are one step, however they are dealt out; in fp64."""
    csv = data.write_csv_task(tmp_path / "csv", IMAGES)
    run = train.forked(
        *("--train-data", csv, "--pretrained", start, "--accum-freq", accum_freq),
        *("--arf-head", probe, "--arf-classnames", task.classnames),
        *("--beta1", 0.9, "--beta2", 0.98, "--eps", 1e-3, "--wd", 0.2),
        nproc=nproc,
        batch_size=IMAGES // nproc // accum_freq,
        env={"ARF_TEST_FP64": "1"},
        open_clip=release and releases.folder(release),
    )
    weights, head = split_head(read_weights(probe))
    model = open_clip.create_model("tiny-vit").double()
    model.load_state_dict(weights)
    weight, bias = (torch.nn.Parameter(tensor.double()) for tensor in (head.weight, head.bias))
    images = torch.stack([reference.pixels(data.image(number)) for number in range(IMAGES)])
    labels = torch.arange(IMAGES) % len(data.CLASSNAMES)
    features = functional.normalize(model.encode_image(images), dim=-1)
    loss = functional.cross_entropy(features @ weight.T + bias, labels)
    adamw_step(model, [weight, bias], loss)

    found = {name.removeprefix("module."): value for name, value in run.checkpoint["state_dict"].items()}
    expected = {**model.state_dict(), "arf_head.weight": weight.data, "arf_head.bias": bias.data}
    assert set(found) == {*expected, "arf_head.classnames"}
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-11, msg=name)
    for name, value in weights.items():
        rests = not name.startswith("visual.") or "running" in name
        assert torch.equal(found[name].to(value.dtype), value) == rests or "num_batches" in name, name
    if accum_freq == 1 and nproc == 1:
        logged = re.search(r"Cross_entropy_loss: ([\d.]+)", run.output)
        assert float(logged[1]) == pytest.approx(loss.item(), rel=1e-4)
        assert "Contrastive_loss" not in run.output


def test_webdataset_resume_and_validation(train, task, start, probe):
    """Also from shards, resumed, and with open_clip's own validation, which sees the CLIP model."""
    flags = [*task.flags, "--pretrained", start]
    flags += ["--arf-head", probe, "--arf-classnames", task.classnames]
    run = train.forked(*flags, "--val-data", task.urls, "--val-num-samples", 32)
    assert "LP-FT starts from the weights and the head of" in run.output and "(LP-FT)" in run.output
    assert re.search(r"clip_val_loss: [\d.]+", run.output)
    again = train.forked(*flags, "--epochs", 2, "--resume", "latest")
    assert "resuming checkpoint" in again.output and "Train Epoch: 1" in again.output
    _, head = split_head(run.checkpoint["state_dict"])
    assert head.fits(data.CLASSNAMES) and not head.fits(data.CLASSNAMES[::-1])


def test_the_head_needs_its_own_classes_and_a_class_for_every_sample(tmp_path, train, task, start, probe):
    flags = [*task.flags, "--pretrained", start]
    names = tmp_path / "names.txt"
    names.write_text("\n".join(data.CLASSNAMES[::-1]))
    bare = write_tar(tmp_path / "bare.tar", {"0.png": data.image(0), "0.txt": b"a text"})
    for broken, message in (
        (["--arf-head", probe, "--arf-classnames", names], "was made for other classes (4 of them)"),
        (["--arf-head", start, "--arf-classnames", task.classnames], "has no head among its weights"),
        (
            [
                *("--arf-head", probe, "--arf-classnames", task.classnames, "--model", "tiny-resnet"),
                *("--pretrained", ""),
            ],
            "of another architecture than --model",
        ),
        (
            [
                *("--arf-head", probe, "--arf-classnames", task.classnames),
                *("--train-data", f"{task.urls}::{bare}"),
            ],
            "1 of 33 task samples have no 'cls', which --arf-head needs",
        ),
    ):
        run = train.forked(*flags, *broken, check=False, name=f"run{len(message)}")
        assert run.status != 0 and "arf-plugin: error: " in run.output and message in run.output, run.output
        assert "Train Epoch" not in run.output


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--arf-anchors", "a"], "--arf-head and --arf-anchors do not go together"),
        (["--arf-templates", "t"], "--arf-head and --arf-templates do not go together"),
        (["--distill-model", "m", "--distill-pretrained", "p"], "--arf-head and --distill-model do not go"),
        (["--torchscript"], "--arf-head and --torchscript do not go together"),
    ],
)
def test_what_does_not_go_with_a_head(parse, flags, message):
    with pytest.raises(FlagError, match=message):
        parse("--train-data", "x.tar", "--arf-head", "p.pt", "--arf-classnames", "n", *flags)


def test_a_head_needs_class_names(parse):
    with pytest.raises(FlagError, match="--arf-head needs --arf-classnames"):
        parse("--train-data", "x.tar", "--arf-head", "p.pt")


def features_of(task: data.Task, start) -> tuple[np.ndarray, np.ndarray]:
    """Unit features by open_clip alone, with its preprocessing for inference."""
    import io

    from PIL import Image

    model, _, preprocess = open_clip.create_model_and_transforms("tiny-vit", pretrained=str(start))
    images = [Image.open(io.BytesIO(data.image(seed))).convert("RGB") for seed, _ in task.samples.values()]
    with torch.no_grad():
        features = model.eval().encode_image(torch.stack([preprocess(image) for image in images]))
    labels = np.array([cls for _, cls in task.samples.values()])
    return functional.normalize(features, dim=-1).double().numpy(), labels


@pytest.mark.parametrize("own_validation", [True, False])
def test_arf_probe_finds_the_optimum(tmp_path, run_arf, named, task, start, own_validation):
    """The head is scikit-learn's solution at the penalty that was chosen, on the data that it was to be fitted to."""
    from sklearn.linear_model import LogisticRegression

    other = data.write_task(tmp_path / "other", shards=1, per_shard=12)
    validation = ["--validation", other.folder / "task-0000.tar"] if own_validation else []
    out = tmp_path / "probe.pt"
    done = run_arf(
        *("probe", "--task-data", task.urls, "--classnames", task.classnames, "--model", named),
        *("--pretrained", start, "--out", out, "--json", *validation),
    )
    summary = json.loads(done.stdout)
    assert summary["samples"] == 32 and summary["validation"] == (12 if own_validation else 8)
    best = max(summary["grid"], key=lambda tried: (tried["top1"], -tried["loss"]))
    assert summary["l2"] == best["l2"] and summary["validation_top1"] == best["top1"]

    weights, head = split_head(read_weights(out))
    before = read_weights(start)
    assert set(weights) == set(before) and all(torch.equal(weights[name], before[name]) for name in before)
    assert head.fits(data.CLASSNAMES)
    features, labels = features_of(task, start)
    solver = LogisticRegression(C=1 / (summary["l2"] * len(labels)), tol=1e-10, max_iter=20000)
    solver.fit(features, labels)
    expected = solver.decision_function(features)
    found = head.logits(torch.from_numpy(features)).numpy()
    centred = found - found.mean(axis=1, keepdims=True)  # a constant added to all scores changes nothing
    np.testing.assert_allclose(centred, expected - expected.mean(axis=1, keepdims=True), rtol=2e-3, atol=2e-3)


def test_arf_probe_names_samples_without_a_class(tmp_path, run_arf, named, task, start):
    bare = write_tar(tmp_path / "bare.tar", {"7.png": data.image(0), "7.txt": b"a text"})
    argv = ["probe", "--task-data", bare, "--classnames", task.classnames, "--model", named]
    done = run_arf(*argv, "--pretrained", start, "--out", tmp_path / "probe.pt", check=False)
    assert done.returncode == 1 and "Sample bare/7 has no 'cls'" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "probe.pt").exists()


def test_a_damaged_head_is_named():
    from arf_plugin.errors import EvaluationError

    with pytest.raises(EvaluationError, match="The checkpoint's head is damaged: found"):
        split_head({"arf_head.weight": torch.zeros(3, 4), "arf_head.bias": torch.zeros(2)})
