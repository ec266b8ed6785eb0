"""Where things came from: the anchor set's manifest and the runs' records, as rows of text for the page.

Records name anchor sets, task data and class names, and may have come from others. An anchor set and shards are looked
for on this machine alone, and read as what they should be; a file of class names, which any text can be taken for, is
read only below the folders that the user has named, since a page is made to be shown.
"""

from __future__ import annotations

import itertools
import json
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from arf_plugin.anchors.manifest import read_manifest
from arf_plugin.data.prompts import load_classnames
from arf_plugin.errors import ArfError
from arf_plugin.report.sources import Collected, entries, finite, is_below, is_local, mapping, read_text
from arf_plugin.untrusted import split_lines

LONGEST = 160  # characters of a value
_LARGE_RANGE = re.compile(r"\d{8}|\.\..*\.\..*\.\.")  # of shards: numbers of eight digits, or three ranges


def anchors_folder(found: Collected) -> Path | None:
    """The anchor set that the reported runs used: the subject's, else any."""
    runs = sorted(found.runs, key=lambda run: run.arm != found.subject)
    named = [(run, name) for run in runs for name in (run.info.get("anchors"), run.flag("--arf-anchors"))]
    names: list[Any] = [run.place(name) for run, name in named if isinstance(name, str) and is_local(name)]
    names += [grid.get("anchors") for grid in found.grids]
    folders = (Path(name) for name in names if isinstance(name, str) and is_local(name))
    return next((folder for folder in folders if folder.is_dir()), None)


def task_data(found: Collected) -> str | None:
    """What the reported runs were trained on, if it is still there."""
    from arf_plugin.anchors.task import expand_urls, is_csv

    data_of: list[Any] = [mapping(grid.get("data")).get("task") for grid in found.grids]
    for run in sorted(found.runs, key=lambda run: run.arm != found.subject):
        for data in filter(None, (run.flag("--train-data"), run.flag("--task-data"))):
            folder, slash, pattern = data.rpartition("/")
            data_of += [f"{run.place(folder)}/{pattern}" if slash and is_local(folder) else data]
    for data in data_of:
        if not isinstance(data, str) or not data or "://" in data or _LARGE_RANGE.search(data):
            continue
        try:
            files = [data] if is_csv(data) else expand_urls(data)
        except ArfError:
            continue
        if all(is_local(name) and Path(name).is_file() for name in files):
            return data
    return None


def class_names(found: Collected, given: Path | None) -> list[str] | None:
    """Names by class number: from the file that is given, else those that training was given."""
    flags = [name for run in found.runs if (name := run.flag("--arf-classnames"))]
    if given is None and "imagenet" in flags:
        return load_classnames("imagenet")
    named = [run.place(name) for run in found.runs for name in flags if is_local(name)]
    own = (Path(name) for name in named if is_below(name, found.roots) and Path(name).is_file())
    path = given or next(own, None)
    return None if path is None else split_lines(read_text(path))


def manifest_rows(folder: Path) -> tuple[list[str], dict[str, list[tuple[str, str]]]]:
    """Sentences and rows (path of the key, value) of an anchor set's manifest, by kind of anchor."""
    manifest = read_manifest(folder)
    if manifest is None:
        return [], {}
    names = ("captions", "pairs", "features")
    kinds = {kind: manifest[kind] for kind in names if isinstance(manifest.get(kind), dict)}
    sentences = []
    if "captions" in kinds:
        writer = kinds["captions"].get("captioner")
        written = f", written by the captioner “{writer}”" if writer else ""
        sentences.append(f"{_count(kinds['captions'].get('count'))} captions{written}.")
    if "pairs" in kinds:
        sentences.append(_pairs_sentence(kinds["pairs"]))
    if "features" in kinds:
        held, model = kinds["features"], _text(kinds["features"].get("model"))
        counts = " and ".join(f"{_count(held.get(kind))} {kind}" for kind in ("captions", "pairs"))
        sentences.append(f"Features of {counts}, by {model} before fine-tuning.")
    rest = {key: item for key, item in manifest.items() if key not in kinds}
    # The list of a kind's files ("written") is as long as the set.
    return sentences, {
        kind: list(
            flatten({name: item for name, item in value.items() if kind == "set" or name != "written"})
        )
        for kind, value in {**kinds, "set": rest}.items()
    }


def _pairs_sentence(pairs: Mapping[str, Any]) -> str:
    retrieved = mapping(pairs.get("retrieve"))
    selection, similarity = mapping(retrieved.get("selection")), mapping(retrieved.get("similarity"))
    pool, model = _count(retrieved.get("pool_rows")), mapping(retrieved.get("model")).get("name")
    text = f"{_count(pairs.get('count'))} pairs"
    if selection.get("random"):
        text += f", drawn at random from a pool of {pool} (a control)"
    elif retrieved:
        text += f", retrieved from a pool of {pool}"
        if selection.get("k") is not None:
            text += f" as the {selection['k']} nearest of {_count(retrieved.get('queries'))} queries"
        text += f" in the embedding of {model}" if model else ""
    if all(finite(similarity.get(key)) is not None for key in ("min", "mean", "max")):
        text += "; cosine {min:.2f} to {max:.2f}, mean {mean:.2f}".format(**similarity)
    return text + "."


def flatten(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Rows of a JSON value: one per leaf; lists of plain values stay together.

    >>> list(flatten({"a": {"b": 1, "c": [1, 2]}, "d": None}))
    [('a.b', '1'), ('a.c', '1, 2'), ('d', 'none')]
    """
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from flatten(item, f"{path}.{key}" if path else str(key))
    else:
        yield path, _text(value)


def run_rows(found: Collected) -> list[dict[str, Any]]:
    """One row per run: whose it is, what it took, what it was made with."""
    digests = {(one.arm, one.seed): one.record.get("digest") for one in found.test if one.alpha is None}
    order = list(found.arms)
    rows = []
    for run in sorted(found.runs, key=lambda run: (order.index(run.arm), run.seed or 0)):
        steps, seconds = run.info.get("steps"), finite(run.info.get("seconds"))
        rows.append(
            {
                "arm": run.arm,
                "seed": "" if run.seed is None else str(run.seed),
                "steps": f"{steps:,}" if type(steps) is int else "",
                "minutes": f"{seconds / 60:,.1f}" if seconds is not None else "",
                "anchors": str(run.info.get("anchors") or run.flag("--arf-anchors") or ""),
                "digest": (digests.get((run.arm, run.seed)) or "")[:12],
                "versions": _versions(run.info),
                "command": shlex.join(run.command or itertools.chain(*run.params.items())),
            }
        )
    return rows


def evaluation_rows(found: Collected) -> list[tuple[str, str]]:
    """What the measurements have in common, and where they differ."""
    records = [one.record for one in found.test]
    rows = {}
    for key in ("model", "suite", "split", "device", "precision", "classifier", "batch_size"):
        values = dict.fromkeys(str(record[key]) for record in records if record.get(key) is not None)
        rows[key.replace("_", " ")] = ", ".join(values)
    rows["versions"] = "; ".join(dict.fromkeys(filter(None, map(_versions, records))))
    times = sorted(str(record["time"]) for record in records if record.get("time"))
    rows["measured"] = " to ".join(dict.fromkeys([*times[:1], *times[-1:]]))
    return [(label, text) for label, text in rows.items() if text]


def choice_rows(found: Collected) -> list[dict[str, Any]]:
    """How hyper-parameters were chosen: arm, average that decided, and each candidate's score on validation."""
    rows = []
    for content in found.choices:
        for arm, entry in mapping(content.get("arms")).items():
            entry = mapping(entry)
            by, listed = str(entry.get("by")), []
            for place, candidate in enumerate(map(mapping, entries(entry.get("candidates")))):
                flags = mapping(candidate.get("flags"))
                score = finite(mapping(candidate.get("validation")).get(by))
                listed.append(
                    {
                        "flags": ", ".join(f"{name} {value}" for name, value in flags.items()),
                        "score": "" if score is None else f"{score:.1f}",
                        "chosen": place == entry.get("chosen"),
                    }
                )
            if listed:
                label = found.arms[arm].label if arm in found.arms else arm
                rows.append({"arm": label, "by": by, "candidates": listed})
    return rows


def _versions(record: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in mapping(record.get("versions")).items())


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else "an unknown number of"


def _text(value: Any) -> str:
    """A value in few words: texts and numbers as they are, lists of them with commas, all else as JSON."""
    if isinstance(value, list) and value and not any(isinstance(item, (dict, list)) for item in value):
        text = ", ".join(map(_plain, value))
    else:
        nested = isinstance(value, (dict, list)) and value
        text = json.dumps(value, ensure_ascii=False) if nested else _plain(value)
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def _plain(value: Any) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
