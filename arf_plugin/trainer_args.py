"""What the plugin reads of open_clip's parsed arguments, by type."""

from __future__ import annotations

from typing import Any, Protocol


class TrainerArgs(Protocol):
    """The trainer's namespace, as far as every supported release of open_clip has it.

    Flags that only some releases have (``fsdp``, ``horovod``, ``trace``, ...) are read with ``getattr`` and a default.
    After `arf_plugin.config.resolve` there is an ``arf_*`` attribute for each field of `ArfConfig` as well.
    """

    # The model and where it starts.
    model: str
    pretrained: str | None
    precision: str
    siglip: bool
    gather_with_grad: bool
    distill_model: str | None
    distill_pretrained: str | None
    # Data.
    train_data: str
    dataset_type: str
    dataset_resampled: bool
    train_data_upsampling_factors: str | None
    train_num_samples: int | None
    csv_img_key: str
    csv_caption_key: str
    csv_separator: str
    # The run.
    batch_size: int
    accum_freq: int
    workers: int
    epochs: int
    lr: float
    warmup: int
    seed: int
    resume: str | None
    # Where it writes to.
    name: str
    logs: str
    save_logs: bool
    save_most_recent: bool
    save_frequency: int
    delete_previous_checkpoint: bool
    checkpoint_path: str
    tensorboard: bool
    wandb: bool
    remote_sync: str | None
    # The processes.
    device: Any
    distributed: bool
    rank: int
    local_rank: int
    world_size: int


class TaskTrainerArgs(TrainerArgs, Protocol):
    """What open_clip 4 has beside it, as far as its own checks read it."""

    text_key: str
    json_text_key: str | None
    image_key: str
    use_naflex: bool
    aug_cfg: dict[str, Any] | None
    genlip: bool
    genlap: bool
    naflexclap: bool
    torchcompile: bool
    fsdp: bool
    fsdp_checkpoint: str
