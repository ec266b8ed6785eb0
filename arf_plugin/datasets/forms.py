"""Recognises the usual forms of images, and lists what they hold.

    class folders      cat/1.jpg, dog/2.PNG; below train/, val/, test/ too; images at any depth
    tables             CSV or TSV: an image path, a class name or index, maybe a split and a text
    metadata           metadata.jsonl or metadata.csv beside images, as Hugging Face's datasets write it
    parquet            images within, as Hugging Face's datasets write them
    WebDataset         tars of KEY.jpg and KEY.cls or KEY.txt: a glob, braces, or a folder of them
    texts beside       1.jpg and 1.txt: a pool

Everything here is untrusted: names in tables of a folder stay within it, tars are listed by their headers, and nothing
that a table names is fetched from elsewhere.
"""

from __future__ import annotations

import collections
import csv
import dataclasses
import glob
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from arf_plugin.anchors.tars import is_remote, local_path, scan_samples
from arf_plugin.anchors.task import expand_urls
from arf_plugin.data.prompts import load_classnames
from arf_plugin.datasets.entries import (
    CLASS_COLUMNS,
    IMAGE_COLUMNS,
    SPLIT_COLUMNS,
    TEXT_COLUMNS,
    Entry,
    Listing,
    column,
    split_of,
)
from arf_plugin.errors import TaskDataError
from arf_plugin.evaluation.folders import is_image, listing, place_of, shortened
from arf_plugin.files import not_there
from arf_plugin.pipeline.tables import open_parquet
from arf_plugin.untrusted import decode_text, parse_json, split_lines, utf8

TABLES = (".csv", ".tsv")
FORMS = (
    "a folder of class folders (cat/1.jpg), also below train/ and val/; a CSV with an image path and a class in each "
    "row; a folder with metadata.jsonl; parquet files with images; WebDataset tars ('shards/{000..099}.tar')"
)
_BRACES = re.compile(r"\{[^{}]*(\.\.|,)[^{}]*\}")
_SHARD_SPLIT = re.compile(r"^([A-Za-z]+)[-_.]")


def read_source(source: str, *, pool: bool = False) -> Listing:
    """Lists the images of a source.

    Args:
        source: A folder, a file, a glob, or tars in braces and ``::``.
        pool: They have texts rather than classes.

    Raises:
        TaskDataError: Its form is not understood, or it holds no image.
    """
    found = _read(source, pool)
    if not found.entries:
        raise TaskDataError(f"{source} holds no image. Expected {FORMS}.")
    missing = sum((one.text is None) if pool else (one.label is None) for one in found.entries)
    if missing == len(found.entries):
        what = "text (a column, or 1.txt beside 1.jpg)" if pool else "class (a folder, a column, or KEY.cls)"
        raise TaskDataError(f"No image of {source} has a {what}. It was taken for: {found.form}.")
    return found


def _read(source: str, pool: bool) -> Listing:
    path = Path(source)
    if is_remote(source.split("::")[0]):
        raise TaskDataError(
            f"{source} is not on this machine. Copy it here first, or name its tars as --train-data. (arf data copies "
            "what fsspec reaches by itself, without --dry-run.)"
        )
    if path.is_dir():
        return _read_folder(path, pool)
    if path.is_file():
        return _read_files([path], pool)
    if "::" in source or _BRACES.search(source):
        return _read_files([local_path(url) for url in expand_urls(source)], pool)
    if matched := sorted(map(Path, glob.glob(source, recursive=True))):
        if all(one.is_dir() for one in matched):
            form = f"class folders ({len(matched)} of a glob)"
            return _class_folders([(one.name, one) for one in matched], form)
        return _read_files([one for one in matched if one.is_file()], pool)
    raise TaskDataError(_not_found(source))


def _not_found(source: str) -> str:
    if glob.has_magic(source):
        return f"No file matches {source!r}. Look with: ls {source}"
    return not_there(source)


def _read_files(paths: list[Path], pool: bool) -> Listing:
    if gone := [str(path) for path in paths if not path.is_file()]:
        raise TaskDataError(
            f"{shortened(gone)} of {len(paths)} files do not exist. Check the path and its braces."
        )
    suffixes = {"".join(path.suffixes[-1:]).lower() for path in paths}
    if suffixes <= {".tar"}:
        return _tars(paths, pool)
    if suffixes == {".parquet"}:
        return _parquet(paths)
    if len(paths) == 1 and suffixes <= {*TABLES, ".jsonl"}:
        return _table(paths[0])
    if all(is_image(path.name) for path in paths):
        raise TaskDataError(
            f"{paths[0]} is an image, not a set of images. Name the folder whose folders are the classes; where a "
            "shell has expanded a glob, put it in quotes."
        )
    raise TaskDataError(
        f"{paths[0]} has a form that is not understood ({', '.join(sorted(suffixes))}). Expected {FORMS}."
    )


def _read_folder(root: Path, pool: bool) -> Listing:
    folders, files = _visible(root)
    for name in ("metadata.jsonl", "metadata.csv", "metadata.parquet"):
        tables = [root / one / name for one in ("", *folders) if (root / one / name).is_file()]
        if tables:
            splits = {one: None if one.parent == root else split_of(one.parent.name) for one in tables}
            return _joined([_table(one, confined=True, split=split) for one, split in splits.items()], name)
    if parquet := _below(root, ".parquet"):
        return _parquet(parquet)
    if tars := _below(root, ".tar"):
        return _tars(tars, pool, root)
    if pool:
        return _texts_beside(root)
    tables = [root / name for name in files if name.lower().endswith(TABLES)]
    if len(tables) == 1 and not any(_has_images(root / name) for name in folders if not is_image(name)):
        return _table(tables[0])
    while len(folders) == 1 and not _images_in(root) and not _images_in(root / folders[0]):
        root = root / folders[0]  # images/, data/: a folder that holds all others
        folders, files = _visible(root)
    parts = {name: split for name in folders if (split := split_of(name))}
    if parts and not any(_has_images(root / name) for name in folders if name not in parts):
        found = [_by_class(root / name, split) for name, split in parts.items()]
        return _joined(found, "class folders below " + ", ".join(folders))
    loose = _images_in(root)
    if loose and not folders:
        raise TaskDataError(
            f"{root} holds images, but no folders of classes. Expected {root}/<class>/<image>, or a table of classes: "
            f"{FORMS}."
        )
    note = f"{len(loose)} images beside the class folders have no class and are left out: {shortened(loose)}"
    return _by_class(root, None, (note,) if loose else ())


# --- class folders -------------------------------------------------------------------------------------------------


def _by_class(root: Path, split: str | None, notes: tuple[str, ...] = ()) -> Listing:
    """Folders of classes: those at the top, or those that hold images, where the ones at the top only group them."""
    holding = {
        name: [folder for folder, files in _walk(root / name) if any(map(is_image, files))]
        for name in _visible(root)[0]
    }
    filled = {name: folders for name, folders in holding.items() if folders}
    leaves = [(leaf.name, leaf) for folders in filled.values() for leaf in folders]
    grouped = all(root / name not in folders for name, folders in filled.items())
    if grouped and len(dict(leaves)) == len(leaves) > len(filled):
        note = f"{', '.join(list(filled)[:3])} hold nothing but folders of images, so those are the classes"
        found = _class_folders(leaves, "class folders in groups", split)
        notes = (note, *found.notes, *notes)
    else:
        found = _class_folders([(name, root / name) for name in filled], "class folders", split)
        notes = (*found.notes, *notes)
    empty = tuple(utf8(name) for name in holding if name not in filled)
    return dataclasses.replace(found, empty=empty, notes=notes)


def _class_folders(classes: list[tuple[str, Path]], form: str, split: str | None = None) -> Listing:
    found, others = [], collections.Counter[str]()
    for label, top in classes:
        for folder, files in _walk(top):
            for name in files:
                if is_image(name):
                    found.append(Entry(str(folder / name), folder / name, utf8(label), split))
                else:
                    others[Path(name).suffix.lower() or name] += 1
    kinds = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(5))
    note = f"files that are no images, by their names, are left out: {kinds}"
    return Listing(form, found, notes=(note,) if others else ())


def _walk(top: Path) -> Iterator[tuple[Path, list[str]]]:
    """Folders from one on, links followed once, and the names of their visible files."""
    seen, waiting = set(), [top]
    while waiting:
        folder = waiting.pop(0)
        if (place := place_of(str(folder))) in seen:
            continue
        seen.add(place)
        folders, files = _visible(folder)
        yield folder, files
        waiting += [folder / name for name in folders]


def _visible(folder: Path) -> tuple[list[str], list[str]]:
    """Names of folders and files; hidden ones and those of archivers (``__MACOSX``) are left out."""
    folders, files = listing(str(folder))
    return (
        [name for name in folders if not name.startswith((".", "__"))],
        [name for name in files if not name.startswith(".")],
    )


def _images_in(folder: Path) -> list[str]:
    return [name for name in _visible(folder)[1] if is_image(name)]


def _has_images(folder: Path) -> bool:
    return any(is_image(name) for _, files in _walk(folder) for name in files)


def _below(root: Path, suffix: str) -> list[Path]:
    return sorted(
        folder / name for folder, files in _walk(root) for name in files if name.lower().endswith(suffix)
    )


def _joined(parts: list[Listing], form: str) -> Listing:
    """Several parts of one source, such as its splits."""
    return Listing(
        form,
        [entry for part in parts for entry in part.entries],
        next((part.classnames for part in parts if part.classnames), None),
        tuple(dict.fromkeys(name for part in parts for name in part.empty)),
        tuple(dict.fromkeys(note for part in parts for note in part.notes)),
    )


# --- tables --------------------------------------------------------------------------------------------------------


def _table(path: Path, *, confined: bool = False, split: str | None = None) -> Listing:
    """A table of image paths, relative to its folder; ``confined`` refuses those that lead out of it."""
    folder, rows = path.parent, list(_rows(path))
    names = list(dict.fromkeys(name for row in rows[:1000] for name in row))
    image = column(names, IMAGE_COLUMNS)
    if image is None:
        raise TaskDataError(
            f"{path} has no column of image paths (found: {', '.join(names)[:300]}). Expected one called filepath, "
            "image, file_name or path."
        )
    label, part, text = (column(names, some) for some in (CLASS_COLUMNS, SPLIT_COLUMNS, TEXT_COLUMNS))
    found = []
    for number, row in enumerate(rows, 1):
        value = row.get(image)
        if not isinstance(value, str) or not value.strip():
            raise TaskDataError(f"{path}, row {number}: no image path in column {image!r}.")
        if is_remote(value):
            raise TaskDataError(
                f"{path}, row {number}: {value!r} is a link. Fetch such a list first, with: arf download"
            )
        inner = PurePosixPath(value)
        if confined and (inner.is_absolute() or ".." in inner.parts):
            raise TaskDataError(
                f"{path}, row {number}: {value!r} leads out of the folder {folder}. It was not opened."
            )
        said = row.get(part)
        own = split_of(str(said)) if said is not None else split
        if said is not None and own is None:
            raise TaskDataError(f"{path}, row {number}: {said!r} is no split. Expected train, val or test.")
        found.append(Entry(value, folder / value, _label(row.get(label)), own, _text(row.get(text))))
    return Listing(f"table {path.name}: images in {image!r}, classes in {label!r}", found)


def _label(value: Any) -> str | int | None:
    if value is None or (isinstance(value, float) and value != value) or value == "":
        return None
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, int):
        return value
    text = utf8(str(value).strip())
    return int(text) if re.fullmatch(r"\d{1,9}", text) else text


def _text(value: Any) -> str | None:
    return utf8(value.strip()) or None if isinstance(value, str) else None


def _rows(path: Path) -> Iterator[dict[Any, Any]]:
    """Rows of a CSV, TSV, JSON lines or parquet file."""
    if path.suffix == ".parquet":
        with open_parquet(path, TaskDataError) as file:
            for batch in file.iter_batches():
                yield from batch.to_pylist()
        return
    data = decode_text(path.read_bytes(), str(path), TaskDataError)
    if path.suffix.lower() == ".jsonl":
        for number, line in enumerate(split_lines(data), 1):
            if line.strip():
                yield parse_json(line.encode(), f"{path}, line {number}", TaskDataError)
        return
    sign = max(",\t;|", key=data[: 1 << 16].partition("\n")[0].count)
    number = 0
    try:
        for number, row in enumerate(csv.DictReader(io.StringIO(data, newline=""), delimiter=sign), 1):
            if None in row:
                raise TaskDataError(
                    f"{path}, row {number} has more cells than the header. Is it separated by {sign!r}?"
                )
            yield row
    except csv.Error as cause:  # a quote that is never closed, and then a cell without end
        raise TaskDataError(
            f"{path} cannot be read after row {number}: {cause}. Is a quote missing?"
        ) from None


# --- parquet with images -------------------------------------------------------------------------------------------


def _parquet(paths: list[Path]) -> Listing:
    """Parquet files as Hugging Face's datasets write them: image bytes in a struct, class names in the schema."""
    found: list[Entry] = []
    names: list[str] | None = None
    for path in paths:
        with open_parquet(path, TaskDataError) as file:
            schema = file.schema_arrow
            image = column(schema.names, IMAGE_COLUMNS)
            if image is None:
                raise TaskDataError(
                    f"{path} has no column of images (found: {', '.join(schema.names)[:300]}). Expected 'image', with "
                    "the bytes of an encoded image, as Hugging Face's datasets write it."
                )
            label, text = (column(schema.names, some) for some in (CLASS_COLUMNS, TEXT_COLUMNS))
            names = names or _feature_names(schema.metadata or {}, label)
            word = _SHARD_SPLIT.match(path.name)
            split = split_of(word[1]) if word else split_of(path.parent.name)
            columns = [name for name in (label, text) if name]
            batches = file.iter_batches(columns=columns) if columns else ()
            for row, values in enumerate(values for batch in batches for values in batch.to_pylist()):
                said = _label(values.get(label)), split, _text(values.get(text))
                found.append(Entry(f"{path}, row {row + 1}", path, *said, row))
    return Listing(f"{len(paths)} parquet files", found, names)


def _feature_names(metadata: dict[bytes, bytes], label: str | None) -> list[str] | None:
    """Class names that Hugging Face's datasets note in a schema."""
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
        names = features[label]["names"]
    except (ValueError, KeyError, TypeError):
        return None
    return [utf8(name) for name in names] if all(isinstance(name, str) for name in names) else None


# --- tars ----------------------------------------------------------------------------------------------------------


def _tars(paths: list[Path], pool: bool, root: Path | None = None) -> Listing:
    """WebDataset tars: KEY.jpg with KEY.cls, an index or a name, and KEY.txt; classnames.txt beside or above them."""
    found: list[Entry] = []
    for path in paths:
        split = split_of(path.parent.name)
        for sample in scan_samples(str(path), TaskDataError, read=("cls", "txt")):
            if sample.image is None or sample.is_stray:
                continue
            image, shown = sample.image, f"{path}/{utf8(sample.key)}"
            if image.offset < 0:
                raise TaskDataError(
                    f"{path} is compressed, so its images cannot be read by place. Unpack it: gunzip {path}"
                )
            label, text = (_member(sample.members.get(name)) for name in ("cls", "txt"))
            said = None if pool else _label(label)
            found.append(Entry(shown, path, said, split, text, image.offset, image.size))
    names = None
    for place in dict.fromkeys((root or paths[0].parent, paths[0].parent, paths[0].parent.parent)):
        if (place / "classnames.txt").is_file():
            names = load_classnames(str(place / "classnames.txt"), "classnames.txt")
            break
    return Listing(f"{len(paths)} WebDataset tars", found, names)


def _member(member: Any) -> str | None:
    if member is None or member.data is None:
        return None
    return utf8(member.data.decode("utf-8", "surrogateescape").strip()) or None


def _texts_beside(root: Path) -> Listing:
    """Images with a text of the same name beside them: 1.jpg and 1.txt."""
    found = []
    for folder, files in _walk(root):
        there = set(files)
        for name in filter(is_image, files):
            beside, text = folder / f"{name.rpartition('.')[0]}.txt", None
            if beside.name in there:
                text = decode_text(beside.read_bytes(), str(beside), TaskDataError).strip() or None
            found.append(Entry(str(folder / name), folder / name, None, None, text))
    return Listing("images with texts beside them", found)
