"""Trains a small image captioner on the pool and saves it in the Hugging Face layout.

It is built as today's captioners are: the CLIP's image tower sees, a small language model speaks, and a projector lies
between them (FastVLM's architecture, which takes convolutional towers; a Qwen2 decoder of two layers). The tower is
the pretrained tiny CLIP's and stays as it is, so its features are computed once. Captioners with a transformer
encoder from scratch were tried first: within minutes they gave every image the same caption.

The captioner has seen pool images and their texts only, no class prompt and no image of the task or the tests.

python scripts/benchmarks/captioner.py DATA RUN STEPS OUT     another one for a quickstart's run
"""

from __future__ import annotations

import shutil
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.files import bar
from benchmarks.recipe import MODEL

if TYPE_CHECKING:
    import torch

VISION: dict[str, Any] = MODEL["model_cfg"]["vision_cfg"]
IMAGE_SIZE: int = VISION["image_size"]
FEATURE_WIDTH, FEATURE_GRID = 512, 2  # of resnet10t's last stage at 48 pixels
WIDTH, LAYERS, HEADS = 128, 2, 4
VOCABULARY = 2000
MAX_TOKENS = 24
BATCH_SIZE = 128
LEARNING_RATE = 3e-3
DROPOUT = 0.3
IMAGE_TOKEN = "<image>"  # also the prompt that the captioner is to be given


def read_pairs(shards: Sequence[Path]) -> tuple[torch.Tensor, list[str], torch.Tensor]:
    """Reads the pretraining shards, where a drawing `KEY` occurs as `KEY_0`, `KEY_1`, ... with a text each.

    Returns:
        Distinct images [N, 3, IMAGE_SIZE, IMAGE_SIZE] in [-1, 1], M texts, and the image of each text [M].
    """
    import torch
    from PIL import Image
    from torchvision.transforms.functional import pil_to_tensor

    images: dict[str, torch.Tensor] = {}
    texts: list[tuple[str, str]] = []
    for shard in shards:
        with tarfile.open(shard) as tar:
            for info in tar:
                name, extension = info.name.rsplit(".", 1)
                key = name.rsplit("_", 1)[0]
                stream = tar.extractfile(info)
                if stream is None:
                    continue
                if extension == "txt":
                    texts.append((key, stream.read().decode()))
                elif key not in images:
                    image = (
                        Image.open(stream)
                        .convert("RGB")
                        .resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
                    )
                    images[key] = pil_to_tensor(image)
    row = {key: n for n, key in enumerate(images)}
    pixels = torch.stack(list(images.values())).float() / 127.5 - 1.0
    return pixels, [text for _, text in texts], torch.tensor([row[key] for key, _ in texts])


def train_tokenizer(texts: Sequence[str]) -> Any:
    """Trains a byte-level BPE tokenizer on the texts."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "</s>", IMAGE_TOKEN]
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        extra_special_tokens={"image_token": IMAGE_TOKEN},
        padding_side="left",
    )


def build_model(tokenizer: Any, clip: Path) -> Any:
    """Builds the captioner around the CLIP's image tower, whose weights are read from `clip`."""
    from safetensors.torch import load_file
    from transformers import FastVlmConfig, FastVlmForConditionalGeneration

    config = FastVlmConfig(
        vision_config={
            "model_type": "timm_wrapper",
            "architecture": VISION["timm_model_name"],
            "hidden_size": FEATURE_WIDTH,
            "do_pooling": False,
        },
        text_config={
            "model_type": "qwen2",
            "vocab_size": len(tokenizer),
            "hidden_size": WIDTH,
            "intermediate_size": 4 * WIDTH,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": HEADS,
            "max_position_embeddings": 64,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=FEATURE_GRID**2,
    )
    model = FastVlmForConditionalGeneration(config)
    prefix = "visual.trunk."
    tower = {k.removeprefix(prefix): v for k, v in load_file(clip).items() if k.startswith(prefix)}
    model.model.vision_tower.timm_model.load_state_dict(tower)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def train(shards: Sequence[Path], clip: Path, out: Path, steps: int, seed: int = 0) -> None:
    """Trains the captioner and saves it to `out`, which appears only when it is complete.

    Args:
        shards: the pretraining shards.
        clip: the pretrained CLIP's weights (safetensors).
        out: the captioner's folder.
        steps: training steps.
        seed: of weights and order.
    """
    import torch
    from torch.nn import functional
    from transformers.utils import logging

    logging.disable_progress_bar()
    if (out / "config.json").is_file():
        print(f"{out} is complete")
        return
    torch.manual_seed(seed)
    images, texts, image_of = read_pairs(shards)
    tokenizer = train_tokenizer(texts)
    tokens = [[*ids[: MAX_TOKENS - 1], tokenizer.eos_token_id] for ids in tokenizer(texts).input_ids]
    model = build_model(tokenizer, clip).eval()
    model.model.vision_tower.requires_grad_(False)
    with torch.inference_mode():
        maps = [model.model.vision_tower(block).last_hidden_state for block in images.split(256)]
    features = torch.cat(maps).flatten(2).transpose(1, 2).clone()  # [N, 4, 512]

    learned = [*model.model.multi_modal_projector.parameters(), *model.model.language_model.parameters()]
    learned += list(model.lm_head.parameters())
    optimizer = torch.optim.AdamW(learned, lr=LEARNING_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    passes = steps * BATCH_SIZE // len(texts) + 1
    order = torch.cat([torch.randperm(len(texts)) for _ in range(passes)])
    embed = model.get_input_embeddings()
    with bar(iterable=range(steps), desc="train captioner", unit="step") as shown:
        for step in shown:
            batch = order[step * BATCH_SIZE : (step + 1) * BATCH_SIZE]
            rows = [torch.tensor(tokens[i]) for i in batch.tolist()]
            target = torch.nn.utils.rnn.pad_sequence(
                rows, batch_first=True, padding_value=tokenizer.pad_token_id
            )
            seen = functional.dropout(features[image_of[batch]], DROPOUT)
            prefix = model.model.multi_modal_projector(seen)
            hidden = model.model.language_model(
                inputs_embeds=torch.cat([prefix, embed(target[:, :-1])], dim=1)
            )
            # The last image token predicts the first word, each word the next one.
            logits = model.lm_head(hidden.last_hidden_state[:, prefix.shape[1] - 1 :])
            loss = functional.cross_entropy(
                logits.flatten(0, 1), target.flatten(), ignore_index=tokenizer.pad_token_id
            )
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(learned, 1.0)
            optimizer.step()
            schedule.step()
            shown.set_postfix(loss=f"{loss.item():.2f}")
    save(model, tokenizer, out)


def save(model: Any, tokenizer: Any, out: Path) -> None:
    """Saves model and processor; the folder appears under its name when it is complete."""
    from transformers import LlavaProcessor, ViTImageProcessor

    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    processor = LlavaProcessor(
        image_processor=ViTImageProcessor(size=size, resample=3, image_mean=[0.5] * 3, image_std=[0.5] * 3),
        tokenizer=tokenizer,
        patch_size=IMAGE_SIZE // FEATURE_GRID,
        vision_feature_select_strategy="full",
        image_token=IMAGE_TOKEN,
    )
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    processor.save_pretrained(temporary)
    temporary.replace(out)


if __name__ == "__main__":
    if len(sys.argv) != 5:
        sys.exit("usage: captioner.py DATA RUN STEPS OUT")
    weights = Path(sys.argv[2]) / "clip" / "open_clip_model.safetensors"
    train(
        sorted(Path(sys.argv[1], "pretraining").glob("*.tar")), weights, Path(sys.argv[4]), int(sys.argv[3])
    )
