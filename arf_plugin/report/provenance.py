"""Where things came from: the anchor set's manifest and the runs' records, as rows of text for the page.

Records name anchor sets, task data and class names, and may have come from others. An anchor set and shards are looked
for on this machine alone, and read as what they should be; a file of class names, which any text can be taken for, is
read only below the folders that the user has named, since a page is made to be shown.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from arf_plugin.anchors.manifest import read_manifest
from arf_plugin.errors import ArfError, ReportError
from arf_plugin.report.numbers import finite, is_below, is_local
from arf_plugin.report.sources import Collected, Run
from arf_plugin.untrusted import require_regular, split_lines

LONGEST = 160  # characters of a value
LARGEST_NAMES = 1 << 20  # bytes of class names
_LARGE_RANGE = re.compile(r"\d{8}|\.\..*\.\..*\.\.")  # of shards: numbers of eight digits, or three ranges


def anchors_folder(found: Collected) -> Path | None:
    """The anchor set that the reported runs used: the subject's, else any."""
    runs = sorted(found.runs, key=lambda run: run.arm != found.subject)
    names = [name for run in runs for name in (run.info.get("anchors"), flag(run.command, "--arf-anchors"))]
    names += [grid.get("anchors") for grid in found.grids]
    folders = (Path(name) for name in names if isinstance(name, str) and is_local(name))
    return next((folder for folder in folders if folder.is_dir()), None)


def task_data(found: Collected) -> str | None:
    """What the reported runs were trained on, if it is still there."""
    from arf_plugin.anchors.task import expand_urls, is_csv

    data_of = [grid["data"].get("task") for grid in found.grids if isinstance(grid.get("data"), dict)]
    for run in sorted(found.runs, key=lambda run: run.arm != found.subject):
        data_of += [flag(run.command, "--train-data"), flag(run.command, "--task-data")]
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
    """Names by class number: from the file that is given, else from the one that training was given."""
    if given is not None:
        return _names(given)
    for run in found.runs:
        name = flag(run.command, "--arf-classnames")
        if name and is_below(name, found.roots) and Path(name).is_file():
            return _names(Path(name))
    return None


def _names(path: Path) -> list[str]:
    require_regular(path, ReportError)
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_NAMES + 1)
        if len(content) > LARGEST_NAMES:
            raise ValueError(f"it has more than {LARGEST_NAMES} bytes")
        return split_lines(content.decode("utf-8"))
    except (OSError, ValueError) as cause:
        raise ReportError(f"{path} cannot be read: {cause}. Expected class names, one per line.") from cause


def flag(command: Sequence[str], name: str) -> str | None:
    """The value of a flag on a command line."""
    for place, word in enumerate(command):
        if word == name and place + 1 < len(command):
            return command[place + 1]
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
    return None


def manifest_sentences(manifest: Mapping[str, Any]) -> list[str]:
    """What a manifest says, in plain sentences."""
    sentences = []
    captions, pairs = manifest.get("captions"), manifest.get("pairs")
    if isinstance(captions, dict):
        text = f"{_count(captions.get('count'))} captions"
        if captions.get("captioner"):
            text += f", written by the captioner “{captions['captioner']}”"
        sentences.append(text + ".")
    if isinstance(pairs, dict):
        sentences.append(_pairs_sentence(pairs))
    return sentences


def _pairs_sentence(pairs: Mapping[str, Any]) -> str:
    retrieved = pairs.get("retrieve") if isinstance(pairs.get("retrieve"), dict) else {}
    assert isinstance(retrieved, dict)
    selection = retrieved.get("selection") if isinstance(retrieved.get("selection"), dict) else {}
    similarity = retrieved.get("similarity")
    text = f"{_count(pairs.get('count'))} pairs"
    if selection and selection.get("random"):
        text += f", drawn at random from a pool of {_count(retrieved.get('pool_rows'))} (a control)"
    elif retrieved:
        text += f", retrieved from a pool of {_count(retrieved.get('pool_rows'))}"
        if selection and selection.get("k") is not None:
            text += f" as the {selection['k']} nearest of {_count(retrieved.get('queries'))} queries"
        model = retrieved.get("model")
        if isinstance(model, dict) and model.get("name"):
            text += f" in the embedding of {model['name']}"
    if isinstance(similarity, dict) and all(
        finite(similarity.get(key)) is not None for key in ("min", "mean", "max")
    ):
        text += "; cosine {min:.2f} to {max:.2f}, mean {mean:.2f}".format(**similarity)
    return text + "."


def manifest_rows(folder: Path) -> tuple[list[str], dict[str, list[tuple[str, str]]]]:
    """Sentences and rows (path of the key, value) of an anchor set's manifest, by half."""
    manifest = read_manifest(folder)
    if manifest is None:
        return [], {}
    halves = {
        # The list of a half's files is as long as the half.
        half: flatten({key: value for key, value in manifest[half].items() if key != "written"})
        for half in ("captions", "pairs")
        if isinstance(manifest.get(half), dict)
    }
    rest = flatten({key: value for key, value in manifest.items() if key not in halves})
    return manifest_sentences(manifest), {**halves, "set": rest}


def flatten(value: Any, path: str = "") -> list[tuple[str, str]]:
    """Rows of a JSON value: one per leaf; lists of plain values stay together.

    >>> flatten({"a": {"b": 1, "c": [1, 2]}, "d": None})
    [('a.b', '1'), ('a.c', '1, 2'), ('d', 'none')]
    """
    if isinstance(value, dict) and value:
        return [
            row for key, item in value.items() for row in flatten(item, f"{path}.{key}" if path else str(key))
        ]
    if isinstance(value, list) and value and not any(isinstance(item, (dict, list)) for item in value):
        return [(path, _cut(", ".join(map(_plain, value))))]
    if isinstance(value, (dict, list)) and value:
        return [(path, _cut(json.dumps(value, ensure_ascii=False)))]
    return [(path, _cut(_plain(value)))]


def run_rows(found: Collected) -> list[dict[str, Any]]:
    """One row per run: whose it is, what it took, what it was made with."""
    digests: dict[tuple[str, int | None], str] = {}
    for item in found.test:
        if item.alpha is None and isinstance(item.row.get("digest"), str):
            digests[item.arm, item.seed] = item.row["digest"]
    rows = []
    for run in sorted(found.runs, key=lambda run: (list(found.arms).index(run.arm), run.seed or 0)):
        rows.append(
            {
                "arm": run.arm,
                "seed": run.seed,
                "steps": _number(run.info.get("steps")),
                "minutes": _minutes(run.info.get("seconds")),
                "anchors": str(run.info.get("anchors") or flag(run.command, "--arf-anchors") or ""),
                "digest": digests.get((run.arm, run.seed), "")[:12],
                "versions": _versions(run.info.get("versions")),
                "command": _command(run),
            }
        )
    return rows


def evaluation_rows(found: Collected) -> list[tuple[str, str]]:
    """What the measurements have in common, and where they differ."""
    rows = []
    for label, key in (
        *(("model", "model"), ("suite", "suite"), ("split", "split"), ("device", "device")),
        *(("precision", "precision"), ("classifier", "classifier"), ("batch size", "batch_size")),
    ):
        values = dict.fromkeys(str(item.row[key]) for item in found.test if item.row.get(key) is not None)
        if values:
            rows.append((label, ", ".join(values)))
    versions = dict.fromkeys(_versions(item.row.get("versions")) for item in found.test)
    rows.append(("versions", "; ".join(text for text in versions if text)))
    times = sorted(str(item.row["time"]) for item in found.test if item.row.get("time"))
    if times:
        rows.append(("measured", times[0] if times[0] == times[-1] else f"{times[0]} to {times[-1]}"))
    return [(label, text) for label, text in rows if text]


def choice_rows(found: Collected) -> list[dict[str, Any]]:
    """How hyper-parameters were chosen: arm, average that decided, and each candidate's figure on validation."""
    rows = []
    for content in found.choices:
        entries = content.get("arms")
        for arm, entry in (entries if isinstance(entries, dict) else {}).items():
            candidates = entry.get("candidates") if isinstance(entry, dict) else None
            if not isinstance(candidates, list):
                continue
            by = str(entry.get("by"))
            listed = []
            for place, candidate in enumerate(candidates):
                flags = candidate.get("flags") if isinstance(candidate, dict) else None
                values = candidate.get("validation") if isinstance(candidate, dict) else None
                figure = values.get(by) if isinstance(values, dict) else None
                listed.append(
                    {
                        "flags": ", ".join(f"{k} {v}" for k, v in flags.items())
                        if isinstance(flags, dict)
                        else "",
                        "figure": f"{number:.1f}" if (number := finite(figure)) is not None else "",
                        "chosen": place == entry.get("chosen"),
                    }
                )
            rows.append(
                {"arm": found.arms[arm].label if arm in found.arms else arm, "by": by, "candidates": listed}
            )
    return rows


def _command(run: Run) -> str:
    return shlex.join(run.command)


def _versions(value: Any) -> str:
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else ""


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else ""


def _minutes(value: Any) -> str:
    seconds = finite(value)
    return f"{seconds / 60:,.1f}" if seconds is not None else ""


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else "an unknown number of"


def _plain(value: Any) -> str:
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
