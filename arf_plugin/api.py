"""What the commands do, for programs of one's own; `arf_plugin` hands these names on."""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arf_plugin.errors import AnchorSetError, EvaluationError, FlagError

if TYPE_CHECKING:
    import PIL.Image
    import torch

    from arf_plugin.anchors.features import FeatureHeader

_ENDLESS = 2**31  # batches


class AnchorSet:
    """An anchor set on disk, made by `build_anchors`, by ``arf anchors`` or by hand.

    Args:
        path: Folder or fsspec URL.

    Attributes:
        path: The same, as text.
        pair_shards: URLs of the tars of pair anchors, sorted; empty if the set has none.

    Raises:
        AnchorSetError: The set is not finished, or holds neither captions nor pairs.
    """

    def __init__(self, path: str | Path) -> None:
        from arf_plugin.anchors.captions import list_caption_files
        from arf_plugin.anchors.manifest import problems_of
        from arf_plugin.anchors.pairs import list_pair_shards

        self.path = str(path)
        if problems := problems_of(self.path):
            raise AnchorSetError("\n".join(problems))
        self.pair_shards = list_pair_shards(self.path)
        if not self.pair_shards and not list_caption_files(self.path)[1]:
            raise AnchorSetError(
                f"{self.path} holds no captions/*.parquet and no pairs/*.tar. Expected an anchor set, as made by: "
                "arf anchors"
            )

    @functools.cached_property
    def manifest(self) -> dict[str, Any] | None:
        """What ``anchors.json`` says of how the set was made; None for a set made by hand."""
        import fsspec

        from arf_plugin.anchors.manifest import MANIFEST
        from arf_plugin.untrusted import parse_json

        fs, root = fsspec.core.url_to_fs(self.path)
        path = f"{root.rstrip('/')}/{MANIFEST}"
        found: dict[str, Any] | None = None
        if fs.exists(path):
            found = parse_json(fs.cat_file(path), f"{self.path}/{MANIFEST}", AnchorSetError)
        return found

    @functools.cached_property
    def features(self) -> FeatureHeader | None:
        """Which model's features of captions and pairs the set holds, and of how many; None if it has none.

        Raises:
            AnchorSetError: They are not finished, or their header is damaged.
        """
        from arf_plugin.anchors.features import read_header

        return read_header(self.path)

    @functools.cached_property
    def _captions(self) -> Any:
        from arf_plugin.data.captions import open_captions

        return open_captions(self.path)

    def captions_of(self, sample_id: str) -> list[str]:
        """All captions of a task sample; empty if it has none.

        Args:
            sample_id: ``<shard file name without .tar>/<key>``, which `arf_plugin.sample_id` makes, or the image
                path exactly as the CSV has it.

        Raises:
            AnchorSetError: A caption file that cannot be read.
        """
        captions: list[str] = self._captions.get(sample_id) if self._captions is not None else []
        return captions

    def counts(self) -> dict[str, int]:
        """Numbers of ``captions`` and ``pairs``, from the parquet files and the headers of the tars.

        Raises:
            AnchorSetError: A file that cannot be read.
        """
        from arf_plugin.anchors.scan import scan_shard

        scans = [scan_shard(url, AnchorSetError) for url in self.pair_shards]
        pairs = sum(len(scan.keys) - scan.without_text for scan in scans)
        return {"captions": len(self._captions or ()), "pairs": pairs}

    def pairs(self) -> Iterator[tuple[PIL.Image.Image, str]]:
        """Yields image and text of every pair anchor, in the order of the tars.

        Raises:
            AnchorSetError: A tar, an image or a text that cannot be read.
        """
        from arf_plugin.anchors.images import decode_image
        from arf_plugin.anchors.pairs import read_pairs

        for raw in itertools.chain.from_iterable(map(read_pairs, self.pair_shards)):
            try:
                pair = decode_image(raw.image), raw.text.decode("utf-8")
            except (OSError, ValueError) as cause:
                raise AnchorSetError(
                    f"{raw.url}: the pair {raw.key} cannot be read: {cause}.\nSee: arf check --full"
                ) from cause
            yield pair

    def pair_loader(
        self,
        preprocess: Callable[[Any], torch.Tensor],
        tokenizer: Callable[[str], torch.Tensor],
        batch_size: int,
        *,
        workers: int = 0,
        seed: int = 0,
    ) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
        """Batches of pair anchors without end: a shuffled pass over all pairs, then the next one.

        Args:
            preprocess: Image transform: PIL image -> ``[3, H, W]``.
            tokenizer: open_clip's tokenizer: text -> ``[1, L]``, int64.
            batch_size: A, pairs in a batch.
            workers: Processes that load; at most as many as there are shards. 0 loads in this process.
            seed: Of the order.

        Returns:
            An iterable over images ``[A, 3, H, W]`` and tokens ``[A, L]``. Pairs that cannot be decoded are skipped
            with a warning.

        Raises:
            AnchorSetError: There are no pairs, or fewer shards than workers.
        """
        from open_clip_train.data import SharedEpoch

        from arf_plugin.data.pairs import pair_loader

        loader = pair_loader(
            self.pair_shards,
            preprocess=preprocess,
            tokenize=tokenizer,
            batch_size=batch_size,
            num_batches=_ENDLESS,
            workers=workers,
            seed=seed,
            epoch=SharedEpoch(),
        )
        return ((batch["pair_image"], batch["pair_text"]) for batch in loader)


def build_anchors(
    out: str | Path,
    train_data: str,
    *,
    pool: str | None = None,
    captioner: str | None = None,
    model: str | None = None,
    pretrained: str | None = None,
    features: bool = True,
    **flags: Any,
) -> AnchorSet:
    """Builds an anchor set as ``arf anchors`` does, and goes on with one that was begun.

    Args:
        out: The anchor set.
        train_data: Task data: WebDataset tars with braces and ``::``, or a CSV file.
        pool: Tars of image-text pairs; None leaves pair anchors out.
        captioner: Captioner of transformers or open_clip, by name or folder, or a model of the server at
            ``captioner_url``; None leaves caption anchors out.
        model: open_clip model that searches the pool.
        pretrained: Its weights.
        features: Whether the set gets the features of `model`, for losses that compare features.
        **flags: Other flags of ``arf anchors``, with underscores: ``k=20``, ``near_duplicates=0.97``,
            ``device="cuda"``. True gives a flag without a value, a list one with several.

    Returns:
        The finished set. What the command prints goes to standard error.

    Raises:
        FlagError: A flag that ``arf anchors`` does not know, or a value that it refuses.
        ArfError: What the stages raise.
    """
    from arf_plugin.cli.main import build_parser
    from arf_plugin.flags import parsing_errors

    named = {"out": out, "train_data": train_data, "pool": pool, "captioner": captioner, "model": model}
    words: dict[str, Any] = {**named, "pretrained": pretrained, "no_features": not features, **flags}
    argv = ["anchors"]
    for name, value in words.items():
        if value is not None and value is not False:
            values = [] if value is True else value if isinstance(value, (list, tuple)) else [value]
            argv += [f"--{name.replace('_', '-')}", *map(str, values)]
    with parsing_errors():
        args, rest = build_parser().parse_known_args(argv)
    if rest:
        raise FlagError(f"arf anchors knows no {' '.join(rest)}. Its flags: arf anchors --help")
    args.rest, args.argv = [], argv
    with contextlib.redirect_stdout(sys.stderr):
        args.run(args)
    return AnchorSet(out)


def fit(
    images: str | Path | None = None,
    model: str | Path | None = None,
    *,
    config: str | Path | None = None,
    dry_run: bool = False,
    quiet: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """Fine-tunes, measures and reports as ``arf fit`` does, and goes on with a fit that was begun.

    Args:
        images: Images in any form that ``arf data`` reads.
        model: ``NAME@PRETRAINED``, ``local-dir:FOLDER``, ``hf-hub:NAME``, or a checkpoint beside ``arch``.
        config: YAML file with the same names; arguments win.
        dry_run: Looks at the images, and returns the plan.
        quiet: Says nothing; what the command prints goes to standard error otherwise.
        **settings: Other flags of ``arf fit``, with underscores: ``pool="pool/{00..31}.tar"``, ``keep=["held-out"]``,
            ``set={"lr": 1e-5}``.

    Returns:
        What ``results.json`` holds: ``rows`` of scores in percent by name, ``before`` first, ``verdicts``, ``alpha``,
        ``forgot`` in points. The model is in the folder ``out`` (default: ``fit``), as ``best/`` and ``best.pt``.

    Raises:
        ArfError: A setting or an input that cannot be, or a stage that has failed.
    """
    from arf_plugin.cli.fit import prepare

    given = {"images": images, "model": model, **settings}
    made = prepare(
        {name: _plain(value) for name, value in given.items()}, str(config) if config else None, quiet
    )
    return made.plan() if dry_run else made.run()


def _plain(value: Any) -> Any:
    """A setting as a configuration file has it: paths as text."""
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, Path) else value


def evaluate(
    checkpoints: Sequence[str | Path],
    model: str,
    *,
    data: Sequence[str | Path] = (),
    suite: str | Path | None = None,
    data_root: str | Path | None = None,
    split: str = "test",
    pretrained: str | None = None,
    out: str | Path | None = None,
    batch_size: int = 256,
    device: str = "auto",
    workers: int = 2,
) -> list[dict[str, Any]]:
    """Measures checkpoints on held-out sets, as ``arf evaluate`` does.

    Args:
        checkpoints: Weights of `model`; empty for the weights that `pretrained` names.
        model: open_clip's name of the model, ``local-dir:FOLDER`` or ``hf-hub:NAME``.
        data: Sets, or folders of sets: CLIP_benchmark's WebDataset layout, or a folder of images per class.
        suite: In place of `data`: name of a suite, or a YAML file.
        data_root: The folder that the suite's sets are below.
        split: Part of the data.
        pretrained: open_clip's tag or file, where there are no checkpoints.
        out: JSONL file that records are appended to; what it holds is not measured again.
        batch_size: Images per forward pass.
        device: ``auto`` (a GPU if there is one), or torch's name of a device.
        workers: Processes that decode images.

    Returns:
        A record per checkpoint and set, checkpoint by checkpoint. ``record["metrics"]`` has ``top1``, ``top5``,
        ``mean_per_class``, ``macro_f1`` and ``ece``, in percent.

    Raises:
        EvaluationError: Checkpoints or sets that are missing or cannot be evaluated.
    """
    from arf_plugin.evaluation import run
    from arf_plugin.evaluation.candidates import Candidate
    from arf_plugin.evaluation.sets import find_sets
    from arf_plugin.evaluation.sources import find_suite, missing_text
    from arf_plugin.evaluation.suites import load_suite

    if bool(data) == bool(suite) or bool(suite) != bool(data_root):
        raise EvaluationError("Expected either data, or a suite and the data_root that its sets are below.")
    if suite and data_root:
        loaded = load_suite(str(suite))
        found = find_suite(loaded, Path(data_root), split)
        if found.missing:
            raise EvaluationError(missing_text(loaded, found))
        sets, name = found.sets, loaded.name
    else:
        sets, name = [one for folder in data for one in find_sets(Path(folder), split)], None
    return run.evaluate(
        [Path(path) for path in checkpoints] or [Candidate(None)],
        model,
        sets,
        suite=name,
        pretrained=pretrained,
        out=Path(out) if out else None,
        batch_size=batch_size,
        device=device,
        workers=workers,
    )


def interpolate(original: str | Path, tuned: str | Path, out: str | Path, alpha: float = 0.5) -> Path:
    """Averages two checkpoints in weight space (WiSE-FT) and writes the result, as ``arf interpolate`` does.

    Args:
        original: Checkpoint before fine-tuning, or ``MODEL@PRETRAINED`` for weights that open_clip knows.
        tuned: Checkpoint after it.
        out: Checkpoint to write; ``.safetensors`` works, too.
        alpha: 0 is the original, 1 the fine-tuned model.

    Returns:
        `out`.

    Raises:
        EvaluationError: Checkpoints of different architectures, a file that is none, or an alpha outside [0, 1].
    """
    from arf_plugin.evaluation.candidates import find_original
    from arf_plugin.evaluation.merging import interpolate_files

    interpolate_files(find_original(str(original)), Path(tuned), alpha, Path(out))
    return Path(out)


def merge(
    original: str | Path,
    tuned: str | Path | Sequence[str | Path],
    out: str | Path,
    method: str = "stock",
    lines: tuple[float, float] = (0.0, 1.0),
) -> Path:
    """Merges fine-tuned checkpoints and writes the result, as ``arf interpolate --method`` does.

    Args:
        original: Checkpoint before fine-tuning, or ``MODEL@PRETRAINED`` for weights that open_clip knows.
        tuned: Checkpoints after it: two or more for ``stock`` and ``soup``, one for ``lines``.
        out: Checkpoint to write; ``.safetensors`` works, too.
        method: ``stock`` (Model Stock), ``soup`` (the mean) or ``lines`` (LiNeS).
        lines: a and b of LiNeS: the update of layer l of L is scaled by ``a + b (l - 1) / (L - 1)``.

    Returns:
        `out`.

    Raises:
        EvaluationError: Checkpoints of different architectures, all with the same weights, too few or too many for the
            method; a file that is none; a scale outside [0, 1]; for ``lines``, a model whose layers are not known.
    """
    from arf_plugin.evaluation.candidates import find_original
    from arf_plugin.evaluation.checkpoints import open_checkpoint
    from arf_plugin.evaluation.merging import Merge, write_merges
    from arf_plugin.evaluation.sweep import check_ends

    how = Merge(method, lines if method == "lines" else ())
    runs = [Path(path) for path in ((tuned,) if isinstance(tuned, (str, Path)) else tuned)]
    start = find_original(str(original))
    check_ends(how, start, runs)
    write_merges(open_checkpoint(start), [open_checkpoint(path) for path in runs], {Path(out): how})
    return Path(out)
