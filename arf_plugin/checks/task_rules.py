"""Rules about the task data, and about captions and task data together."""

from __future__ import annotations

from collections.abc import Iterator

from arf_plugin.anchors.task import decodable
from arf_plugin.anchors.task_csv import CLASS_COLUMN
from arf_plugin.checks.finding import NAMED, Finding
from arf_plugin.checks.inputs import Inputs
from arf_plugin.checks.messages import (
    is_class_index,
    missing_caption_message,
    missing_class_message,
    unusable_label_message,
)
from arf_plugin.errors import AnchorSetError, MissingCaptionError, TaskDataError

STRAY_FRACTION = 0.01  # of images that belong to no sample, as of what stages reject by default
DECODED_AT_MOST = 1000  # images without a caption that are decoded to see whether they could have one


def task_data(inputs: Inputs) -> Iterator[Finding]:
    """The task data can be read."""
    if inputs.train_data is None:
        return
    if inputs.remote_task:
        yield Finding(
            "warning",
            "the task data is remote, so its ids are not checked before the first step; see `arf check`. With "
            "--arf-classnames, samples without 'cls' would train on their own 'txt'.",
        )
        return
    task = inputs.task
    if task.without_image:
        yield Finding(
            "warning",
            f"{len(task.without_image)} task samples have no image, the first being {task.without_image[0]}; "
            "training "
            "passes over them",
        )


def images(inputs: Inputs) -> Iterator[Finding]:
    """Images of tars look whole."""
    if inputs.train_data is None or inputs.csv or inputs.remote_task or not inputs.task.unreadable:
        return
    named, count = _unreadable(inputs)
    yield Finding(
        "warning",
        f"{count} of {len(inputs.task.ids)} task images are unreadable and will be skipped, first: {named}",
    )


def csv_images(inputs: Inputs) -> Iterator[Finding]:
    """The image files of a CSV are there and look whole."""
    yield from ()
    if inputs.train_data is None or not inputs.csv or not inputs.task.unreadable:
        return
    named, count = _unreadable(inputs)
    raise TaskDataError(
        f"{count} of {len(dict.fromkeys(inputs.task.ids))} image files of {inputs.train_data} are missing or "
        f"unreadable, first: {named}.\n"
        "open_clip's reader of CSVs would stop at the first one, hours later. Paths are read as they stand, from the "
        "folder that training is started in; correct them, or remove the rows."
    )


def _unreadable(inputs: Inputs) -> tuple[str, int]:
    """Some unreadable images with reasons, and their number; a run's log gets the first alone."""
    listed = list(inputs.task.unreadable.items())
    shown = listed[: 1 if inputs.training and not inputs.csv else NAMED]
    return "; ".join(f"{name} {reason}" for name, reason in shown), len(listed)


def texts(inputs: Inputs) -> Iterator[Finding]:
    """Every sample has the text, or the class, that is needed."""
    if inputs.train_data is None or inputs.remote_task:
        return
    if inputs.csv:
        yield from _csv_texts(inputs)
        return
    task, total = inputs.task, len(inputs.task.ids)
    if not inputs.texts_known:
        if task.without_text and task.without_class:
            yield Finding(
                "warning",
                f"{task.without_text} task samples have no txt and {task.without_class} no cls: training needs "
                "txt, or "
                "cls with --arf-classnames",
            )
    elif inputs.needs_class:
        if task.without_class:
            yield from _mixture(inputs)
    elif task.without_text == total:
        hint = (
            "they have 'cls': give --arf-classnames FILE"
            if task.without_class < total
            else "write KEY.txt beside each image"
        )
        raise TaskDataError(f"No task sample has a 'txt', so there is no text to train on; {hint}.")
    elif task.without_text:
        yield Finding(
            "warning", f"{task.without_text} of {total} task samples have no 'txt'; open_clip skips them."
        )


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
        yield Finding(
            "warning",
            f"{len(task.without_both)} of {total} images have neither 'cls' nor 'txt' (first: {task.without_both[0]}); "
            "open_clip skips them.",
        )
    if task.without_class == len(task.without_both):
        return
    yield Finding(
        "note",
        f"plain mixing: {total - task.without_class} task samples have a class and get class prompts, "
        f"{task.without_class} have none and keep their own text.",
    )
    if task.half_classed:
        yield Finding(
            "warning",
            f"{len(task.half_classed)} shards hold samples of both kinds, first: {task.half_classed[0]}. Mixed "
            "data has "
            "shards of its own as a rule; did some samples lose their 'cls'?",
        )


def _csv_texts(inputs: Inputs) -> Iterator[Finding]:
    if not inputs.texts_known:
        return
    frame = inputs.frame
    column = CLASS_COLUMN if inputs.needs_class else inputs.csv_caption_key
    if column not in frame:
        needs = "--arf-classnames" if inputs.needs_class else "training"
        raise TaskDataError(
            f"{inputs.train_data} has no column '{column}' (found: {', '.join(map(str, frame.columns))}), "
            f"which {needs} "
            f"needs. Add it{'' if inputs.needs_class else ', or name another with --csv-caption-key'}."
        )
    empty = frame[column].isna().to_numpy().nonzero()[0]
    if len(empty):
        raise TaskDataError(
            f"{inputs.train_data}, row {empty[0] + 1}: column '{column}' is empty ({len(empty)} rows are); "
            "open_clip would "
            "train on the text 'nan'. Fill it in or remove the row."
        )
    yield from ()


def labels(inputs: Inputs) -> Iterator[Finding]:
    """Every class number has a class name."""
    if inputs.train_data is None or inputs.remote_task or inputs.classes is None:
        return
    classes = len(inputs.classes)
    labels = inputs.task.labels
    wrong = {
        text: (count, first) for text, (count, first) in labels.items() if not is_class_index(text, classes)
    }
    if wrong:
        from_one = classes > 1 and set(labels) == {str(number) for number in range(1, classes + 1)}
        text, (_, first) = next(iter(wrong.items()))
        raise TaskDataError(
            unusable_label_message(first, text, classes, sum(count for count, _ in wrong.values()), from_one)
        )
    if labels and len(labels) <= classes // 2:
        yield Finding(
            "warning",
            f"the task data has samples of {len(labels)} classes, {classes} class names were given. Are they "
            "those of "
            "this data?",
        )


def coverage(inputs: Inputs) -> Iterator[Finding]:
    """Every sample that can be trained on has a caption."""
    if inputs.train_data is None or not inputs.joins or inputs.remote_task:
        return
    import pyarrow as pa
    import pyarrow.compute as pc

    task, captions = inputs.task, inputs.captions
    ids = pa.array(task.ids, pa.large_string())
    found = pc.is_in(ids, value_set=captions.ids)
    missing = ids.filter(pc.invert(found)).to_pylist()
    covered = len(ids) - len(missing)
    if not covered:
        raise AnchorSetError(
            f"The captions of {inputs.anchors} cover none of the {len(ids)} task samples.\n"
            f"  task samples are called like {task.ids[0]!r}, captions like {captions.ids[0].as_py()!r}\n"
            "An id is <shard file name without .tar>/<key>, or the CSV's image path. Were the captions made "
            "from other "
            "data, or were shards renamed? Compare them with `arf check`."
        )
    # Training skips unreadable images, and no captioner could have described them.
    missing = [identity for identity in missing if identity not in task.unreadable]
    if 0 < len(missing) <= DECODED_AT_MOST and inputs.missing_caption == "error":
        good = set(decodable(inputs.train_data, inputs.csv, missing))
        broken = [identity for identity in missing if identity not in good]
        missing = [identity for identity in missing if identity in good]
        if broken:
            yield Finding(
                "warning",
                f"{len(broken)} task images have no caption and cannot be decoded, first: {broken[0]}; "
                "training skips them",
            )
    if missing and inputs.missing_caption == "error":
        raise MissingCaptionError(missing_caption_message(missing, NAMED))
    if missing:
        yield Finding(
            "warning",
            f"{len(missing)} of {len(ids)} task samples have no caption (first: {missing[0]}); their class "
            "prompt takes "
            "its place.",
        )
    unused = len(captions.ids) - covered
    if unused > 0 and not inputs.training:
        yield Finding("warning", f"{unused} samples with captions are not in the task data")
