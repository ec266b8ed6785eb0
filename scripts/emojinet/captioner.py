"""Trains a small image captioner on the pool and saves it in the Hugging Face layout.

A ViT encoder and a GPT-2 decoder of a few million weights, from scratch: what BLIP is to a real task, this is to
EmojiNet. It has seen pool images and their captions only, no class prompt and no image of the task or the tests.
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
WIDTH, ENCODER_LAYERS, DECODER_LAYERS, HEADS = 128, 4, 2, 4
VOCABULARY = 2000
MAX_TOKENS = 24
BATCH_SIZE = 64
LEARNING_RATE = 1.5e-3


def read_pairs(shards: Sequence[Path]) -> tuple[torch.Tensor, list[str]]:
    """Reads pool shards.

    Returns:
        Images [N, 3, IMAGE_SIZE, IMAGE_SIZE] in [-1, 1] and N captions.
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
    return torch.stack(images).float().div_(127.5).sub_(1.0), captions


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
    from transformers import GPT2Config, VisionEncoderDecoderConfig, VisionEncoderDecoderModel, ViTConfig

    encoder = ViTConfig(
        image_size=IMAGE_SIZE,
        patch_size=8,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=ENCODER_LAYERS,
        num_attention_heads=HEADS,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    decoder = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=2 * MAX_TOKENS,
        n_embd=WIDTH,
        n_layer=DECODER_LAYERS,
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


def train(shards: Sequence[Path], out: Path, epochs: int, seed: int = 0) -> None:
    """Trains the captioner and saves it to `out`, which appears only when it is complete."""
    import torch
    from transformers import ViTImageProcessor

    if (out / "config.json").is_file():
        print(f"{out} is complete")
        return
    torch.manual_seed(seed)
    images, captions = read_pairs(shards)
    tokenizer = train_tokenizer(captions)
    tokens = tokenizer(captions, padding=True, truncation=True, return_tensors="pt").input_ids
    model = build_model(tokenizer).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    steps = epochs * (len(images) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    order = torch.cat([torch.randperm(len(images)) for _ in range(epochs + 1)])
    with tqdm(range(steps), desc="train captioner", unit="step") as bar:
        for step in bar:
            batch = order[step * BATCH_SIZE : (step + 1) * BATCH_SIZE]
            target = tokens[batch]
            target = target[:, : int((target != tokenizer.pad_token_id).sum(dim=1).max())]
            # Each token is predicted from those before it; the decoder shifts nothing by itself here.
            output = model(pixel_values=shifted(images[batch]), decoder_input_ids=target[:, :-1])
            loss = torch.nn.functional.cross_entropy(
                output.logits.flatten(0, 1), target[:, 1:].flatten(), ignore_index=tokenizer.pad_token_id
            )
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.2f}")
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
