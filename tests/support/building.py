"""Small real inputs for anchor building: tars of drawn images, a tiny CLIP and a tiny captioner with random weights."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from support.tars import write_tar

COLOURS = ("red", "green", "blue", "orange", "purple", "black")
SHAPES = ("circle", "square", "cross")

_LAYERS = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}


def drawing(index: int, kind: str = "JPEG", size: int = 32) -> bytes:
    """A shape in a colour, a little different for each index."""
    image = Image.new("RGB", (size, size), "white")
    draw = ImageDraw.Draw(image)
    low, high = 4 + index % 5, size - 4 - index % 7
    colour = COLOURS[index % len(COLOURS)]
    shape = SHAPES[index % len(SHAPES)]
    if shape == "circle":
        draw.ellipse((low, low, high, high), fill=colour)
    elif shape == "square":
        draw.rectangle((low, low, high, high), fill=colour)
    else:
        draw.line((low, low, high, high), fill=colour, width=4)
        draw.line((low, high, high, low), fill=colour, width=4)
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def describe(index: int) -> str:
    return f"a {COLOURS[index % len(COLOURS)]} {SHAPES[index % len(SHAPES)]}"


def write_task(folder: Path, shards: int = 3, per_shard: int = 7) -> str:
    """Task tars with jpg and cls; returns their URL with braces."""
    for shard in range(shards):
        members = []
        for position in range(per_shard):
            index = shard * per_shard + position
            members += [(f"{index:05d}.jpg", drawing(index)), (f"{index:05d}.cls", str(index % 6).encode())]
        write_tar(folder / f"{shard:03d}.tar", members)
    return f"{folder}/{{000..{shards - 1:03d}}}.tar"


def write_pool(folder: Path, shards: int = 4, per_shard: int = 12) -> str:
    """Pool tars with png or jpg, txt and json, keys equal across tars; returns their URL with braces."""
    for shard in range(shards):
        members = []
        for position in range(per_shard):
            index = 1000 + shard * per_shard + position
            kind, ext = (("PNG", "png"), ("JPEG", "jpg"), ("WEBP", "webp"))[index % 3]
            key = f"{position:04d}"
            members += [
                (f"{key}.{ext}", drawing(index, kind, 40)),
                (f"{key}.json", json.dumps({"n": index}).encode()),
                (f"{key}.txt", f"{describe(index)}, number {index}".encode()),
            ]
        write_tar(folder / f"pool-{shard:02d}.tar", members)
    return f"{folder}/pool-{{00..{shards - 1:02d}}}.tar"


def save_tiny_clip(folder: Path, seed: int = 0) -> str:
    """A CLIP with random weights in open_clip's local folder layout; returns its model name."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    model = {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model, "preprocess_cfg": {}}))
    torch.manual_seed(seed)
    weights = {name: value.contiguous() for name, value in open_clip.CLIP(**model).state_dict().items()}
    save_file(weights, str(folder / "open_clip_model.safetensors"))
    return f"local-dir:{folder}"


def save_tiny_coca(folder: Path) -> str:
    """A CoCa with random weights in open_clip's local folder layout; returns its name as a captioner."""
    import torch
    from open_clip.coca_model import CoCa
    from safetensors.torch import save_file

    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    model = {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8,
                       "attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 8,
                       "output_tokens": True},
        "text_cfg": {**text, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {**text, "mlp_ratio": 2, "dim_head": 16, "n_queries": 8, "attn_pooler_heads": 2},
        "custom_text": True,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model, "preprocess_cfg": {}}))
    torch.manual_seed(4)
    built = CoCa(**{name: value for name, value in model.items() if name != "custom_text"})
    for name, value in built.named_parameters():  # CoCa leaves some of its weights uninitialized
        if value.dim() > 1:
            torch.nn.init.normal_(value, std=3 if name == "text_decoder.text_projection" else 0.3)
    weights = {name: value.contiguous() for name, value in built.state_dict().items()}
    save_file(weights, str(folder / "open_clip_model.safetensors"))
    return f"open_clip:local-dir:{folder}"


def save_tiny_captioner(folder: Path) -> str:
    """A VisionEncoderDecoder with random weights and a word-level tokenizer, in the Hugging Face layout."""
    import torch
    from transformers import GPT2Config, VisionEncoderDecoderConfig, VisionEncoderDecoderModel, ViTConfig
    from transformers import ViTImageProcessor as ImageProcessor

    words = save_word_tokenizer(folder)
    encoder = ViTConfig(**_LAYERS, image_size=32, patch_size=8)
    decoder = GPT2Config(
        vocab_size=words, n_positions=32, n_embd=32, n_layer=1, n_head=2, add_cross_attention=True, is_decoder=True,
        bos_token_id=1, eos_token_id=2, initializer_range=0.5,
    )  # fmt: skip
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 1, 0, 2
    torch.manual_seed(1)
    model = VisionEncoderDecoderModel(config)
    generation = model.generation_config
    generation.decoder_start_token_id, generation.pad_token_id, generation.eos_token_id = 1, 0, 2
    generation.suppress_tokens = [0, 1, 3]  # words only
    model.save_pretrained(folder)
    ImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


def save_tiny_blip(folder: Path) -> str:
    """A BLIP captioner with random weights, saved with its joint processor."""
    import torch
    from transformers import (
        AutoTokenizer,
        BlipConfig,
        BlipForConditionalGeneration,
        BlipImageProcessor,
        BlipProcessor,
    )

    words = save_word_tokenizer(folder)
    text = {**_LAYERS, "vocab_size": words, "encoder_hidden_size": 32, "max_position_embeddings": 32,
            "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "sep_token_id": 2}  # fmt: skip
    vision = {**_LAYERS, "image_size": 32, "patch_size": 8}
    torch.manual_seed(2)
    BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision)).save_pretrained(folder)
    processor = BlipImageProcessor(size={"height": 32, "width": 32})
    BlipProcessor(processor, AutoTokenizer.from_pretrained(folder)).save_pretrained(folder)
    return str(folder)


def save_tiny_git(folder: Path) -> str:
    """A GIT captioner with random weights, saved with its joint processor."""
    import torch
    from transformers import AutoTokenizer, CLIPImageProcessor, GitConfig, GitForCausalLM, GitProcessor

    words = save_word_tokenizer(folder)
    vision = {**_LAYERS, "image_size": 32, "patch_size": 8}
    config = GitConfig(
        vision_config=vision, vocab_size=words, max_position_embeddings=32, bos_token_id=1, eos_token_id=2,
        pad_token_id=0, **_LAYERS,
    )  # fmt: skip
    torch.manual_seed(3)
    GitForCausalLM(config).save_pretrained(folder)
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    GitProcessor(processor, AutoTokenizer.from_pretrained(folder)).save_pretrained(folder)
    return str(folder)


def save_tiny_vlm(folder: Path) -> str:
    """A LLaVA with random weights, with a chat template, as servers of chat completions take it."""
    import torch
    from transformers import (
        AutoTokenizer,
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    words = save_word_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    vision = CLIPVisionConfig(**_LAYERS, image_size=32, patch_size=8)
    text = LlamaConfig(**_LAYERS, vocab_size=words + 1, max_position_embeddings=128, initializer_range=0.5,
                       bos_token_id=1, eos_token_id=2, pad_token_id=0)  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=words, vision_feature_layer=-1
    )
    torch.manual_seed(5)
    model = LlavaForConditionalGeneration(config)
    generation = model.generation_config
    generation.bos_token_id, generation.eos_token_id, generation.pad_token_id = 1, 2, 0
    generation.suppress_tokens = [0, 1, 2, 3, words]  # words only
    model.save_pretrained(folder)
    template = (
        "{% for message in messages %}{% for part in message['content'] %}"
        "{{ '<image>' if part['type'] == 'image' else part['text'] }} {% endfor %}{% endfor %}"
    )
    size = {"height": 32, "width": 32}
    LlavaProcessor(
        CLIPImageProcessor(size=size, crop_size=size), tokenizer, patch_size=8, chat_template=template,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)


def save_word_tokenizer(folder: Path) -> int:
    """A tokenizer with one token per word; returns the size of its vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", "a", *COLOURS, *SHAPES, "on", "white"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        cls_token="<s>", sep_token="</s>",
    ).save_pretrained(folder)  # fmt: skip
    return len(words)


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """All files below a folder, locks left out."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.endswith(".lock")
    }


def unit_vectors(rows: int, dimension: int, seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(rows, dimension))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)


def write_embeddings(folder: Path, vectors: np.ndarray, parts: int = 2) -> None:
    """A folder as clip-retrieval inference writes it: keys and captions only."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for name in ("img_emb", "metadata"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for part, chunk in enumerate(np.array_split(np.arange(len(vectors)), parts)):
        np.save(folder / f"img_emb/img_emb_{part}.npy", vectors[chunk])
        table = pa.table({"image_path": [f"{i:05d}" for i in chunk], "caption": ["c"] * len(chunk)})
        pq.write_table(table, folder / f"metadata/metadata_{part}.parquet")
