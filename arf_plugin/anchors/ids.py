r"""Sample ids: the names that join task samples with their caption anchors.

The id of a WebDataset sample is ``<shard file name without .tar>/<__key__>``; the id of a CSV sample is its
image path exactly as the CSV has it. Folders and hosts are no part of a shard name: a data set keeps
its ids when it moves. Names are bytes, ids are text: bytes that are no UTF-8 appear in them as ``\xNN``, the same under
every locale.
"""

from __future__ import annotations

import functools
import os
import re
import shlex

from arf_plugin.errors import TaskDataError
from arf_plugin.untrusted import utf8

_TAR_ENDING = re.compile(r"\.(tar|tgz)(\.[A-Za-z0-9]+)?$")
_SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]+://")


@functools.lru_cache(maxsize=65536)
def shard_name(url: str) -> str:
    """Returns the file name of a shard without folders, host, query string and ``.tar``.

    Args:
        url: what webdataset was given: a path, ``file:``, ``s3://``, ``https://`` and so on, or a ``pipe:``
            command, whose first word that names a tar counts.

    Raises:
        TaskDataError: if a ``pipe:`` command names no tar.

    >>> shard_name("/data/train-0001.tar"), shard_name("pipe:aws s3 cp s3://bucket/a/train-0001.tar -")
    ('train-0001', 'train-0001')
    >>> shard_name("https://host/a/train-0001.tar?token=x/y")
    'train-0001'
    """
    if url.startswith("pipe:"):
        url = _tar_in_command(url)
    if _SCHEME.match(url):
        url = re.split(r"[?#]", url, maxsplit=1)[0]
    return _as_text(_TAR_ENDING.sub("", url.rstrip("/").rsplit("/", 1)[-1]))


def sample_id(url: str, key: str) -> str:
    """Returns the id of a WebDataset sample.

    Args:
        url: the shard, as in the sample's ``__url__``.
        key: the sample's ``__key__``, decoded as UTF-8 with ``surrogateescape`` where it is none.
    """
    return f"{shard_name(url)}/{key if key.isascii() else utf8(key)}"


def _as_text(path: str) -> str:
    """Text of a part of a path, which Python decodes as the locale says."""
    if path.isascii():
        return path
    try:
        return utf8(os.fsencode(path).decode("utf-8", "surrogateescape"))
    except UnicodeEncodeError:  # of no path that this system could open
        return utf8(path)


def _tar_in_command(url: str) -> str:
    command = url[len("pipe:") :]
    try:
        words = shlex.split(command)
    except ValueError:
        words = command.split()
    for word in words:
        path = re.split(r"[?#]", word, maxsplit=1)[0]
        if _TAR_ENDING.search(path):
            return path
    raise TaskDataError(
        f"The command {url!r} names no tar file, so its samples have no id (<shard name>/<key>).\n"
        "Expected a word that ends in .tar, such as: pipe:aws s3 cp s3://bucket/train-0001.tar -"
    )
