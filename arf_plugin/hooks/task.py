"""open_clip 4: main.py builds a task (model and loss in one), batches are dictionaries, an epoch takes a state.

The one module that knows of that form; the rest of the plugin sees what it always sees. open_clip makes the task before
the data, so the task gets its loss when the data is there and the sizes of a batch are known.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from open_clip_train.distributed import is_using_distributed

from arf_plugin.config import ArfConfig
from arf_plugin.data.batch import DeviceConcat, as_dictionary
from arf_plugin.errors import FlagError, IncompatibleUpstreamError
from arf_plugin.hooks.data import data_in_form
from arf_plugin.hooks.loss import build_loss
from arf_plugin.hooks.session import Session, Training, listening
from arf_plugin.trainer_args import TaskTrainerArgs

# Their loss takes what the model returns, so the anchored loss can take its place.
TASKS = ("CLIPTask", "SigLIPTask", "DistillCLIPTask")

VARIABLE_TEXT = (
    "takes texts of any length: a batch of class prompts, captions and pair texts needs one length for all.\n"
    "Use a model whose text tower has a fixed context length, or train without --arf-* flags."
)


def check_args(args: TaskTrainerArgs, config: ArfConfig) -> None:
    """Checks what only this form of the trainer knows, before anything heavy starts.

    Raises:
        FlagError: A combination that cannot work.
    """
    _check_model(args)
    if args.use_naflex or (args.aug_cfg or {}).get("naflex"):
        raise FlagError(
            f"{'--use-naflex' if args.use_naflex else '--aug-cfg naflex=True'} makes batches of packed patches, in "
            "which the images of task and pairs cannot be told apart.\nDrop it: images of one size go with ARF."
        )
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
    whole = (
        "the baseline holds whole parameters, which --fsdp splits.\n"
        "Drop one; without --fsdp open_clip trains with DistributedDataParallel."
    )
    for given, problem in (
        (config.l2sp, f"--arf-l2sp and --fsdp do not go together: {whole}"),
        (config.head, f"--arf-head and --fsdp do not go together: {whole}"),
        (
            config.teacher == "average",
            "--arf-teacher average and --fsdp do not go together: each process would have to gather all weights after "
            "every step.\nUse --arf-teacher start, which is a whole copy of the model in each process, or drop --fsdp.",
        ),
        (
            config.saves_steps and args.fsdp_checkpoint == "sharded",
            "--arf-checkpoint-every and --arf-stop-file do not go together with --fsdp-checkpoint sharded: a step "
            "checkpoint is one file.\nDrop --fsdp-checkpoint sharded; open_clip then saves one file per epoch, too.",
        ),
    ):
        if args.fsdp and given:
            raise FlagError(problem)


def _check_model(args: TaskTrainerArgs) -> None:
    from open_clip import get_model_config

    # None for a model that is yet to be fetched: the task is checked then.
    model = get_model_config(args.model) or {}
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


def create_task(original: Callable[..., Any], session: Session) -> Callable[..., Any]:
    """Builds open_clip's own task, and lets it prepare batches with anchors in them."""

    @functools.wraps(original)
    def wrapped(args: TaskTrainerArgs, *rest: Any, **named: Any) -> Any:
        if getattr(args, "variable_text", False):
            raise FlagError(f"--model {args.model} {VARIABLE_TEXT}")
        task = original(args, *rest, **named)
        if type(task).__name__ not in TASKS:
            raise _unknown(f"a task of type {type(task).__name__}", " or ".join(TASKS))
        task.prepare_batch = functools.partial(_prepare_batch, task.prepare_batch)
        session.task = task
        return task

    return wrapped


def get_data(original: Callable[..., Any], session: Session) -> Callable[..., Any]:
    """Builds data as for the older releases, in batches of this one, and then the task's loss."""
    build = data_in_form(original, session, as_dictionary)

    @functools.wraps(original)
    def wrapped(args: TaskTrainerArgs, preprocess_fns: Any, **named: Any) -> dict[str, Any]:
        if named.pop("naflex_data_config", None) is not None:
            raise _unknown("a NaFlex data policy", "batches of plain images")
        task = session.task
        if task is None:
            raise _unknown("data that is built before the task", "the task first")
        built, own = build(args, preprocess_fns, **named), task.loss
        task.loss = build_loss(lambda: copy.deepcopy(own), session, args)
        return built

    return wrapped


def train_one_epoch(original: Callable[..., None], session: Session) -> Callable[..., None]:
    """Calls the original with what it was called with, between the listeners' two moments."""

    @functools.wraps(original)
    def wrapped(state: Any, batches: Any, args: TaskTrainerArgs, *rest: Any, **named: Any) -> None:
        parts = (state.task.trainable_module, state.optimizer, state.scaler, state.epoch)
        with listening(session, TaskTraining(*parts, args, named.get("tb_writer"), state)):
            original(state, batches, args, *rest, **named)

    return wrapped


@dataclasses.dataclass
class TaskTraining(Training):
    """The same with the trainer's own view of it, which counts steps and samples."""

    args: TaskTrainerArgs
    state: Any

    @property
    def wandb(self) -> Any:
        """The module that ``--report-to wandb``, or ``trackio``, reports to, or None."""
        from open_clip_train.train import get_wandb_backend

        return get_wandb_backend(self.args)

    @property
    def gathers(self) -> bool:
        """With FSDP, each process has a part of the weights."""
        return bool(self.args.fsdp)

    def content(self) -> dict[str, Any]:
        """See `Training.content`."""
        from open_clip.task import save_checkpoint

        counters = {"global_step": self.state.global_step, "samples_seen": self.state.samples_seen}
        content: dict[str, Any] = save_checkpoint(
            self.state.task, self.optimizer, self.epoch, self.scaler, self.args.name, **counters
        )
        return content


def _prepare_batch(
    original: Callable[..., dict[str, Any]], batch: dict[str, Any], *args: Any, **named: Any
) -> Any:
    """Has every part of a batch moved by open_clip, and joins them where they are then."""
    if not any(isinstance(value, DeviceConcat) for value in batch.values()):
        return original(batch, *args, **named)
    return {
        key: value.moved(lambda part, key=key: original({key: part}, *args, **named)[key])
        for key, value in batch.items()
    }


def _unknown(found: str, expected: str) -> IncompatibleUpstreamError:
    return IncompatibleUpstreamError(
        f"open_clip's trainer is not the one that the hooks were written for.\n  found:    {found}\n"
        f"  expected: {expected}\nTraining stops here rather than go on without anchors. Install a tested release "
        "(README.md of arf-plugin lists them), or train without --arf-* flags."
    )
