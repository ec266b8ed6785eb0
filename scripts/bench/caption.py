"""The stage caption against a bare loop of model.generate at the same batch size.

OMP_NUM_THREADS=1 python scripts/bench/caption.py --json runs/bench/caption.json
python scripts/bench/caption.py --captioner Salesforce/blip-image-captioning-base --images 512 --batch-size 32

Without --captioner, a VisionEncoderDecoder with random weights speaks, shaped as a small ViT and a small GPT-2; it
says --tokens words about every image. The stage reads tars, decodes, resizes, generates, cleans and writes; the bare
loop has all pixels in memory and only generates. What the stage does beside generating takes 3 to 4% of processor time
here and is hidden only where a core is free.
"""

from __future__ import annotations

import io
import os
import statistics
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import torch
from common import Bar, interleave, paired_ratio, parser, report
from PIL import Image

from arf_plugin.errors import TaskDataError
from arf_plugin.pipeline.caption import CaptionStage
from arf_plugin.pipeline.captioner import Captioner, Generation
from arf_plugin.pipeline.execution import Execution
from arf_plugin.pipeline.source import TarSource


def main() -> int:
    args_parser = parser(__doc__.split("\n")[0], rounds=5)
    args_parser.add_argument("--images", type=int, default=64)
    args_parser.add_argument("--shards", type=int, default=2)
    args_parser.add_argument("--batch-size", type=int, default=16)
    args_parser.add_argument("--tokens", type=int, default=20, help="generated per image")
    args_parser.add_argument("--side", type=int, default=500, help="of the JPEG images, as in ImageNet")
    args_parser.add_argument("--workers", type=int, default=2, help="threads that decode images")
    args_parser.add_argument("--captioner", help="folder or name of a captioner of transformers")
    args_parser.add_argument("--device", default="cpu")
    args = args_parser.parse_args()
    threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = [picture(i, args.side) for i in range(args.images)]
        urls = write_shards(folder, images, args.shards)
        captioner = args.captioner or save_captioner(folder / "captioner")
        generation = Generation(max_new_tokens=args.tokens, min_new_tokens=args.tokens)
        stage = CaptionStage(folder / "out", TarSource(urls, TaskDataError), captioner, generation)
        execution = Execution(device=args.device, workers=args.workers, batch_size=args.batch_size)
        shards = stage.plan()
        stage.prepare(execution)

        device = torch.device(args.device)
        dtype = torch.float16 if device.type == "cuda" else torch.float32
        bare = Captioner(captioner, device, dtype, generation)
        opened = [Image.open(io.BytesIO(data)).convert("RGB") for data in images]
        per_shard = [opened[i :: args.shards] for i in range(args.shards)]
        batches = [
            bare.inputs(chunk[start : start + args.batch_size])["pixel_values"].to(device, dtype)
            for chunk in per_shard
            for start in range(0, len(chunk), args.batch_size)
        ]

        def generate() -> None:
            with torch.inference_mode():
                for pixels in batches:
                    bare._model.generate(pixel_values=pixels, **generation.arguments())

        variants = {
            "arf caption": lambda: [stage.process(shard, execution, lambda count: None) for shard in shards],
            "bare generate": generate,
        }
        timed = interleave(variants, args.rounds)
    ours, theirs = timed["arf caption"], timed["bare generate"]
    facts = {
        "images": f"{args.images} JPEG, {args.side} x {args.side}, mean {np.mean([len(i) for i in images]):,.0f} bytes",
        "batch size": args.batch_size,
        "tokens per image": args.tokens,
        "threads": f"{threads}, and {args.workers} that decode",
        "images per second": f"{args.images / statistics.median(ours):.2f}, bare "
        f"{args.images / statistics.median(theirs):.2f}",
    }
    bar = Bar("rate of arf caption, of bare model.generate", paired_ratio(theirs, ours), 0.95, at_most=False)
    return report("caption: cost of the stage around the model", timed, [bar], args.json, **facts)


def picture(seed: int, side: int) -> bytes:
    """A JPEG with smooth noise, about as large as a photo of its size."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC), np.int16)
    pixels = np.clip(pixels + rng.integers(-12, 13, pixels.shape), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def write_shards(folder: Path, images: list[bytes], shards: int) -> list[str]:
    """Writes task tars; returns their paths."""
    paths = []
    for shard in range(shards):
        path = folder / f"{shard:03d}.tar"
        with tarfile.open(path, "w") as tar:
            for i in range(shard, len(images), shards):
                info = tarfile.TarInfo(f"{i:06d}.jpg")
                info.size = len(images[i])
                tar.addfile(info, io.BytesIO(images[i]))
        paths.append(str(path))
    return paths


def save_captioner(folder: Path) -> str:
    """Saves a captioner of 224 x 224 images with random weights: ViT-S/16 and a GPT-2 of the same width."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        GPT2Config,
        PreTrainedTokenizerFast,
        VisionEncoderDecoderConfig,
        VisionEncoderDecoderModel,
        ViTConfig,
        ViTImageProcessor,
    )

    words = ["<pad>", "<s>", "</s>", *(f"word{i}" for i in range(5000))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    encoder = ViTConfig(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536)
    decoder = GPT2Config(
        vocab_size=len(words), n_positions=128, n_embd=384, n_layer=6, n_head=6, add_cross_attention=True,
        is_decoder=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 1, 0, 2
    torch.manual_seed(0)
    model = VisionEncoderDecoderModel(config)
    generation = model.generation_config
    generation.decoder_start_token_id, generation.pad_token_id, generation.eos_token_id = 1, 0, 2
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": 224, "width": 224}).save_pretrained(folder)
    return str(folder)


if __name__ == "__main__":
    sys.exit(main())
