"""The stages that build anchors, against bare loops on the same device; and the commands on it against the CPU."""

from __future__ import annotations

import importlib.util
import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from gpu.context import Context, Outcome, median
from gpu.trainers import Trainers, reason


def embed(context: Context) -> Outcome:
    """`arf embed`'s own loop over decoded images, against encode_image on batches that are on the device."""
    import open_clip
    import torch
    from support import data

    from arf_plugin.pipeline.embed import EmbedStage
    from arf_plugin.pipeline.embedder import ClipModel, LoadedClip
    from arf_plugin.pipeline.execution import Execution, pick_dtype
    from arf_plugin.pipeline.source import RawSample
    from arf_plugin.pipeline.stage import Shard

    logging.disable(logging.INFO)
    found = Outcome()
    if context.tiny:
        open_clip.add_model_config(data.write_model_configs(context.folder / "configs"))
    name, batch, batches = ("tiny-vit", 8, 2) if context.tiny else ("ViT-B-32", 256, 12)
    device = torch.device(context.device)
    dtype = pick_dtype("auto", device)
    model, _, _ = open_clip.create_model_and_transforms(
        name, precision="fp16" if dtype == torch.float16 else "fp32", device=device
    )
    model.eval()
    size = model.visual.image_size[0]
    pixels = [torch.randn(3, size, size) for _ in range(batch)]
    samples = [RawSample(str(i), str(i)) for i in range(batch)]
    stage: Any = EmbedStage(context.folder, None, ClipModel(name))  # type: ignore[arg-type]
    stage.clip = LoadedClip(model, None, None, device, dtype)
    stage.source = SimpleNamespace(read=lambda shard: samples * batches)
    stage._decode = lambda sample: ("", pixels[int(sample.id)])
    kept: list[Any] = []
    stage.write = lambda shard, vectors, metadata: kept.append(vectors[0])
    execution = Execution(device=context.device, batch_size=batch, workers=0)
    ready = torch.stack(pixels).to(device, dtype)
    on_host = torch.stack(pixels)
    pinned = on_host.to(dtype).pin_memory() if context.on_gpu else on_host

    def bare() -> None:
        with torch.inference_mode():
            for _ in range(batches):
                torch.nn.functional.normalize(model.encode_image(ready).float(), dim=-1)

    def copied() -> None:
        with torch.inference_mode():
            for _ in range(batches):
                torch.nn.functional.normalize(
                    model.encode_image(pinned.to(device, non_blocking=True)).float(), dim=-1
                )

    calls = {
        "arf embed": lambda: stage.process(Shard.__new__(Shard), execution, lambda count: None),
        "bare loop, images on the device": bare,
        "bare loop, images in pinned memory": copied,
    }
    seconds = context.timed(calls, 3 if context.tiny else 5, 1)
    rates = {each: batch * batches / median(values) for each, values in seconds.items()}
    with torch.inference_mode():
        own = torch.nn.functional.normalize(model.encode_image(ready).float(), dim=-1).cpu().numpy()
    cosine = (kept[-1][:batch].astype(np.float32) * own).sum(1).min()
    found.at_least("smallest cosine to the bare loop's vectors", float(cosine), 0.999)
    found.figures = {
        "model": name,
        "batch": batch,
        "dtype": str(dtype),
        "images/s": rates,
        "seconds": seconds,
    }
    found.summary = ", ".join(f"{each} {rate:.0f}/s" for each, rate in rates.items())
    return found


def search(context: Context) -> Outcome:
    """Exact search against a bare matrix product and top-k over the same blocks; neighbours against fp64's."""
    import torch

    from arf_plugin.pipeline.knn import POOL_BLOCK, exact_search

    found = Outcome()
    rows, dimension, count, k = (20_000, 64, 64, 5) if context.tiny else (1_000_000, 512, 4096, 20)
    device = torch.device(context.device)
    generator = torch.Generator(device).manual_seed(0)

    def unit(number: int) -> np.ndarray:
        made = torch.randn(number, dimension, device=device, generator=generator)
        return torch.nn.functional.normalize(made, dim=1).half().cpu().numpy()

    pool = np.concatenate([unit(min(250_000, rows - start)) for start in range(0, rows, 250_000)])
    pool[rows // 2] = pool[7]  # a tie, which goes to the lower row
    queries = unit(count)
    queries[0] = pool[7]

    def blocks(size: int = POOL_BLOCK) -> Any:
        return ((start, pool[start : start + size]) for start in range(0, rows, size))

    def ours() -> tuple[np.ndarray, np.ndarray]:
        return exact_search(queries, blocks(), k, device)

    def bare(size: int, whole: Any = None) -> tuple[np.ndarray, np.ndarray]:
        query = torch.from_numpy(queries).to(device).float()
        scores, places = None, None
        for start in range(0, rows, size):
            block = (
                whole[start : start + size]
                if whole is not None
                else torch.from_numpy(pool[start : start + size]).to(device)
            )
            top, where = (query @ block.float().T).topk(k, dim=1)
            where = where + start
            if scores is not None:
                top, chosen = torch.cat([scores, top], 1).topk(k, dim=1)
                where = torch.cat([places, where], 1).gather(1, chosen)
            scores, places = top, where
        return places.cpu().numpy(), scores.cpu().numpy()

    on_device = torch.from_numpy(pool).to(device)
    calls = {
        "exact_search": ours,
        "bare, same blocks": lambda: bare(POOL_BLOCK),
        "bare, blocks of 65536": lambda: bare(65536),
        "bare, pool on the device": lambda: bare(65536, on_device),
    }
    seconds = context.timed(calls, 3, 1)
    found.figures = {"pool": [rows, dimension], "queries": count, "k": k, "seconds": seconds}
    found.figures["median"] = {name: median(values) for name, values in seconds.items()}
    places, scores = ours()
    found.holds("of equal vectors the lower row comes first", list(places[0, :2]) == [7, rows // 2])
    some = min(count, 64)
    truth = torch.empty((some, rows), dtype=torch.float64, device=device)
    for start in range(0, rows, 65536):
        block = on_device[start : start + 65536].double()
        truth[:, start : start + 65536] = torch.from_numpy(queries[:some]).to(device).double() @ block.T
    best = truth.topk(k, dim=1).values
    at = truth.gather(1, torch.from_numpy(places[:some]).to(device))
    found.at_most("similarity lost to fp64's neighbours", (best - at).abs().max().item(), 1e-6)
    error = (at - torch.from_numpy(scores[:some]).to(device).double()).abs().max().item()
    found.at_most("error of similarities (TF32 would be 1e-4)", error, 2e-6)
    here = exact_search(queries[:some], blocks(), k, torch.device("cpu"))[0]
    agreement = float((np.sort(here, 1) == np.sort(places[:some], 1)).mean())
    found.at_least("neighbours equal to the CPU's", agreement, 0.999)
    if context.on_gpu and not context.tiny:
        ratio = found.figures["median"]["exact_search"] / found.figures["median"]["bare, same blocks"]
        found.at_most("time / the bare loop's over the same blocks", ratio, 1.5)
    found.summary = ", ".join(
        f"{name} {value * 1e3:.0f} ms" for name, value in found.figures["median"].items()
    )
    return found


def commands(context: Context) -> Outcome:
    """`arf embed`, `arf evaluate` and `arf caption` on the device against the CPU."""
    from support import building, evaluation

    found = Outcome()
    folder = context.folder
    with Trainers(context) as trainers:
        pool = building.write_pool(folder / "pool")
        clip = building.save_tiny_clip(folder / "clip")
        other = evaluation.save_model(folder / "other", 1)
        held_out = evaluation.write_set(folder / "held-out-2", images=60)
        try:
            captioner = building.save_tiny_captioner(folder / "captioner")
        except ImportError as error:
            captioner = None
            found.notes.append(f"arf caption was left out: {error}")
        evaluates = importlib.util.find_spec("clip_benchmark") is not None
        if not evaluates:
            found.notes.append("arf evaluate was left out: clip-benchmark is not installed")
        task = building.write_task(folder / "drawings")

        def arf(*argv: Any) -> str:
            status, output = trainers.call([sys.executable, "-m", "arf_plugin.cli.main", *map(str, argv)])
            if status:
                raise RuntimeError(
                    f"arf {argv[0]} ended with status {status}: {reason(output)}\n{output[-3000:]}"
                )
            return output

        places = ("cpu", context.device) if context.on_gpu else ("cpu",)
        calls = []
        for place in places:
            at = folder / place
            given = ("--device", place)
            calls.append(
                lambda at=at, given=given: arf(
                    "embed", "--pool", pool, "--model", clip, "--out", at / "e", "--modality", "both", *given
                )
            )
            if evaluates:
                calls.append(
                    lambda at=at, given=given: arf(
                        *(
                            "evaluate",
                            "--model",
                            other,
                            "--data",
                            held_out,
                            "--out",
                            at / "rows.jsonl",
                            "--workers",
                            2,
                        ),
                        *("--precision", "fp32", *given),
                    )
                )
            if captioner is not None:
                length = (
                    "--min-new-tokens",
                    3,
                    "--max-new-tokens",
                    6,
                    "--raw-captions",
                    "--precision",
                    "fp32",
                )
                calls.append(
                    lambda at=at, given=given, length=length: arf(
                        *(
                            "caption",
                            "--task-data",
                            task,
                            "--captioner",
                            captioner,
                            "--out",
                            at / "a",
                            *length,
                            *given,
                        )
                    )
                )
        for place in places:
            (folder / place).mkdir()
        trainers.all(calls)
        vectors = {place: _vectors(folder / place / "e") for place in places}
        here, there = places[0], places[-1]
        found.figures = {"vectors": len(vectors[there])}
        cosines = (vectors[here] * vectors[there]).sum(1)
        found.at_least("arf embed: smallest cosine to the CPU's vectors", float(cosines.min()), 0.999)
        if evaluates:
            rows = {
                place: json.loads((folder / place / "rows.jsonl").read_text().splitlines()[-1])
                for place in places
            }
            found.figures["metrics"] = {place: rows[place]["metrics"] for place in places}
            apart = abs(rows[here]["metrics"]["top1"] - rows[there]["metrics"]["top1"])
            found.at_most("arf evaluate: top-1 apart from the CPU's, per cent", apart, 2)
            found.holds("arf evaluate was on the device", rows[there]["device"] == context.device)
        if captioner is not None:
            texts = {place: _captions(folder / place / "a") for place in places}
            same = sum(a == b for a, b in zip(texts[here], texts[there], strict=True)) / len(texts[here])
            found.figures["captions equal"] = same
            found.at_least("arf caption: captions equal to the CPU's", same, 0.9)
    found.summary = f"{len(found.bars)} comparisons of {there} with {here}"
    return found


def _vectors(folder: Path) -> np.ndarray:
    files = sorted(folder.glob("img_emb/*.npy")) + sorted(folder.glob("text_emb/*.npy"))
    if not files:
        raise FileNotFoundError(f"no vectors in {folder}")
    return np.concatenate([np.load(file) for file in files]).astype(np.float32)


def _captions(folder: Path) -> list[tuple[str, str]]:
    import pyarrow.parquet as pq

    parts = sorted((folder / "captions").glob("part-*.parquet"))
    return [(row["id"], row["caption"]) for part in parts for row in pq.read_table(part).to_pylist()]
