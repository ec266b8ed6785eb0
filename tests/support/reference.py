"""The independent reference for one optimizer step of ARF: three passes of stock open_clip, summed.

It shares nothing with the plugin. Batches are rebuilt from the files on disk: each image that the trainer saw is
looked up among the files by its pixels, and its texts are read from the tars and the parquet again. Each term is one
call of open_clip's own, unmodified ``train_one_epoch`` with open_clip's own loss; the gradients are added up.

Run as a script under torchrun: reference.py JOBS.json (see `Job`); writes gradients beside each record.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
from PIL import Image
from scipy.stats import beta

from support.arguments import training_arguments


@dataclasses.dataclass
class Job:
    """One recorded run to compute the reference for.

    Attributes:
        record: Path prefix of the records, ``.RANK`` is appended.
        anchors: The anchor set.
        task: Folder of the task shards.
        task_size: B.
        pair_size: A.
        siglip: Whether the loss is SigLipLoss.
        accum_freq: Micro-batches per step.
        local_loss: --local-loss.
        gather_with_grad: --gather-with-grad.
        loss_dist_impl: --loss-dist-impl.
        model: --model.
        every: --arf-every.
        step: The step that was recorded.
        caption_loss: --arf-caption-loss.
        pair_loss: --arf-pair-loss.
        start: File of the weights that training started from, where anchors are held by features.
        teacher: --arf-teacher, or None.
        teacher_weight: --arf-teacher-weight.
        steps: Optimizer steps of the run, which the average of the teacher's weights depends on.
    """

    record: str
    anchors: str
    task: str
    task_size: int
    pair_size: int
    siglip: bool
    accum_freq: int
    local_loss: bool
    gather_with_grad: bool
    loss_dist_impl: str | None = None
    model: str = "tiny-long"
    every: int = 1
    step: int = 0
    caption_loss: str = "contrastive"
    pair_loss: str = "contrastive"
    start: str | None = None
    teacher: str | None = None
    teacher_weight: float = 0.0
    steps: int = 0

    @property
    def anchored(self) -> bool:
        """Whether the recorded step is to have anchors."""
        return self.step % self.every == 0


def read_tars(folder: Path) -> dict[str, dict[str, bytes]]:
    """All samples of the tars in a folder: ``shard/key`` -> extension -> bytes."""
    samples: dict[str, dict[str, bytes]] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, extension = member.name.rsplit(".", 1)
                samples.setdefault(f"{path.stem}/{key}", {})[extension] = tar.extractfile(member).read()
    return samples


def pixels(png: bytes) -> torch.Tensor:
    """``[3, H, W]`` float64, normalised as open_clip does by default."""
    from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    image = Image.open(io.BytesIO(png)).convert("RGB")
    array = torch.from_numpy(np.array(image)).permute(2, 0, 1).double() / 255
    mean, std = (
        torch.tensor(x, dtype=torch.float64)[:, None, None] for x in (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD)
    )
    return (array - mean) / std


class Files:
    """Finds the file of an image that the trainer saw."""

    def __init__(self, folder: Path) -> None:
        self.samples = read_tars(folder)
        self.ids = list(self.samples)
        self.images = torch.stack([pixels(self.samples[i]["png"]) for i in self.ids])

    def find(self, image: torch.Tensor) -> int:
        distance = (self.images - image).abs().flatten(1).amax(1)
        best = int(distance.argmin())
        assert distance[best] < 1e-9, f"no file has this image (closest differs by {distance[best]:.3g})"
        return best


def rebuild(
    job: Job, images: torch.Tensor, task: Files, pairs: Files, captions: dict[str, str], tokenize
) -> list:
    """The three batches ``(images, texts)`` of one micro-batch, from the files; one alone without anchors."""
    rows = [task.find(image) for image in images[: job.task_size]]
    pair_images = images[job.task_size :] if job.anchored else images[:0]
    assert len(pair_images) == (job.pair_size if job.anchored else 0)
    pair_rows = [pairs.find(image) for image in pair_images]
    own = [task.samples[task.ids[row]]["txt"].decode() for row in rows]
    anchors = [captions[task.ids[row]] for row in rows]
    if not job.anchored:
        return [(task.images[rows], tokenize(own))]
    pair_texts = [pairs.samples[pairs.ids[row]]["txt"].decode() for row in pair_rows]
    return [
        (task.images[rows], tokenize(own)),
        (task.images[rows], tokenize(anchors)),
        (pairs.images[pair_rows], tokenize(pair_texts)),
    ]


def step_gradients(
    job: Job, weights: dict, batches: list, rank: int, world_size: int
) -> dict[str, torch.Tensor]:
    """Gradients of one optimizer step of stock open_clip on the given micro-batches."""
    import open_clip
    from open_clip_train import train

    model = _model(job, weights)
    args = training_arguments(
        rank=rank,
        world_size=world_size,
        batch_size=len(batches[0][0]),
        model=job.model,
        accum_freq=job.accum_freq,
        siglip=job.siglip,
        loss_dist_impl=job.loss_dist_impl,
        local_loss=job.local_loss,
        gather_with_grad=job.gather_with_grad,
    )
    optimizer = Capture(model.parameters(), lr=0.0)
    if hasattr(open_clip, "create_task"):  # open_clip 4
        task = open_clip.create_task(args, model=model)
        if world_size > 1:
            task.prepare_distributed()
        loader = Batches({"image": images, "text": texts} for images, texts in batches)
        train.train_one_epoch(train.TrainState(task, optimizer), _data(loader, len(batches[0][0])), args)
    else:
        wrapped = torch.nn.parallel.DistributedDataParallel(model) if world_size > 1 else model
        data, loss = _data(Batches(batches), len(batches[0][0])), open_clip.create_loss(args)
        train.train_one_epoch(wrapped, data, loss, 0, optimizer, None, None, None, args)
    names = [name for name, _ in model.named_parameters()]
    return dict(zip(names, optimizer.gradients, strict=True))


def _model(job: Job, weights: dict) -> torch.nn.Module:
    """The model with the given parameters."""
    import open_clip

    bias = {"init_logit_bias": -10} if job.siglip else {}
    model, _, _ = open_clip.create_model_and_transforms(job.model, output_dict=True, **bias)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}  # FSDP has no scalars
    given = {name: weights[name].reshape(shape) for name, shape in shapes.items() if name in weights}
    model.load_state_dict(given, strict=False)
    return model


def average(trajectory: list[dict[str, torch.Tensor]], steps: int) -> dict[str, torch.Tensor]:
    """Mean of the weights so far, of the first ones of ``steps`` + 1, each weighed by the density of Beta(1/2, 1/2)."""
    k = beta.pdf((np.arange(len(trajectory)) + 0.5) / (steps + 1), 0.5, 0.5)
    k = k / k.sum()
    return {
        name: sum(float(factor) * weights[name] for factor, weights in zip(k, trajectory, strict=True))
        for name in trajectory[0]
    }


def teacher_gradients(job: Job, record: dict, batches: list, world_size: int) -> dict[str, torch.Tensor]:
    """Gradients of the teacher's term on the task samples of all processes."""
    trajectory = [*(earlier["weights"] for earlier in record["earlier"]), record["weights"]]
    taught = trajectory[0] if job.teacher == "start" else average(trajectory, job.steps)
    student, teacher = _model(job, record["weights"]), _model(job, taught).eval()
    images, texts = (torch.cat(parts) for parts in zip(*batches, strict=True))
    found = student(images, texts)
    with torch.no_grad():
        target = teacher(images, texts)
    loss = 0.0
    for kind in ("image_features", "text_features"):
        for one, other in zip(found[kind], target[kind], strict=True):
            loss = loss + job.teacher_weight / len(images) * ((one - other) ** 2).sum()
    names, parameters = zip(*student.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    if world_size > 1:
        for gradient in gradients:
            torch.distributed.all_reduce(gradient)
    return {name: gradient / world_size for name, gradient in zip(names, gradients, strict=True)}


class Batches(list):
    """A loader of ready batches; the trainer reads its sizes off it, too."""


def _data(loader: Batches, batch_size: int) -> dict[str, SimpleNamespace]:
    loader.num_batches, loader.num_samples = len(loader), len(loader) * batch_size
    return {"train": SimpleNamespace(dataloader=loader, set_epoch=lambda epoch: None)}


class Capture(torch.optim.SGD):
    """Keeps the gradients that reach the optimizer."""

    def step(self, closure=None):
        self.gradients = [p.grad.clone() for group in self.param_groups for p in group["params"]]


def feature_gradients(
    job: Job, weights: dict, batches: list, kind: str, mean: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Gradients of a term of features on all micro-batches, averaged over processes: 10 times its value, by hand."""
    model = _model(job, weights)
    u, v = _differences(job, model, batches)
    if kind == "captions":
        value = sum(v.pow(2).sum(1)) / len(v)
    elif kind == "feature":
        value = sum(u.pow(2).sum(1) + v.pow(2).sum(1)) / len(u)
    else:
        value = sum(((u - mean) ** 2 + (v - mean) ** 2 + (u - v) ** 2).sum(1)) / len(u)
    (10 * value).backward()
    return {
        name: _average(torch.zeros_like(p) if p.grad is None else p.grad)
        for name, p in model.named_parameters()
    }


def _differences(job: Job, model: torch.nn.Module, batches: list) -> tuple[torch.Tensor, torch.Tensor]:
    """u and v, of the samples of all micro-batches; what the set holds was rounded to 16 bits."""
    start = _model(job, torch.load(job.start, weights_only=True))
    images, texts = (torch.cat(parts) for parts in zip(*batches, strict=True))
    with torch.no_grad():
        f0 = start.encode_image(images, normalize=True).half().to(images)
        g0 = start.encode_text(texts, normalize=True).half().to(images)
    return model.encode_image(images, normalize=True) - f0, model.encode_text(texts, normalize=True) - g0


def _average(tensor: torch.Tensor) -> torch.Tensor:
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(tensor)
        tensor /= torch.distributed.get_world_size()
    return tensor


def mean_before(job: Job, earlier: list, batches_of) -> torch.Tensor:
    """m of ``difference`` as the steps before the recorded one have left it."""
    mean = torch.zeros(16)
    for number, record in enumerate(earlier):
        if number % job.every == 0:
            step = dataclasses.replace(job, step=number)
            with torch.no_grad():
                batches = [parts[2] for parts in batches_of(step, record)]
                u, v = _differences(job, _model(job, record["weights"]), batches)
            mean = 0.99 * mean + 0.01 * _average((u.mean(0) + v.mean(0)) / 2)
    return mean


def compute(job: Job, rank: int, world_size: int) -> list[dict[str, torch.Tensor]]:
    """Reference gradients of one job, a dictionary per term: task, captions, pairs, teacher; at their weights."""
    import open_clip

    record = torch.load(f"{job.record}.{rank}", weights_only=True)
    task, pairs = Files(Path(job.task)), Files(Path(job.anchors) / "pairs")
    frames = [pd.read_parquet(path) for path in sorted(Path(job.anchors, "captions").glob("*.parquet"))]
    captions = dict(pd.concat(frames)[["id", "caption"]].itertuples(index=False))
    tokenize = open_clip.get_tokenizer(job.model)

    def batches_of(job: Job, record: dict) -> list:
        return [rebuild(job, images, task, pairs, captions, tokenize) for images, _ in record["inputs"]]

    micro = batches_of(job, record)
    assert len(micro) == job.accum_freq
    by_hand = {1: "captions"} if job.caption_loss == "feature" else {}
    by_hand |= {2: job.pair_loss} if job.pair_loss != "contrastive" else {}
    mean = mean_before(job, record["earlier"], batches_of) if job.pair_loss == "difference" else None
    terms = [
        feature_gradients(job, record["weights"], [parts[term] for parts in micro], by_hand[term], mean)
        if term in by_hand
        else step_gradients(job, record["weights"], [parts[term] for parts in micro], rank, world_size)
        for term in range(len(micro[0]))
    ]
    terms[1:] = [{name: job.every * g for name, g in term.items()} for term in terms[1:]]
    if job.teacher:
        terms.append(teacher_gradients(job, record, [parts[0] for parts in micro], world_size))
    return terms


def relative_error(record: str, terms: list[dict[str, torch.Tensor]]) -> float:
    """Largest relative error over all parameters of a recorded step against the sum of terms."""
    found = torch.load(f"{record}.0", weights_only=True)["gradients"]
    assert set(found) == set(terms[0])
    expected = {name: sum(term[name] for term in terms) for name in found}
    return max(((found[n] - g).norm() / g.norm().clamp_min(1e-300)).item() for n, g in expected.items())


def main() -> None:
    """Computes the reference of each job and writes it to ``RECORD.reference`` on the first rank."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if world_size > 1:
        torch.distributed.init_process_group("gloo")
    for job in (Job(**job) for job in json.loads(Path(sys.argv[1]).read_text())):
        gradients = compute(job, rank, world_size)
        if rank == 0:
            torch.save(gradients, f"{job.record}.reference")


if __name__ == "__main__":
    main()
