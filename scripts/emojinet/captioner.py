"""Trains a small image captioner on the pool and saves it in the Hugging Face layout.

A Swin encoder and a GPT-2 decoder of about a million weights, from scratch: what BLIP is to a real task, this is
to EmojiNet. It has seen pool images and their captions only, no class prompt and no image of the task or the tests.

From the next-token loss alone, the decoder learns the language of captions long before the encoder learns to see, and
all images get the same caption (so did a ViT encoder after six epochs). The encoder therefore has a second task while
training: to tell from the mean of its tokens which tokens the caption holds.
"""

from __future__ import annotations

import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

if TYPE_CHECKING:
    import torch

IMAGE_SIZE = 48
ENCODER_WIDTH, ENCODER_DEPTHS = 32, (1, 2, 2)  # width doubles from stage to stage
WIDTH, LAYERS, HEADS = 128, 2, 4
VOCABULARY = 2000
MAX_TOKENS = 24
BATCH_SIZE = 64
WORD_WEIGHT = 0.1
LEARNING_RATE = 2e-3


def read_pairs(shards: Sequence[Path]) -> tuple[torch.Tensor, list[str]]:
    """Reads pool shards.

    Returns:
        Images, uint8 [N, 3, IMAGE_SIZE, IMAGE_SIZE], and N captions.
    """
    import torch
    from PIL import Image
    from torchvision.transforms.functional import pil_to_tensor

    images, captions = [], []
    for shard in shards:
        with tarfile.open(shard) as tar:
            for info in tar:
                stream = tar.extractfile(info)
                if stream is None:
                    continue
                if info.name.endswith(".png"):
                    image = (
                        Image.open(stream)
                        .convert("RGB")
                        .resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
                    )
                    images.append(pil_to_tensor(image))
                elif info.name.endswith(".txt"):
                    captions.append(stream.read().decode())
    return torch.stack(images), captions


def train_tokenizer(captions: Sequence[str]) -> Any:
    """Trains a byte-level BPE tokenizer on the captions."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(captions, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[(token, tokenizer.token_to_id(token)) for token in special[1:]]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=MAX_TOKENS,
    )


def build_model(tokenizer: Any) -> torch.nn.Module:
    """Builds the untrained captioner."""
    from transformers import GPT2Config, SwinConfig, VisionEncoderDecoderConfig, VisionEncoderDecoderModel

    encoder = SwinConfig(
        image_size=IMAGE_SIZE,
        patch_size=4,
        embed_dim=ENCODER_WIDTH,
        depths=ENCODER_DEPTHS,
        num_heads=[ENCODER_WIDTH * 2**stage // 16 for stage in range(len(ENCODER_DEPTHS))],
        window_size=3,
        drop_path_rate=0.0,
    )
    decoder = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=2 * MAX_TOKENS,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id = tokenizer.bos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    config.eos_token_id = tokenizer.eos_token_id
    model = VisionEncoderDecoderModel(config)
    model.generation_config.decoder_start_token_id = tokenizer.bos_token_id
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def train(shards: Sequence[Path], out: Path, steps: int, seed: int = 0) -> None:
    """Trains the captioner and saves it to `out`, which appears only when it is complete."""
    import torch
    from torch.nn import functional
    from transformers import ViTImageProcessor
    from transformers.utils import logging

    logging.disable_progress_bar()
    if (out / "config.json").is_file():
        print(f"{out} is complete")
        return
    torch.manual_seed(seed)
    images, captions = read_pairs(shards)
    tokenizer = train_tokenizer(captions)
    tokens = tokenizer(captions, padding=True, truncation=True, return_tensors="pt").input_ids
    model = build_model(tokenizer).train()
    words = torch.nn.Linear(model.encoder.config.hidden_size, len(tokenizer))
    parameters = [*model.parameters(), *words.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    passes = steps * BATCH_SIZE // len(images) + 1
    order = torch.cat([torch.randperm(len(images)) for _ in range(passes)])
    with tqdm(range(steps), desc="train captioner", unit="step") as bar:
        for step in bar:
            batch = order[step * BATCH_SIZE : (step + 1) * BATCH_SIZE]
            target = tokens[batch]
            target = target[:, : int((target != tokenizer.pad_token_id).sum(dim=1).max())]
            pixels = shifted(images[batch].float() / 127.5 - 1.0)
            output = model(pixel_values=pixels, decoder_input_ids=target[:, :-1])
            caption_loss = functional.cross_entropy(
                output.logits.flatten(0, 1), target[:, 1:].flatten(), ignore_index=tokenizer.pad_token_id
            )
            held = torch.zeros(len(batch), len(tokenizer)).scatter_(1, target, 1.0)
            seen = words(output.encoder_last_hidden_state.mean(dim=1))
            word_loss = functional.binary_cross_entropy_with_logits(seen, held, reduction="sum") / len(batch)
            optimizer.zero_grad()
            (caption_loss + WORD_WEIGHT * word_loss).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            bar.set_postfix(loss=f"{caption_loss.item():.2f}", words=f"{word_loss.item():.1f}")
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.eval().save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    ViTImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(temporary)
    temporary.replace(out)


def shifted(images: torch.Tensor, pixels: int = 4) -> torch.Tensor:
    """Moves a batch by up to `pixels` in both directions, filling with white: the only augmentation."""
    import torch

    down, right = (int(torch.randint(0, 2 * pixels + 1, ())) for _ in range(2))
    padded = torch.nn.functional.pad(images, (pixels,) * 4, value=1.0)
    return padded[:, :, down : down + images.shape[2], right : right + images.shape[3]]
