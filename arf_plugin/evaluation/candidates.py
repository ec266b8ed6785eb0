"""What is evaluated: checkpoints of one model, mixtures of two of them, and models as open_clip builds them."""

from __future__ import annotations

import copy
import functools
import hashlib
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arf_plugin.errors import ArfError, EvaluationError
from arf_plugin.evaluation.checkpoints import BIG_VISION, load_into, open_checkpoint, write_weights
from arf_plugin.evaluation.head import Head
from arf_plugin.evaluation.interpolation import check_alpha, load_made, load_mixture
from arf_plugin.evaluation.merging import Merge, merge_checkpoints
from arf_plugin.evaluation.run_settings import Run, Settings, find_run, resolve
from arf_plugin.files import cache_folder, digest, file_digest
from arf_plugin.safe_loading import first_line, safe_loading

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Candidate:
    """A checkpoint, its WiSE-FT mixture with another one, or several merged.

    Attributes:
        checkpoint: the (fine-tuned) weights; None for those that come with the model.
        original: the weights before fine-tuning, of a mixture or a merge.
        alpha: share of `checkpoint` in the mixture, 0 to 1.
        name: what records call the checkpoint; its path if None, and what is merged of which paths.
        original_name: what records call the original; its path if None.
        merge: how weights are made of `checkpoint`, the others and the original.
        others: further fine-tuned weights, of a merge.
    """

    checkpoint: Path | None
    original: Path | None = None
    alpha: float | None = None
    name: str | None = None
    original_name: str | None = None
    merge: Merge | None = None
    others: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        if self.merge is not None:
            lacking = self.original is None and self.merge.method != "soup"
            if self.checkpoint is None or self.alpha is not None or lacking:
                raise EvaluationError(
                    "A merge needs checkpoints, and all but a soup the original; it has no alpha."
                )
            self.merge.check_count(1 + len(self.others))
        elif (self.original is None) != (self.alpha is None) or (self.original and not self.checkpoint):
            raise EvaluationError("A mixture needs two checkpoints and an alpha.")
        if self.alpha is not None:
            check_alpha(self.alpha)

    @property
    def runs(self) -> tuple[Path, ...]:
        """The fine-tuned checkpoints."""
        return () if self.checkpoint is None else (self.checkpoint, *self.others)

    @property
    def title(self) -> str:
        """What records call the checkpoint."""
        return self.name or (self.merge.title(self.runs) if self.merge else str(self.checkpoint))

    def check(self) -> None:
        """Raises an EvaluationError if a file is missing."""
        for path in (*self.runs, self.original):
            if path is not None and not path.is_file():
                raise EvaluationError(
                    f"There is no checkpoint at {path}. Expected a .pt or .safetensors file."
                )

    def digest(self) -> str | None:
        """SHA-256 of the checkpoint's file; of a merge, over the method and the files' digests."""
        if self.merge is None:
            return _digest(self.checkpoint)
        return digest([str(self.merge), *self.run_digests()])

    def run_digests(self) -> list[str | None]:
        """SHA-256 of each fine-tuned checkpoint's file."""
        return [_digest(path) for path in self.runs]

    def original_digest(self) -> str | None:
        """SHA-256 of the original's file."""
        return _digest(self.original)

    def resolve(
        self, model: str, flags: Settings, pretrained: str | None = None
    ) -> tuple[Settings, Run | None]:
        """How it is to be measured; see :func:`arf_plugin.evaluation.run_settings.resolve`.

        Of a mixture the fine-tuned end tells, whose run went on from the other; of a merge the first run.
        """
        if self.checkpoint is None:
            path = weights_file(model, pretrained)
            return (flags, None) if path is None else resolve(path, _told(path), model, flags)
        found, run = resolve(self.checkpoint, _told(self.checkpoint), model, flags, pretrained)
        for path in (self.original, *self.others) if run is not None else ():
            other = None if path is None else find_run(path, _told(path), flags)
            if other is not None and run is not None and other.settings.given() != run.settings.given():
                warnings.warn(
                    f"{path} was trained with {other.settings.flags() or 'the default settings'} "
                    f"({other.source}), and is measured and mixed as {self.checkpoint} was trained: "
                    f"{found.flags() or 'the default settings'}.",
                    stacklevel=2,
                )
        return found, run

    def load(self, model: torch.nn.Module) -> Head | None:
        """Loads the weights into a model of the architecture.

        Returns:
            The linear head that comes with them, if any.

        Raises:
            EvaluationError: if they are of another architecture, or no weights at all.
        """
        if self.checkpoint is None:
            return None
        if self.merge is not None:
            original = None if self.original is None else open_checkpoint(self.original)
            made = merge_checkpoints(self.merge, [open_checkpoint(path) for path in self.runs], original)
            return load_made(model, made, self.checkpoint)
        if self.original is None or self.alpha is None:
            return load_into(model, self.checkpoint)
        return load_mixture(
            model, open_checkpoint(self.original), open_checkpoint(self.checkpoint), self.alpha
        )


def weights_file(model: str, pretrained: str | None) -> Path | None:
    """The file that ``--pretrained`` names; None if it is one of open_clip's names."""
    if not pretrained or model.startswith(("local-dir:", "hf-hub:")):
        return None
    from open_clip.pretrained import get_pretrained_cfg

    named = get_pretrained_cfg(model.replace("/", "-"), pretrained)
    return Path(pretrained) if not named and Path(pretrained).is_file() else None


def build(
    model: str,
    pretrained: str | None,
    device: torch.device,
    *,
    own_weights: bool = False,
    settings: Settings | None = None,
    cache_dir: str | None = None,
) -> tuple[torch.nn.Module, Any, Any]:
    """Builds a model by open_clip, in evaluation mode. Nothing in files of weights is executed.

    Args:
        model: open_clip model name, ``local-dir:`` folder or ``hf-hub:`` name.
        pretrained: open_clip tag or file; a head in the file is left out.
        device: where to.
        own_weights: whether the model is to be evaluated with these weights; open_clip takes random ones where it
            finds none.
        settings: how it is to see images and texts, where the model's configuration says otherwise.
        cache_dir: where open_clip keeps what it downloads.

    Returns:
        The model, its preprocessing for evaluation, and its tokenizer.

    Raises:
        EvaluationError: if open_clip cannot.
    """
    import open_clip

    located = model.startswith(("local-dir:", "hf-hub:"))
    if located and pretrained:  # open_clip would ignore it
        raise EvaluationError(
            f"{model} has weights of its own, which open_clip takes whatever --pretrained says ({pretrained}). "
            "Name a checkpoint without --pretrained."
        )
    if own_weights and not located and not pretrained:
        raise EvaluationError(
            f"There is nothing to evaluate: {model!r} is an architecture. Name checkpoints, or --pretrained."
        )
    settings = settings or Settings()
    file = weights_file(model, pretrained)
    named: dict[str, Any] = {"cache_dir": cache_dir} if cache_dir else {}
    # With a file, all weights come from it.
    weights = {"require_pretrained": True} if own_weights and file is None else {"pretrained_hf": False}
    texts = {"context_length": settings.force_context_length} if settings.force_context_length else {}
    try:
        with safe_loading():
            built, _, preprocess = open_clip.create_model_and_transforms(
                model,
                pretrained=None if file else pretrained,
                device=device,
                **settings.arguments(),
                **named,
                **weights,
            )
            tokenizer = open_clip.get_tokenizer(model, **texts, **named)
    except ArfError:
        raise
    except Exception as cause:  # open_clip raises many kinds for names, files and downloads
        flags = f" with {settings.flags()}" if settings.flags() else ""
        raise EvaluationError(
            f"open_clip cannot load the model {model!r} ({pretrained!r}){flags}: {first_line(cause)}"
        ) from cause
    if file is not None:
        load_into(built, file)
    return built.eval(), preprocess, tokenizer


def find_original(text: str) -> Path:
    """Finds the model before fine-tuning by its path, or by ``MODEL@PRETRAINED`` as open_clip calls it.

    Named weights are loaded by open_clip once and kept as a file in the cache folder.

    Args:
        text: a path, or for example ``ViT-B-16-quickgelu@openai``.

    Returns:
        The path of a checkpoint.

    Raises:
        EvaluationError: if there is no such file, or open_clip does not know the name.
    """
    path = Path(text)
    if path.is_file():
        return path
    model, at, pretrained = text.rpartition("@")
    if not at or not model or not pretrained:
        raise EvaluationError(
            f"There is no checkpoint at {text}. Expected a .pt or .safetensors file, or MODEL@PRETRAINED "
            "for weights that open_clip knows, such as ViT-B-16-quickgelu@openai."
        )
    if ":" in model:  # open_clip ignores a tag then, and takes random weights where it finds none
        raise EvaluationError(
            f"{text}: the weights of {model.split(':')[0]}: models have no tag. Name their file instead, such as "
            "FOLDER/open_clip_model.safetensors."
        )
    import open_clip
    import torch

    identity = file_digest(Path(pretrained)) if Path(pretrained).is_file() else pretrained
    path = cache_folder() / "originals" / f"{digest([model, identity, open_clip.__version__])[:32]}.pt"
    if path.exists():
        return path
    try:
        weights = build(model, pretrained, torch.device("cpu"), own_weights=True)[0].state_dict()
    except EvaluationError as cause:
        raise EvaluationError(
            f"open_clip cannot load {model}@{pretrained}: {cause}\nIts list: python -c "
            "'import open_clip; print(*open_clip.list_pretrained(), sep=\"\\n\")'"
        ) from cause
    write_weights(path, weights, text)
    return path


def _told(path: Path) -> Any:
    """What a checkpoint tells of its run."""
    return None if path.suffix in BIG_VISION else open_checkpoint(path).run


def weights_digest(model: torch.nn.Module) -> str:
    """SHA-256 over the names and values of a model's weights, for those that come without a file."""
    import torch

    sha = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        sha.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def load_all(
    candidates: Sequence[Candidate], model: torch.nn.Module
) -> list[tuple[torch.nn.Module, Head | None]]:
    """A model per candidate; the last one takes the given model's own memory."""
    loaded = []
    for number, candidate in enumerate(candidates):
        own = model if number == len(candidates) - 1 else copy.deepcopy(model)
        loaded.append((own, candidate.load(own)))
    return loaded


def how_many_fit(model: torch.nn.Module, device: torch.device, processes: int) -> int:
    """How many copies of a model fit in half of the memory that is free, at least one."""
    import torch

    size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _free_memory() // processes
    return max(1, int(free / 2 / max(size, 1)))


def _free_memory() -> int:
    """Bytes of main memory that can be had without swapping."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # no Linux
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _digest(path: Path | None) -> str | None:
    if path is None:
        return None
    status = path.stat()
    return _digest_of(path, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=256)
def _digest_of(path: Path, modified: int, size: int) -> str:
    """The original of a sweep is in many mixtures; it is read once, unless it has changed."""
    return file_digest(path)
