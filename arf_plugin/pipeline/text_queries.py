"""Texts as queries of the stage retrieve: captions of the task data, or one prompt per class."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from arf_plugin.anchors.manifest import problems_of
from arf_plugin.errors import AnchorSetError
from arf_plugin.files import file_digest, list_files
from arf_plugin.pipeline.stage import Shard
from arf_plugin.pipeline.tables import TEXT, count_rows, read_columns


class TextQuery(NamedTuple):
    """One query: the sample id of a caption and that caption, or the name of a class and it in all templates."""

    id: str
    texts: list[str]


@dataclass(frozen=True)
class CaptionTexts:
    """The captions of an anchor set, or of its folder of captions; each is a query of its own."""

    anchors: Path

    def files(self) -> list[Path]:
        """The parquet files.

        Raises:
            AnchorSetError: if there is none, or if they are not all there.
        """
        folder = self.anchors
        if (self.anchors / "captions").is_dir():
            folder = self.anchors / "captions"
            if problems := problems_of(str(self.anchors), ["captions"]):
                raise AnchorSetError(f"{self.anchors}: {problems[0]}")
        files = list_files(folder, ".parquet")
        if not files:
            raise AnchorSetError(
                f"{folder} has no *.parquet. Expected an anchor set with captions, as written by: arf caption"
            )
        return files

    def shards(self) -> list[Shard]:
        """One shard per parquet file."""
        counts = [(path, count_rows(path, AnchorSetError)) for path in self.files()]
        return [Shard.counted(i, path, count) for i, (path, count) in enumerate(counts)]

    def read(self, shard: Shard) -> list[TextQuery]:
        """The captions of a file, in order."""
        table = read_columns(shard.source, {"id": TEXT, "caption": TEXT}, AnchorSetError, ("id", "caption"))
        rows = table.to_pylist()
        return [TextQuery(row["id"], [row["caption"]]) for row in rows if row["id"] and row["caption"]]

    def fingerprint(self) -> list[Any]:
        """Names and contents of the files, as JSON."""
        return [[path.name, file_digest(path)] for path in self.files()]


@dataclass(frozen=True)
class PromptTexts:
    """One query per class: the class name in all templates, as in zero-shot classification.

    Both are files with one name or template per line, or ``imagenet``.
    """

    classnames: str
    templates: str

    def shards(self) -> list[Shard]:
        """A single shard: there are few classes."""
        return [Shard.counted(0, None, len(self._prompts.classnames))]

    def read(self, shard: Shard) -> list[TextQuery]:
        """The classes in order."""
        names, templates = self._prompts.classnames, self._prompts.templates
        return [TextQuery(name, [template.replace("{c}", name) for template in templates]) for name in names]

    def fingerprint(self) -> list[Any]:
        """The names and templates themselves, as JSON."""
        return [self._prompts.classnames, self._prompts.templates]

    @cached_property
    def _prompts(self) -> Any:
        from arf_plugin.data.prompts import load_prompts

        return load_prompts(self.classnames, self.templates)


TextSource = CaptionTexts | PromptTexts
