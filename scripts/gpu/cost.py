"""What a step costs beside plain open_clip's: time, memory and FLOPs, with random weights and made images."""

from __future__ import annotations

import functools
import logging

from gpu.context import Context, Outcome, Skipped, median

THREE = "three forwards, A = B"


def step(context: Context, model: str, batch: int, precision: str) -> Outcome:
    """Median time of interleaved steps, peak memory and FLOPs of each variant, and their ratio to plain's."""
    import torch
    from common import paired_ratio
    from torch.utils.flop_counter import FlopCounterMode
    from variants import StepBench, Variant

    if context.tiny and model != "ViT-B-32":
        raise Skipped("with --tiny all models are one")
    logging.disable(logging.INFO)
    found = Outcome()
    if context.on_gpu:  # as open_clip's main has them
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    lengths = (12, 18, 24)
    if context.tiny:
        import open_clip
        from support import data

        open_clip.add_model_config(data.write_model_configs(context.folder / "configs"))
        model, batch, lengths = "tiny-long", 8, (6, 9, 12)
    variants = (
        Variant("plain"),
        Variant("FLYP (class prompts), trimmed", trim=True),
        Variant("ARF, A = B", 1),
        Variant("ARF, A = B, trimmed", 1, trim=True, bound=1.9),
        Variant("ARF, A = B/4", 1 / 4),
        Variant("ARF, A = B/4, trimmed", 1 / 4, trim=True, bound=1.2),
        Variant("ARF, A = B, trimmed, checkpointing", 1, trim=True, checkpointing=True),
    )
    bench = StepBench(model, batch, context.device, lengths=lengths, precision=precision)
    bench.move()
    calls = {variant.name: bench.step(variant) for variant in variants} | {THREE: bench.three_forwards}
    flops, peaks = {}, {}
    bench.three_forwards()  # the optimizer's state is there from here on
    for name, call in calls.items():
        with FlopCounterMode(display=False) as counter:
            call()
        flops[name] = counter.get_total_flops()
        if context.on_gpu:
            bench.optimizer.zero_grad()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            call()
            torch.cuda.synchronize()
            peaks[name] = torch.cuda.max_memory_allocated()
    if context.on_gpu:
        torch.cuda.empty_cache()
    seconds = context.timed(calls, 3 if context.tiny else 12, 1 if context.tiny else 3)
    state = sum(p.numel() * p.element_size() for p in bench.core.parameters()) * 4
    images = {variant.name: batch + int(batch * (variant.pairs or 0)) for variant in variants} | {
        THREE: 3 * batch
    }
    rows = {}
    for name in calls:
        middle = median(seconds[name])
        rows[name] = {
            "seconds": seconds[name],
            "median": middle,
            "x plain": paired_ratio(seconds[name], seconds["plain"]),
            "FLOPs": flops[name],
            "FLOPs x plain": flops[name] / flops["plain"],
            "TFLOP/s": flops[name] / middle / 1e12,
            "images/s": images[name] / middle,
            "peak memory": peaks.get(name),
        }
    found.figures = {
        "model": model,
        "B": batch,
        "precision": precision,
        "weights and state": state,
        "rows": rows,
    }
    if context.on_gpu and not context.tiny:
        for variant in variants[1:-1]:
            row = rows[variant.name]
            claim = f"{variant.name}: time / plain's, in units of the FLOPs ratio"
            found.at_most(claim, row["x plain"] / row["FLOPs x plain"], 1.1)
            if variant.bound is not None:
                found.at_most(f"{variant.name}: time / plain's", row["x plain"], variant.bound)
        faster = paired_ratio(seconds[THREE], seconds["ARF, A = B, trimmed"])
        found.at_least("three forwards / ARF, A = B, trimmed", faster, 1.25)
        least = rows["ARF, A = B, trimmed"]["peak memory"] / rows["ARF, A = B"]["peak memory"]
        found.at_most("peak memory of ARF, A = B, trimmed / not trimmed", least, 1.0)
    found.summary = f"plain {rows['plain']['median'] * 1e3:.1f} ms; " + ", ".join(
        f"{name.removeprefix('ARF, ')} {row['x plain']:.2f} (FLOPs {row['FLOPs x plain']:.2f})"
        for name, row in rows.items()
        if "trimmed" in name or name == THREE
    )
    if precision == "fp32":
        found.notes.append("fp32 is the trainer's: matrix products in TF32.")
    return found


def steps() -> dict[str, functools.partial]:
    """The four combinations, by name."""
    return {
        f"step-{model}-{'bf16' if precision == 'amp_bf16' else precision}": functools.partial(
            step, model=model, batch=batch, precision=precision
        )
        for precision in ("amp_bf16", "fp32")
        for model, batch in (("ViT-B-32", 256), ("ViT-B-16", 128))
    }
