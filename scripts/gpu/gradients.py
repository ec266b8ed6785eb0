"""One optimizer step through our one forward against three separate ones of stock open_clip, in this process."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from gpu.context import Context, Outcome

TASK, CAPTION, PAIR = range(3)
LENGTHS = (12, 18, 24)


@dataclasses.dataclass(frozen=True)
class Case:
    """A step.

    Attributes:
        name: Row of the table.
        pairs: A as a part of B.
        trim: Whether texts are cut to the longest.
        accum_freq: Micro-batches.
        checkpointing: Whether activations are computed again.
    """

    name: str
    pairs: float = 1
    trim: bool = True
    accum_freq: int = 1
    checkpointing: bool = False


CASES = (
    Case("A = B"),
    Case("A = B, not trimmed", trim=False),
    Case("A = B/4", pairs=1 / 4),
    Case("A = B/4, accum 2", pairs=1 / 4, accum_freq=2),
    Case("A = B/4, checkpointing", pairs=1 / 4, checkpointing=True),
)
# name -> (the trainer's --precision, whether TF32 is used)
PRECISIONS = {
    "fp32": ("fp32", False),
    "fp32 with TF32": ("fp32", True),
    "amp": ("amp", True),
    "amp_bf16": ("amp_bf16", True),
}


def gradients(context: Context) -> Outcome:
    """Gradients of all parameters: fp64 to 1e-10; the others as far from fp64 as three forwards are."""
    import open_clip
    import torch
    from support import data

    logging.disable(logging.INFO)
    found = Outcome()
    name, batch = ("tiny-long", 8) if context.tiny else ("ViT-B-32", 16)
    open_clip.add_model_config(data.write_model_configs(context.folder / "configs"))
    torch.manual_seed(0)
    single = open_clip.create_model(name, output_dict=True)
    double = copy.deepcopy(single).double().to(context.device)
    single = single.to(context.device)
    worst: dict[str, float] = {}
    with _tf32(False):
        for case in CASES:
            step = _Step(context, double, case, batch)
            terms = [step.stock(term, "fp64") for term in (TASK, CAPTION, PAIR)]
            ours = step.ours("fp64")
            worst[case.name] = _largest(ours, _sum(terms))
            found.at_most(
                f"fp64, {case.name}: largest relative error of a parameter's gradient",
                worst[case.name],
                1e-10,
            )
            if case is CASES[0]:  # it can fail
                found.at_least("fp64 without the pair term: error", _largest(ours, _sum(terms[:PAIR])), 0.01)
    found.figures["fp64"] = worst
    for precision, (_, tf32) in PRECISIONS.items():
        for case in (CASES[0], CASES[3], CASES[4]):
            with _tf32(False):
                truth = _sum([_Step(context, double, case, batch).stock(term, "fp64") for term in range(3)])
            with _tf32(tf32):
                step = _Step(context, single, case, batch)
                theirs, ours = _sum([step.stock(term, precision) for term in range(3)]), step.ours(precision)
            errors = {
                "ours": _total(ours, truth),
                "three forwards": _total(theirs, truth),
                "apart": _total(ours, theirs),
            }
            found.figures[f"{precision}, {case.name}"] = errors
            # Rounding falls differently in one forward and in three; it must not be of another size.
            found.at_most(
                f"{precision}, {case.name}: error to fp64, by that of three forwards ({errors['three forwards']:.2g})",
                errors["ours"] / max(errors["three forwards"], 1e-12),
                2,
            )
    found.summary = f"fp64 {max(worst.values()):.1e}; " + ", ".join(
        f"{precision} {found.figures[f'{precision}, A = B']['ours']:.1e} "
        f"(three forwards {found.figures[f'{precision}, A = B']['three forwards']:.1e})"
        for precision in PRECISIONS
    )
    return found


class _Step:
    """The same step of a model both ways, on images and texts in pinned memory."""

    def __init__(self, context: Context, model: Any, case: Case, batch: int) -> None:
        import torch

        from arf_plugin.hooks.text import accept_trimmed, trimmer

        self.device, self.case, self.batch = context.device, case, batch // case.accum_freq
        self.pairs = int(self.batch * case.pairs)
        self.model = copy.deepcopy(model)
        self.model.set_grad_checkpointing(case.checkpointing)
        self.plain = copy.deepcopy(model)
        self.trimmer = trimmer(self.model)
        assert not isinstance(self.trimmer, str), self.trimmer
        accept_trimmed(self.model)
        kind = next(model.parameters()).dtype
        size = model.visual.image_size[0]
        generator = torch.Generator().manual_seed(1)

        def images(count: int) -> torch.Tensor:
            return _pinned(torch.randn(count, 3, size, size, generator=generator).to(kind), context.on_gpu)

        def texts(count: int, length: int) -> torch.Tensor:
            tokens = torch.zeros(count, model.context_length, dtype=torch.long)
            tokens[:, : length - 1] = torch.randint(1, 400, (count, length - 1), generator=generator)
            tokens[:, length - 1] = 49407
            return _pinned(tokens, context.on_gpu)

        self.micro = []
        for _ in range(case.accum_freq):
            task, pair = images(self.batch), images(self.pairs)
            sizes = (self.batch, self.batch, self.pairs)
            words = [texts(count, length) for count, length in zip(sizes, LENGTHS, strict=True)]
            self.micro.append(list(zip((task, task, pair), words, strict=True)))

    def stock(self, term: int, precision: str) -> dict[str, Any]:
        """Gradients of one term, by stock open_clip alone: whole texts, one loss."""
        import open_clip
        from variants import Batches

        args = self._arguments(precision)
        batches = [dict(zip(("image", "text"), parts[term], strict=True)) for parts in self.micro]
        loader = Batches(batches, self.case.accum_freq, None)
        return self._train(self.plain, loader, open_clip.create_loss(args), args)

    def ours(self, precision: str) -> dict[str, Any]:
        """Gradients of all terms at once."""
        import open_clip
        from variants import Batches

        from arf_plugin.losses.anchored import AnchoredLoss

        args = self._arguments(precision)
        names = ("text", "caption_text", "pair_text")
        batches = [
            {
                **{"image": parts[TASK][0], "pair_image": parts[PAIR][0]},
                **{name: text for name, (_, text) in zip(names, parts, strict=True)},
            }
            for parts in self.micro
        ]
        loader = Batches(batches, self.case.accum_freq, self.trimmer if self.case.trim else None)
        loss = AnchoredLoss(lambda: open_clip.create_loss(args), loader.step)
        return self._train(self.model, loader, loss, args)

    def _arguments(self, precision: str) -> Any:
        from support.arguments import training_arguments

        flag = PRECISIONS.get(precision, ("fp32",))[0]
        return training_arguments(
            device=self.device,
            batch_size=self.batch,
            model="",
            accum_freq=self.case.accum_freq,
            precision=flag,
        )

    def _train(self, model: Any, loader: Any, loss: Any, args: Any) -> dict[str, Any]:
        import torch
        from open_clip_train.train import train_one_epoch
        from support.reference import Capture

        data = {"train": SimpleNamespace(dataloader=loader, set_epoch=lambda epoch: None)}
        optimizer = Capture(model.parameters(), lr=0.0)
        # No gradient of these grows beyond fp16 with a scale like this, so that the scaler skips no step.
        scaler = torch.amp.GradScaler(self.device, init_scale=256.0) if args.precision == "amp" else None
        train_one_epoch(model, data, loss, 0, optimizer, scaler, None, None, args)
        names = [name for name, _ in model.named_parameters()]
        return {name: g.double() for name, g in zip(names, optimizer.gradients, strict=True)}


def _pinned(tensor: Any, on_gpu: bool) -> Any:
    return tensor.pin_memory() if on_gpu else tensor


@contextlib.contextmanager
def _tf32(on: bool) -> Iterator[None]:
    """TF32 in matrix products and convolutions, or not."""
    import torch

    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = on
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def _sum(terms: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: sum(term[name] for term in terms) for name in terms[0]}


def _largest(found: dict[str, Any], expected: dict[str, Any]) -> float:
    """Largest relative error of a parameter."""
    return max(((found[n] - g).norm() / g.norm().clamp_min(1e-300)).item() for n, g in expected.items())


def _total(found: dict[str, Any], expected: dict[str, Any]) -> float:
    """Relative error of all parameters together."""
    import torch

    apart = torch.stack([(found[name] - g).norm() for name, g in expected.items()]).norm()
    return (apart / torch.stack([g.norm() for g in expected.values()]).norm()).item()


def same_bits(context: Context) -> Outcome:
    """Steps of a real size, twice from the same weights after `make_deterministic`; and the random numbers."""
    import torch

    from arf_plugin.resume import rng

    logging.disable(logging.INFO)
    found = Outcome()
    rng.make_deterministic()  # before the device is first used, as a trainer does
    from variants import StepBench, Variant

    name, batch = ("tiny-long", 8) if context.tiny else ("ViT-B-32", 64)
    if context.tiny:
        import open_clip
        from support import data

        open_clip.add_model_config(data.write_model_configs(context.folder / "configs"))
    variants = {
        "ARF, trimmed": Variant("", 1, trim=True),
        "not trimmed": Variant("", 1 / 4),
        "checkpointing": Variant("", 1 / 4, trim=True, checkpointing=True),
        "accum 2": Variant("", 1 / 4, trim=True, accum_freq=2),
    }
    for precision in ("fp32", "amp_bf16"):
        bench = StepBench(name, batch, context.device, precision=precision, lengths=(6, 9, 12))
        start = {key: value.clone() for key, value in bench.core.state_dict().items()}
        for title, variant in variants.items():
            ends = []
            for _ in range(2):
                bench.core.load_state_dict(start)
                bench.optimizer = torch.optim.AdamW(bench.core.parameters(), lr=1e-3)
                step = bench.step(variant)
                rng.seed_everything("a step")
                for _ in range(2):
                    step()
                ends.append([p.detach().clone() for p in bench.core.parameters()])
            found.holds(
                f"{precision}, {title}: two runs of two steps end bitwise identical",
                all(map(torch.equal, *ends)),
            )
    _random_numbers(context, found)
    found.summary = f"{sum(bar.met for bar in found.bars)} of {len(found.bars)}"
    return found


def _random_numbers(context: Context, found: Outcome) -> None:
    """Seeding, noting and putting back the device's generator."""
    import torch

    from arf_plugin.resume import rng

    def draw() -> Any:
        return torch.rand(8, device=context.device)

    rng.seed_everything("seed", 1)
    first = draw()
    state = rng.rng_state()
    second = draw()
    rng.restore_rng(state)
    found.holds("the state of the device's random numbers is noted and put back", torch.equal(second, draw()))
    rng.seed_everything("seed", 1)
    found.holds("the device's random numbers are seeded", torch.equal(first, draw()))
    gpus = torch.cuda.device_count() if context.on_gpu else 0
    found.holds("each GPU has its state in a checkpoint", len(state["cuda"]) == gpus)
