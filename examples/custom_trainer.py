"""Robust fine-tuning in a plain PyTorch loop, without open_clip's trainer: class prompts, captions and pairs.

    python examples/custom_trainer.py --train-data task --anchors ANCHORS --classnames classnames.txt \
        --model ViT-B-16-quickgelu --pretrained openai --out tuned.pt

`task` holds WebDataset tars of KEY.jpg and KEY.cls, ANCHORS an anchor set with captions and pairs (`arf anchors`).
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

import open_clip
import torch
import webdataset as wds

import arf_plugin


def main(argv: Sequence[str] | None = None) -> list[dict[str, float]]:
    """Trains; returns the terms of the loss at every step."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train-data", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--anchors", required=True, metavar="ANCHORS")
    parser.add_argument("--classnames", type=Path, required=True, metavar="FILE")
    parser.add_argument("--model", default="ViT-B-16-quickgelu")
    parser.add_argument("--pretrained", default=None)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("tuned.pt"))
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)

    # The model, and how it wants images and texts.
    model, preprocess, _ = open_clip.create_model_and_transforms(args.model, args.pretrained, device=device)
    tokenizer = open_clip.get_tokenizer(args.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.1)

    # Captions are looked up by the id of a task sample; pairs come in batches of their own, without end.
    anchors = arf_plugin.AnchorSet(args.anchors)
    pairs = iter(anchors.pair_loader(preprocess, tokenizer, args.batch_size, seed=args.seed))
    names = args.classnames.read_text(encoding="utf-8").splitlines()

    def with_texts(sample: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Image, class prompt and caption of a task sample."""
        captions = anchors.captions_of(arf_plugin.sample_id(sample["__url__"], sample["__key__"]))
        prompt = f"a photo of a {names[int(sample['cls'])]}."
        caption = rng.choice(captions or [prompt])
        return preprocess(sample["image"].convert("RGB")), tokenizer(prompt)[0], tokenizer(caption)[0]

    shards = sorted(map(str, args.train_data.glob("*.tar")))
    task = wds.WebDataset(shards, shardshuffle=False).shuffle(2000, rng=rng).decode("pil")
    task = task.rename(image="jpg;jpeg;png;webp")
    task = task.map(with_texts).batched(args.batch_size, partial=False)

    # One loss per term, each the one that you would train with anyway; the step tells it what is in a batch.
    step = arf_plugin.OptimizerStep()
    loss = arf_plugin.AnchoredLoss(open_clip.ClipLoss, step, caption_weight=1.0, pair_weight=1.0)

    history = []
    model.train()
    for epoch in range(args.epochs):
        for images, prompts, captions in task:
            pair_images, pair_texts = next(pairs)
            batch = {"image": images, "text": prompts, "caption_text": captions}
            step.note(0, {**batch, "pair_image": pair_images, "pair_text": pair_texts})
            # One forward pass for everything: images [x; x_a], texts [t_cls; t_cap; t_a].
            image_features, text_features, logit_scale = model(
                torch.cat([images, pair_images]).to(device),
                torch.cat([prompts, captions, pair_texts]).to(device),
            )[:3]
            terms = loss(
                image_features=image_features,
                text_features=text_features,
                logit_scale=logit_scale,
                output_dict=True,
            )
            optimizer.zero_grad()
            sum(terms.values()).backward()
            optimizer.step()
            with torch.no_grad():  # as CLIP does
                model.logit_scale.clamp_(0, 4.6052)
            history.append({name: value.item() for name, value in terms.items()})
        print(f"epoch {epoch}:", {name: round(value, 3) for name, value in history[-1].items()})
    torch.save(model.state_dict(), args.out)
    return history


if __name__ == "__main__":
    main()
