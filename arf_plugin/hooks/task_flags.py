"""Flags of open_clip 4 that cannot go with ARF, refused before anything heavy starts."""

from __future__ import annotations

from typing import Any

from open_clip_train.distributed import is_using_distributed

from arf_plugin.config import ArfConfig
from arf_plugin.errors import FlagError

VARIABLE_TEXT = (
    "takes texts of any length: a batch of class prompts, captions and pair texts needs one length for all.\n"
    "Use a model whose text tower has a fixed context length, or train without --arf-* flags."
)
NAFLEX = (
    "makes batches of packed patches, in which the images of task and pairs cannot be told apart.\n"
    "Drop it: images of one size go with ARF."
)


def check_args(args: Any, config: ArfConfig) -> None:
    """Checks what only this form of the trainer knows.

    Args:
        args: The trainer's parsed arguments.
        config: The ARF flags.

    Raises:
        FlagError: A combination that cannot work.
    """
    _check_model(args)
    if args.use_naflex or (args.aug_cfg or {}).get("naflex"):
        raise FlagError(f"{'--use-naflex' if args.use_naflex else '--aug-cfg naflex=True'} {NAFLEX}")
    if args.dataset_type not in ("auto", "webdataset", "csv"):
        raise FlagError(
            f"--dataset-type {args.dataset_type}: ARF trains on images with texts; use webdataset or csv."
        )
    for flag, value, own in (
        ("--text-key", args.text_key, "txt"),
        ("--json-text-key", args.json_text_key, None),
        ("--image-key", args.image_key, "jpg;png;jpeg;webp"),
    ):
        if (value or None) != own:
            raise FlagError(
                f"{flag} {value}: ARF reads task samples as KEY.txt and KEY.(jpg|jpeg|png|webp), where it joins "
                "prompts and captions to them.\nRename the members of the tars, or train without --arf-* flags."
            )
    contrastive = not args.siglip and args.accum_freq == 1
    if args.torchcompile and contrastive and not args.gather_with_grad and is_using_distributed():
        raise FlagError(
            "--torchcompile in several processes: this open_clip compiles its loss with the model, and where features "
            "are gathered without their gradients, compiled gradients are wrong (without the plugin, too).\n"
            "Add --gather-with-grad, or drop --torchcompile."
        )
    for name, given in (("--arf-l2sp", config.l2sp), ("--arf-head", config.head)):
        if given and args.fsdp:
            raise FlagError(
                f"{name} and --fsdp do not go together: the baseline holds whole parameters, which --fsdp splits.\n"
                "Drop one; without --fsdp open_clip trains with DistributedDataParallel."
            )
    if config.teacher == "average" and args.fsdp:
        raise FlagError(
            "--arf-teacher average and --fsdp do not go together: each process would have to gather all weights after "
            "every step.\nUse --arf-teacher start, which is a whole copy of the model in each process, or drop --fsdp."
        )
    if config.saves_steps and args.fsdp and args.fsdp_checkpoint == "sharded":
        raise FlagError(
            "--arf-checkpoint-every and --arf-stop-file do not go together with --fsdp-checkpoint sharded: a step "
            "checkpoint is one file.\nDrop --fsdp-checkpoint sharded; open_clip then saves one file per epoch, too."
        )


def _check_model(args: Any) -> None:
    from open_clip import get_model_config

    model = (
        get_model_config(args.model) or {}
    )  # None for a model that is yet to be fetched: the task is checked then
    name = args.model.lower()
    if args.genlip or args.genlap or "genlip" in name or "genlap" in name:
        raise FlagError(
            f"--model {args.model} generates texts and has no contrastive loss, which ARF applies to its anchors.\n"
            "Use a CLIP or SigLIP model, or train without --arf-* flags."
        )
    if args.naflexclap or "clap" in name or "audio_cfg" in model:
        raise FlagError(
            f"--model {args.model} is a model of audio and text, but anchors are images with texts.\n"
            "Use a CLIP or SigLIP model, or train without --arf-* flags."
        )
    if model.get("text_cfg", {}).get("variable_text"):
        raise FlagError(f"--model {args.model} {VARIABLE_TEXT}")
