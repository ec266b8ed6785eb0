"""Moved to :mod:`arf_plugin.files`; this name goes when nothing imports it any more."""

from arf_plugin.files import (
    TEMPORARY,
    cache_folder,
    checked,
    content_digest,
    digest,
    file_digest,
    folder_digest,
    is_alive,
    list_files,
    list_files_of,
    read_cache,
    remove_incomplete,
    replacing,
    stat_key,
    write_cache,
    write_json,
)

__all__ = [
    "TEMPORARY",
    "cache_folder",
    "checked",
    "content_digest",
    "digest",
    "file_digest",
    "folder_digest",
    "is_alive",
    "list_files",
    "list_files_of",
    "read_cache",
    "remove_incomplete",
    "replacing",
    "stat_key",
    "write_cache",
    "write_json",
]
