"""The rules: each looks at one thing and says what it finds. THE list of what is checked before the first step.

Errors stop a run before its first step. A rule that is checked elsewhere, because what it needs is only known there
(the parser, the model, the trainer), is listed here all the same: docs/checks.md is generated from this list.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from arf_plugin.anchors.features import changes_since, require_sound
from arf_plugin.anchors.manifest import problems_of
from arf_plugin.anchors.scan import ShardScan, require_unique_keys
from arf_plugin.anchors.tars import is_remote
from arf_plugin.anchors.task import decodable
from arf_plugin.anchors.task_csv import CLASS_COLUMN
from arf_plugin.checks.inputs import Inputs, Unknown
from arf_plugin.checks.messages import (
    is_class_index,
    missing_caption_message,
    missing_class_message,
    unusable_label_message,
)
from arf_plugin.data.dealing import dealt_shards
from arf_plugin.errors import AnchorSetError, ArfError, MissingCaptionError, TaskDataError

FIRST = "before a run has a folder, `arf check`"
NAMED = 5  # examples of a kind in a message
BUILD = "Build one with `arf anchors`, look at it with `arf check`."
HIGH_RATE = 1e-4  # learning rate above which CLIP is trained from scratch
STRAY_FRACTION = 0.01  # of images that belong to no sample, as of what stages reject by default
DECODED_AT_MOST = 1000  # images without a caption that are decoded to see whether they could have one
LEAST_COSINE, LEAST_COSINE_CAST = 0.999, 0.99  # of features of one model, in 32 and in 16 bits


class Finding(NamedTuple):
    """What a rule has found: an ``error``, a ``warning`` or a ``note``."""

    level: str
    text: str
    error: type[ArfError] = AnchorSetError  # family of an error


@dataclass(frozen=True)
class Rule:
    """A rule: what docs/checks.md says of it, and its check.

    Attributes:
        id, of, checks, happens, where: its name, its input, what is expected, what happens otherwise, and when.
        check: yields what it finds, and raises the error after which it cannot go on; None for what is checked where
            it is known.
        applies: whether there is something to check.
    """

    id: str
    of: str
    checks: str
    happens: str
    where: str = "start of a run, `arf check`"
    check: Callable[[Inputs], Iterator[Finding] | None] | None = None
    applies: Callable[[Inputs], object] = lambda inputs: True


def findings(inputs: Inputs, quick: bool = False) -> Iterator[Finding]:
    """All that the rules find, in their order; ``quick``: those that only see whether inputs are there."""
    for rule in RULES:
        try:
            if quick and rule.where is not FIRST:
                continue
            if rule.check is not None and rule.applies(inputs):
                yield from rule.check(inputs) or ()
        except Unknown:
            continue  # it has been said why
        except ArfError as cause:
            yield Finding("error", str(cause), type(cause))


def _warning(text: str) -> Finding:
    return Finding("warning", text)


def _anchor_set(inputs: Inputs) -> None:
    import fsspec

    assert inputs.anchors is not None
    name = f"--arf-anchors {inputs.anchors}" if inputs.training else inputs.anchors
    try:
        fs, root = fsspec.core.url_to_fs(inputs.anchors)
        is_folder = fs.isdir(root)
        found = "is a file" if not is_folder and fs.exists(root) else "does not exist"
    except (OSError, ImportError, ValueError) as cause:
        raise AnchorSetError(f"{name} cannot be opened: {cause}") from cause
    if not is_folder:
        raise AnchorSetError(
            f"{name} {found}; it is not a folder. Expected one with captions/*.parquet, pairs/*.tar or both.\n{BUILD}"
        )
    weights = {}
    if inputs.caption_files:
        weights["captions/*.parquet"] = inputs.caption_weight
    if inputs.pair_shards:
        weights["pairs/*.tar"] = inputs.pair_weight
    if not weights:
        listed = sorted(path.rsplit("/", 1)[-1] for path in fs.ls(root, detail=False))
        raise AnchorSetError(
            f"{name} is empty: no captions/*.parquet and no pairs/*.tar (found: {', '.join(listed[:8]) or 'nothing'})."
            f"\n{BUILD}"
        )
    if not any(weights.values()):
        raise AnchorSetError(
            f"{name} has {next(iter(weights))} alone, and its weight is 0: no anchors are left."
        )


def _whole(inputs: Inputs) -> Iterator[Finding]:
    weights = {"captions": inputs.caption_weight, "pairs": inputs.pair_weight}
    for problem in problems_of(inputs.anchors or "", [kind for kind, weight in weights.items() if weight]):
        yield Finding("error", problem)


def _pair_workers(inputs: Inputs) -> None:
    run, shards = inputs.need_run(), len(inputs.pair_shards)
    consumers = run.world_size * max(1, run.pair_workers)
    if shards < consumers:
        raise AnchorSetError(
            f"{shards} pair shards for {consumers} loader workers ({run.world_size} processes x "
            f"{max(1, run.pair_workers)}); expected at least one shard each.\n"
            f"Use --arf-workers {max(1, shards // run.world_size)}"
            f"{' and fewer processes' if shards < run.world_size else ''}, "
            "or write smaller shards with: arf pack --shard-size ..."
        )


def _task_workers(inputs: Inputs) -> None:
    run, shards = inputs.need_run(), len(inputs.task_urls)
    if shards < run.consumers:
        raise TaskDataError(
            f"{shards} task shards for {run.consumers} loader workers ({run.world_size} processes x "
            f"{max(1, run.task_workers)} of --workers {run.workers}); expected at least one shard each.\n"
            "Lower --workers, split the shards, or use --dataset-resampled."
        )


def _captions(inputs: Inputs) -> Iterator[Finding]:
    captions = inputs.captions
    if not len(captions):
        raise AnchorSetError(
            f"The {len(inputs.caption_files)} files in {inputs.anchors}/captions hold no rows. Build them with: "
            "arf caption"
        )
    if not inputs.training and captions.repeated:
        yield _warning(f"{captions.repeated} captions repeat another one of the same sample")


def _task_files(inputs: Inputs) -> None:
    _ = inputs.task_files


def _task_data(inputs: Inputs) -> Iterator[Finding]:
    if inputs.remote_task:
        yield _warning(
            "the task data is remote, so its ids are not checked before the first step; see `arf check`. With "
            "--arf-classnames, samples without 'cls' would train on their own 'txt'."
        )
    elif inputs.task.without_image:
        without = inputs.task.without_image
        yield _warning(
            f"{len(without)} task samples have no image, the first being {without[0]}; training passes over them"
        )


def _task_images(inputs: Inputs) -> Iterator[Finding]:
    unreadable = list(inputs.task.unreadable.items())
    if unreadable:  # a run's log gets the first alone
        yield _warning(
            f"{len(unreadable)} of {len(inputs.task.ids)} task images are unreadable and will be skipped, first: "
            f"{_named(unreadable[: 1 if inputs.training else NAMED])}"
        )


def _csv_images(inputs: Inputs) -> None:
    unreadable = list(inputs.task.unreadable.items())
    if unreadable:
        raise TaskDataError(
            f"{len(unreadable)} of {len(set(inputs.task.ids))} image files of {inputs.train_data} are missing or "
            f"unreadable, first: {_named(unreadable[:NAMED])}.\n"
            "open_clip's reader of CSVs would stop at the first one, hours later. Paths are read as they stand, from "
            "the folder that training is started in; correct them, or remove the rows."
        )


def _named(unreadable: list[tuple[str, str]]) -> str:
    return "; ".join(f"{name} {reason}" for name, reason in unreadable)


def _texts(inputs: Inputs) -> Iterator[Finding]:
    if inputs.csv:
        if inputs.texts_known:
            _require_csv_texts(inputs)
        return
    task, total = inputs.task, len(inputs.task.ids)
    if not inputs.texts_known:
        if task.without_text and task.without_class:
            yield _warning(
                f"{task.without_text} task samples have no txt and {task.without_class} no cls: training needs txt, "
                "or cls with --arf-classnames"
            )
    elif inputs.classes is not None:
        if task.without_class:
            yield from _mixture(inputs)
    elif task.without_text == total:
        have_classes = task.without_class < total
        hint = (
            "they have 'cls': give --arf-classnames FILE"
            if have_classes
            else "write KEY.txt beside each image"
        )
        raise TaskDataError(f"No task sample has a 'txt', so there is no text to train on; {hint}.")
    elif task.without_text:
        yield _warning(f"{task.without_text} of {total} task samples have no 'txt'; open_clip skips them.")


def _mixture(inputs: Inputs) -> Iterator[Finding]:
    """Some samples have no class: plain mixing if they have a text and all their shard is like them."""
    task, total = inputs.task, len(inputs.task.ids)
    if inputs.head or task.without_class == total:
        flag = "--arf-head" if inputs.head else "--arf-classnames"
        raise TaskDataError(
            f"{task.without_class} of {total} task samples have no 'cls', which {flag} needs.\n"
            "Write the class index beside each image (KEY.cls), or drop the flag."
        )
    if len(task.without_both) > STRAY_FRACTION * total:
        raise TaskDataError(missing_class_message(task.without_both[0], len(task.without_both)))
    if task.without_both:
        yield _warning(
            f"{len(task.without_both)} of {total} images have neither 'cls' nor 'txt' (first: {task.without_both[0]}); "
            "open_clip skips them."
        )
    if task.without_class == len(task.without_both):
        return
    yield Finding(
        "note",
        f"plain mixing: {total - task.without_class} task samples have a class and get class prompts, "
        f"{task.without_class} have none and keep their own text.",
    )
    if task.mixed_shards:
        yield _warning(
            f"{len(task.mixed_shards)} shards hold samples of both kinds, first: {task.mixed_shards[0]}. Mixed data "
            "has shards of its own as a rule; did some samples lose their 'cls'?"
        )


def _require_csv_texts(inputs: Inputs) -> None:
    frame, by_class = inputs.frame, inputs.classes is not None
    column = CLASS_COLUMN if by_class else inputs.csv_caption_key
    if column not in frame:
        raise TaskDataError(
            f"{inputs.train_data} has no column '{column}' (found: {', '.join(map(str, frame.columns))}), which "
            f"{'--arf-classnames' if by_class else 'training'} needs. Add it"
            f"{'' if by_class else ', or name another with --csv-caption-key'}."
        )
    empty = frame[column].isna().to_numpy().nonzero()[0]
    if len(empty):
        raise TaskDataError(
            f"{inputs.train_data}, row {empty[0] + 1}: column '{column}' is empty ({len(empty)} rows are); open_clip "
            "would train on the text 'nan'. Fill it in or remove the row."
        )


def _labels(inputs: Inputs) -> Iterator[Finding]:
    classes, labels = len(inputs.classes or ()), inputs.task.labels
    wrong = {label: found for label, found in labels.items() if not is_class_index(label, classes)}
    if wrong:
        from_one = classes > 1 and set(labels) == {str(number) for number in range(1, classes + 1)}
        label, (_, first) = next(iter(wrong.items()))
        total = sum(count for count, _ in wrong.values())
        raise TaskDataError(unusable_label_message(first, label, classes, total, from_one))
    if labels and len(labels) <= classes // 2:
        yield _warning(
            f"the task data has samples of {len(labels)} classes, {classes} class names were given. Are they those of "
            "this data?"
        )


def _coverage(inputs: Inputs) -> Iterator[Finding]:
    task, captions = inputs.task, inputs.captions
    missing, total = inputs.without_caption, len(inputs.task.ids)
    covered = total - len(missing)
    if not covered:
        raise AnchorSetError(
            f"The captions of {inputs.anchors} cover none of the {total} task samples.\n"
            f"  task samples are called like {task.ids[0]!r}, captions like {captions.example_id!r}\n"
            "An id is <shard file name without .tar>/<key>, or the CSV's image path. Were the captions made from other "
            "data, or were shards renamed? Compare them with `arf check`."
        )
    # Training skips unreadable images, and no captioner could have described them.
    missing = [identity for identity in missing if identity not in task.unreadable]
    if 0 < len(missing) <= DECODED_AT_MOST and inputs.missing_caption == "error":
        good = set(decodable(inputs.train_data or "", inputs.csv, missing))
        broken = [identity for identity in missing if identity not in good]
        missing = [identity for identity in missing if identity in good]
        if broken:
            yield _warning(
                f"{len(broken)} task images have no caption and cannot be decoded, first: {broken[0]}; training skips "
                "them"
            )
    if missing and inputs.missing_caption == "error":
        raise MissingCaptionError(missing_caption_message(missing, NAMED))
    if missing:
        yield _warning(
            f"{len(missing)} of {total} task samples have no caption (first: {missing[0]}); their class prompt takes "
            "its place."
        )
    unused = captions.samples - covered
    if unused > 0 and not inputs.training:
        yield _warning(f"{unused} samples with captions are not in the task data")


def _batches(inputs: Inputs) -> Iterator[Finding]:
    run, available = inputs.need_run(), inputs.available
    if not available:
        raise TaskDataError(
            f"Training would pass over every sample of {inputs.train_data}: none has a readable image and a text "
            f"({len(inputs.task.ids)} samples with an image)."
        )
    samples = available if inputs.csv or run.samples is None else run.samples
    micro = run.micro_batches(samples, inputs.csv)
    if micro < 1:
        raise TaskDataError(
            f"{inputs.train_data} has {samples} rows, {-(-samples // run.world_size)} for each of {run.world_size} "
            f"processes: less than one batch of --batch-size {run.batch_size}. open_clip would end without a step. "
            f"Lower --batch-size{' or start fewer processes' if run.world_size > 1 else ''}."
        )
    if micro < run.accum_freq:
        raise TaskDataError(
            f"An epoch has {micro} batches per process ({samples} samples, --batch-size {run.batch_size}, "
            f"{run.world_size} processes), fewer than --accum-freq {run.accum_freq}: there would be no step. Lower "
            "one of them."
        )
    if inputs.csv:
        return
    if run.samples is not None and run.samples > 1.5 * available:
        yield _warning(
            f"--train-num-samples {run.samples}, but there are {available} usable samples: an epoch shows each "
            f"{run.samples / available:.2g} times."
        )
    if not run.resampled:
        _require_batches(inputs)


def _require_batches(inputs: Inputs) -> None:
    """A loader worker whose shards hold less than a batch never gives one, and the trainer waits for it for ever."""
    run, usable = inputs.need_run(), inputs.usable()
    for epoch in range(min(run.epochs, 1000)):
        dealt = dealt_shards(len(usable), run.seed, epoch, run.world_size, run.task_workers)
        for consumer, shards in enumerate(dealt or []):
            samples = sum(usable[number] for number in shards)
            if samples < run.batch_size:
                rank, worker = divmod(consumer, max(1, run.task_workers))
                named = ", ".join(inputs.task_urls[number].rsplit("/", 1)[-1] for number in shards[:3])
                raise TaskDataError(
                    f"In epoch {epoch}, loader worker {worker} of process {rank} gets {len(shards)} task shards "
                    f"({named}) with {samples} usable samples, less than a batch of --batch-size {run.batch_size}: "
                    "training would wait for it for ever.\nLower --workers or --batch-size, pack the data into shards "
                    "of equal size, or use --dataset-resampled."
                )


def _pairs(inputs: Inputs) -> Iterator[Finding]:
    if inputs.training and any(map(is_remote, inputs.pair_shards)):
        yield _warning(
            "the pair anchors are remote, so they are not checked before the first step; see `arf check`."
        )
    count, bad, digests = 0, False, list[str]()
    for url, scan in inputs.pairs:
        if not isinstance(scan, ShardScan):
            bad = True
            yield Finding("error", str(scan))
            continue
        count += len(scan.keys)
        digests += scan.digests
        try:
            require_unique_keys(scan, AnchorSetError)
        except AnchorSetError as cause:
            yield Finding("error", str(cause))
        problems = [*scan.unreadable.items(), *scan.bad_texts.items()]
        problems += [(key, "has no image (KEY.jpg, .jpeg, .png or .webp)") for key in scan.without_image]
        for key, reason in problems:
            if key not in scan.repeated:
                bad = True
                yield Finding(
                    "error",
                    f"{url}, pair {key}: {reason}.\nExpected a whole image and a UTF-8 text per pair: remove or "
                    "replace the pair, or run `arf pack` again. `arf check` lists all of them.",
                )
    if inputs.pairs and not count and not bad:
        raise AnchorSetError(
            f"The {len(inputs.pair_shards)} tars in {inputs.anchors}/pairs hold no pair; expected KEY.jpg + KEY.txt. "
            "Build them with: arf pack"
        )
    if repeated := len(digests) - len(set(digests)):
        yield _warning(
            f"{repeated} pairs repeat the image of another pair, so that pairs may be their own negatives"
        )
    batch = inputs.run.pair_batch * inputs.run.world_size if inputs.run is not None else 0
    if len(inputs.pairs) == len(inputs.pair_shards) and count < batch:
        yield _warning(
            f"{count} pairs for batches of {batch}: pairs will meet their own copies as negatives."
        )


def _features(inputs: Inputs) -> Iterator[Finding]:
    anchors = inputs.anchors or ""
    try:
        header = inputs.features
    except AnchorSetError as cause:
        if inputs.by_feature:
            raise
        yield _warning(str(cause))
        return
    if header is None:
        if inputs.by_feature:
            raise AnchorSetError(
                f"{anchors} has no features of its {' and '.join(inputs.by_feature)}, which --arf-pair-loss and "
                f"--arf-caption-loss other than contrastive need.\nWrite those of the model that you fine-tune with: "
                f"arf features {anchors} --model ... --pretrained ..."
            )
        return
    for problem in changes_since(anchors, header, inputs.by_feature or ("captions", "pairs")):
        text = f"features: {problem}. Write them with: arf features {anchors} --model ... --pretrained ..."
        yield Finding("error" if inputs.by_feature else "warning", text)
    if inputs.full:
        require_sound(anchors, header)


def _starting_model(inputs: Inputs) -> None:
    start, header = inputs.starting, inputs.features
    if isinstance(start, ArfError):
        raise start
    assert start is not None
    if header is None:
        raise Unknown("features")
    again = f"Write them with: arf features {inputs.anchors} --model {start.name} --pretrained ... --restart"
    if start.dim and start.dim != header.dim:
        raise AnchorSetError(
            f"The features of {inputs.anchors} have {header.dim} dimensions (of {header.model}), those of {start.name} "
            f"{start.dim}. {again}"
        )
    if start.exact and start.digest != header.weights_sha256:
        raise AnchorSetError(
            f"The features of {inputs.anchors} are those of other weights than training starts from.\n"
            f"  features: {header.model}, SHA-256 {header.weights_sha256[:16]}...\n"
            f"  this run: {start.name}, SHA-256 {start.digest[:16]}...\n{again}"
        )
    bound = LEAST_COSINE if start.exact and header.precision == "float32" else LEAST_COSINE_CAST
    place, cosine = min(start.cosines, key=lambda each: each[1], default=("", 1.0))
    if not cosine >= bound:
        raise AnchorSetError(
            f"{place}: its feature in {inputs.anchors} has a cosine of {cosine:.5f} with what the model gives it now, "
            f"expected at least {bound}. Is it preprocessed in another way, or the model built with other flags "
            f"(--force-quick-gelu, --image-mean, ...)? {again}"
        )


def _schedule(inputs: Inputs) -> Iterator[Finding]:
    run = inputs.need_run()
    lr = run.lr or 0.0
    if run.pretrained and lr > HIGH_RATE:
        yield _warning(
            f"--lr {lr:g} is a rate for training from scratch (open_clip's default is 5e-4), and this run starts from "
            "trained weights, which it may destroy. FLYP and ARF fine-tune CLIP's ViT-B with 1e-5."
        )
    if inputs.remote_task and run.samples is None:
        return
    samples = inputs.available if inputs.csv else run.samples or inputs.available
    steps = run.micro_batches(samples, inputs.csv) // run.accum_freq * run.epochs
    if run.warmup >= steps > 0:
        yield _warning(
            f"--warmup {run.warmup} is not shorter than the run of {steps} steps: the learning rate only rises, to "
            f"{lr * steps / run.warmup:.2g} at most. Give about a tenth of the steps: --warmup {max(1, steps // 10)}."
        )


# fmt: off
RULES = [
    Rule("flags", "command line", "flags that make sense alone, together and with this release of open_clip",
         "error of the parser, with the flags to change", "parser"),
    Rule("class-names", "`--arf-classnames`, `--arf-templates`",
         "UTF-8 lines (a byte-order mark is no part of them), none empty; a place for the class name in every "
         "template", "error with the line", "before a run has a folder, `arf check --arf-classnames`"),
    Rule("watched-sets", "`--arf-watch`", "every set can be read: its classes, counts and images",
         "error; images that do not decode are found by the first look, before the first step", "start of a run"),
    Rule("model", "`--model`, `--pretrained`", "names that open_clip knows, files that are there",
         "error with the name that is nearest", "before a run has a folder"),
    Rule("weights", "`--model`, `--pretrained`",
         "with anchors, every weight comes from a file (or `--arf-random-weights` says that it need not)",
         "error naming the weights that would be random", "once the model is built"),
    Rule("anchor-set", "anchor set",
         "a folder with captions/*.parquet, pairs/*.tar or both, and a weight above 0 for one of them; names are "
         "no patterns, hidden files no shards", "error", FIRST,
         check=_anchor_set, applies=lambda inputs: inputs.anchors is not None),
    Rule("task-files", "task data", "the tars or the CSV are there", "error with what was probably meant", FIRST,
         check=_task_files, applies=lambda inputs: inputs.has_task),
    Rule("whole", "anchors.json",
         "a format that is known; each kind of anchor finished, with the files that its stage has written",
         "error; the same `arf` command finishes the set",
         check=_whole, applies=lambda inputs: inputs.anchors is not None),
    Rule("pair-workers", "pair tars", "a shard for each loader worker of the pairs",
         "error with the number for `--arf-workers`",
         check=_pair_workers, applies=lambda inputs: inputs.run is not None and inputs.has_pairs),
    Rule("task-workers", "task tars",
         "a shard for each loader worker of the task data (but for `--dataset-resampled`)", "error",
         check=_task_workers,
         applies=lambda inputs: inputs.has_task and inputs.run is not None
         and not (inputs.csv or inputs.run.resampled)),
    Rule("captions", "caption files", "parquet with columns `id` and `caption` of non-empty UTF-8 text",
         "error with file and row", check=_captions, applies=lambda inputs: inputs.joins),
    Rule("task-data", "task data",
         "tars or a CSV that can be read to their end, with images; where captions are joined, each id once",
         "error with the place; samples without an image: warning, as open_clip skips them",
         check=_task_data, applies=lambda inputs: inputs.has_task),
    Rule("task-images", "task images in tars", "end as their format does (`--full`: decode)",
         "warning, as open_clip skips them",
         check=_task_images, applies=lambda inputs: inputs.sees_task and not inputs.csv),
    Rule("texts", "task texts",
         "a `txt`, or with `--arf-classnames` a `cls`, for every sample; a CSV's column without empty cells",
         "error; a warning where open_clip skips the samples (with class prompts: at most 1 % of them) or plain "
         "mixing takes them", check=_texts, applies=lambda inputs: inputs.sees_task),
    Rule("labels", "`cls`", "a whole number from 0 to one below the number of class names",
         "error with the sample and the count",
         check=_labels, applies=lambda inputs: inputs.sees_task and inputs.classes is not None),
    Rule("csv-images", "image files of a CSV",
         "are there, are files, end as their format does (`--full`: decode)",
         "error, as open_clip would end with a traceback when it comes to the first",
         check=_csv_images, applies=lambda inputs: inputs.has_task and inputs.csv),
    Rule("coverage", "captions and task data", "a caption for every sample whose image decodes",
         "error with samples' ids; with `--arf-missing-caption prompt` a warning",
         check=_coverage, applies=lambda inputs: inputs.joins and inputs.sees_task),
    Rule("batches", "task data, `--batch-size`, `--accum-freq`, `--workers`",
         "each epoch has a step; in every epoch each loader worker's shards hold a batch",
         "error; `--train-num-samples` is filled in from the tars if it was not given",
         check=_batches, applies=lambda inputs: inputs.run is not None and inputs.sees_task),
    Rule("pairs", "pair tars",
         "each pair has a whole image (`--full`: that decodes) and a UTF-8 text that is not empty",
         "error with the pair; fewer pairs than a batch, repeated images: warning",
         check=_pairs, applies=lambda inputs: inputs.has_pairs),
    Rule("features", "features in the anchor set",
         "features of every pair tar or caption file as it is, if anchors are held by them (`--full`: every value)",
         "error with the files, and `arf features`; a warning where they are not needed", check=_features,
         applies=lambda inputs: inputs.anchors is not None and (inputs.by_feature or not inputs.training)),
    Rule("starting-model", "anchor set, `--model`, `--pretrained`",
         "features are those of the weights that training starts from: by a digest of these (unless they are "
         "cast to 16 bits), by D, and by the features of some pairs and captions", "error", "start of a run",
         check=_starting_model, applies=lambda inputs: inputs.starting is not None and inputs.by_feature),
    Rule("schedule", "`--lr`, `--warmup`",
         "a rate of at most 1e-4 for trained weights, a warm-up shorter than the run",
         "warning with better values", "start of a run", check=_schedule,
         applies=lambda inputs: inputs.has_task and inputs.run is not None and inputs.run.lr is not None),
    Rule("resume", "`--resume` with `--arf-deterministic`",
         "a whole checkpoint without code in it; the same flags, class names, templates, task data, captions and "
         "pairs by the contents of all their files", "error that lists what has changed", "start of a run"),
    Rule("disk", "`--logs`", "room for a checkpoint", "error with the bytes", "start of a run"),
    Rule("first-loss", "first step", "the loss of the first step is not far above chance",
         "warning: are class names and labels of one order?", "after the first step"),
]
# fmt: on
