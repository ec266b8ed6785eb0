"""What is evaluated: checkpoints of one model, mixtures of two of them, and models as open_clip builds them."""

from __future__ import annotations

import functools
import hashlib
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arf_plugin.errors import ArfError, EvaluationError
from arf_plugin.evaluation.checkpoints import BIG_VISION, fitted, load_into, open_checkpoint, write_weights
from arf_plugin.evaluation.head import Head, split_head
from arf_plugin.evaluation.merging import Merge, align_all, merge
from arf_plugin.evaluation.run_settings import Run, Settings, find_run, resolve
from arf_plugin.files import cache_folder, digest, file_digest, stat_key
from arf_plugin.safe_loading import first_line, safe_loading

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Candidate:
    """A checkpoint, its WiSE-FT mixture with another one, or several merged."""

    checkpoint: Path | None  # the (fine-tuned) weights; None for those that come with the model
    original: Path | None = None  # the weights before fine-tuning, of a mixture or a merge
    alpha: float | None = None  # share of `checkpoint` in the mixture, 0 to 1
    name: str | None = (
        None  # what records call the checkpoint; its path if None, and what is merged of which paths
    )
    original_name: str | None = None  # what records call the original; its path if None
    merge: Merge | None = None  # how else weights are made of `checkpoint`, the others and the original
    others: tuple[Path, ...] = ()  # further fine-tuned weights, of a merge

    def __post_init__(self) -> None:
        how = self.how
        needs_original = how is not None and how.method != "soup"
        if (
            (self.merge and self.alpha is not None)
            or (how and self.checkpoint is None)
            or (needs_original if self.original is None else how is None)
        ):
            raise EvaluationError(
                "A mixture has an alpha, a merge has a method; both need checkpoints, and all but a soup the original."
            )
        if how is not None:
            how.check_count(len(self.runs))

    @property
    def how(self) -> Merge | None:
        """How weights are made of several; None for a checkpoint as it is."""
        return self.merge if self.alpha is None else Merge("wise", (self.alpha,))

    @property
    def runs(self) -> tuple[Path, ...]:
        """The fine-tuned checkpoints."""
        return () if self.checkpoint is None else (self.checkpoint, *self.others)

    @property
    def title(self) -> str:
        """What records call the checkpoint."""
        merged = f"{self.merge} of {', '.join(map(str, self.runs))}" if self.merge else str(self.checkpoint)
        return self.name or merged

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
            return known_digest(self.checkpoint)
        return digest([str(self.merge), *map(known_digest, self.runs)])

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
        """Loads the weights into a model of the architecture; returns the linear head that comes with them, if any.

        Raises:
            EvaluationError: if they are of another architecture, or no weights at all.
        """
        how = self.how
        if self.checkpoint is None:
            return None
        if how is None:
            return load_into(model, self.checkpoint)
        runs = [open_checkpoint(path) for path in self.runs]
        original = None if self.original is None or how.method == "soup" else open_checkpoint(self.original)
        made = merge(how, [run.weights for run in runs], align_all(runs, original))
        weights, head = split_head(made)
        try:
            model.load_state_dict(fitted(model, weights, self.checkpoint))
        except EvaluationError as error:
            raise EvaluationError(
                f"--model and {self.checkpoint} are of different architectures: {error}"
            ) from error
        return head


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
            options = {**settings.arguments(), **named, **weights, "device": device}
            built, _, preprocess = open_clip.create_model_and_transforms(
                model, pretrained=None if file else pretrained, **options
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


def known_digest(path: Path | None) -> str | None:
    """SHA-256 of a file. The original of a sweep is in many mixtures; it is read once, unless it has changed."""
    return None if path is None else _digest_of(path, *stat_key(path))


@functools.lru_cache(maxsize=256)
def _digest_of(path: Path, *stat: int) -> str:
    return file_digest(path)
