"""Reads what others have written: text, JSON, names. Bounded, plain values only, one sentence for what is wrong.

Everything that comes from outside (an anchor set, a service, a folder that another program may have touched, our own
bookkeeping included) goes through here or through a parser with the same promise: it raises an `ArfError`, or it
returns what was expected.
"""

from __future__ import annotations

import json
import re
import stat
import unicodedata
from pathlib import Path
from typing import Any

from arf_plugin.errors import ArfError

LARGEST_JSON = 1 << 28  # bytes; a manifest has thousands
_LONE_SURROGATE = re.compile(r"[\ud800-\udfff]")
_KINDS: dict[type, str] = {dict: "an object", list: "a list", str: "a text", int: "a whole number"}
_KINDS |= {float: "a number", bool: "true or false", type(None): "null"}


def printable(text: str) -> str:
    r"""Text that can be shown on a console: no control sequences, no text that reads backwards, nothing unencodable.

    Line breaks and tabs stay; everything else that is not to be seen becomes an escape such as ``\x1b``.

    >>> printable("a\x1b[31mb")
    'a\\x1b[31mb'
    """
    if text.isascii() and text.isprintable():  # nearly all
        return text
    return "".join(c if c in "\n\t" or _is_shown(c) else _escape(c) for c in text)


def _is_shown(character: str) -> bool:
    category = unicodedata.category(character)
    # Format characters join emoji and letters; those of the bidirectional algorithm reorder what is read.
    bidirectional = "\u202a" <= character <= "\u202e" or "\u2066" <= character <= "\u2069"
    return category not in ("Cc", "Cs", "Zl", "Zp") and not bidirectional


def _escape(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte of a name that is not UTF-8, as os.fsdecode keeps it
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def printable_json(value: Any, indent: int | None = None) -> str:
    r"""JSON of a value in which nothing is left that a console or a log would obey: it becomes JSON's own escape.

    >>> printable_json({"name": "a\x9bb"})
    '{"name": "a\\u009bb"}'
    """
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    if text.isascii() and "\x7f" not in text:
        return text
    return "".join(
        c if c == "\n" or _is_shown(c) else json.dumps(c)[1:-1] for c in text.replace("\x7f", "\\u007f")
    )


def utf8(name: str) -> str:
    r"""Text of UTF-8 of a name that may hold other bytes: names of files and tar members are bytes.

    Such bytes become ``\xNN``; every other name stays as it is. Files of Arrow's, JSON and tokenizers need that.

    >>> utf8("stra\udcdfe")
    'stra\\xdfe'
    """
    return _LONE_SURROGATE.sub(lambda m: _escape(m[0]), name)


def split_lines(text: str) -> list[str]:
    """Lines of a text, as editors count them: ended by LF, CRLF or CR, and by no other character.

    ``str.splitlines`` also breaks at U+2028, U+0085, form feeds and the like. A byte-order mark, as Windows' programs
    write it, is no part of the first line.
    """
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n").split("\n")


def decode_text(data: bytes, where: str, error: type[ArfError], *, names: bool = False) -> str:
    """Decodes a text file that people write: UTF-8, with or without a byte-order mark.

    Args:
        data: the file's bytes.
        where: the file, for messages.
        error: family of the error.
        names: keeps other bytes as file names keep them (``surrogateescape``), for lists of files.

    Raises:
        error: it is of another encoding, such as the UTF-16 of Windows' programs.
    """
    advice = "Save it as UTF-8 text"
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in data:
        raise error(
            f"{where} cannot be read as UTF-8 text: it has the bytes of UTF-16, or of no text. {advice}."
        )
    try:
        return data.decode("utf-8", "surrogateescape" if names else "strict")
    except UnicodeDecodeError as cause:
        line = data[: cause.start].count(b"\n") + 1
        raise error(
            f"{where} cannot be read as UTF-8 text: line {line} has the byte 0x{data[cause.start]:02x}, as of Latin-1 "
            f"or a code page of Windows. {advice}."
        ) from None


def require_regular(path: Path, error: type[ArfError]) -> None:
    """Refuses what would block or never end when it is read: FIFOs, sockets, devices. A missing file passes.

    Raises:
        error: `path` is there and neither a file nor a link to one.
    """
    try:
        mode = path.stat().st_mode
    except OSError:
        return  # opening it says why
    if not stat.S_ISREG(mode):
        found = "a folder" if stat.S_ISDIR(mode) else "a pipe, a socket or a device"
        raise error(f"{path} is {found}, expected a file.")


def parse_json(
    data: str | bytes, where: str, error: type[ArfError], kind: type = dict, advice: str = ""
) -> Any:
    """Parses JSON that may be cut off, nested without end, or full of numbers of a thousand digits.

    Args:
        data: the text.
        where: what it is, for messages.
        error: family of the error.
        kind: type of the whole value; ``object`` takes any.
        advice: what to do about it.

    Raises:
        error: it is no JSON, not of UTF-8, or of another kind.
    """
    advice = f" {advice}" if advice else ""
    try:
        if len(data) > LARGEST_JSON:
            raise ValueError(f"{len(data)} bytes, more than the {LARGEST_JSON} that are read")
        text = data.decode("utf-8-sig") if isinstance(data, bytes) else data
        value = json.loads(text)
        # A lone surrogate can be written as an escape, and then not be encoded again.
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise error(f"{where} is no JSON that can be read: it is nested too deeply.{advice}") from None
    except (ValueError, MemoryError) as cause:
        reason = "it is empty" if not data.strip() else printable(str(cause))[:200]
        raise error(f"{where} is no JSON that can be read: {reason}.{advice}") from None
    if not isinstance(value, kind):
        found = _KINDS.get(type(value), type(value).__name__)
        raise error(f"{where} holds {found}, expected {_KINDS.get(kind, kind.__name__)}.{advice}")
    return value


def read_json(path: Path, error: type[ArfError], kind: type = dict, advice: str = "") -> Any:
    """Reads a JSON file; see :func:`parse_json`.

    Raises:
        error: also if the file is missing or cannot be read.
    """
    require_regular(path, error)
    try:
        data = path.read_bytes()
    except OSError as cause:
        reason = cause.strerror or cause
        raise error(f"{path} cannot be read: {reason}.{f' {advice}' if advice else ''}") from cause
    return parse_json(data, str(path), error, kind, advice)


def require_fields(
    value: dict[str, Any],
    fields: dict[str, type | tuple[type, ...]],
    where: str,
    error: type[ArfError],
    advice: str = "",
) -> None:
    """Checks that an object has fields of the expected types; a truth value is no number.

    Raises:
        error: naming the first field that is missing or of another type.
    """
    advice = f" {advice}" if advice else ""
    for name, kinds in fields.items():
        if name not in value:
            raise error(
                f"{where} has no field '{name}' (found: {printable(', '.join(map(str, value)))[:200]}).{advice}"
            )
        kinds = kinds if isinstance(kinds, tuple) else (kinds,)
        found = value[name]
        if not isinstance(found, kinds) or (isinstance(found, bool) and bool not in kinds):
            expected = " or ".join(_KINDS.get(kind, kind.__name__) for kind in kinds)
            raise error(f"{where}: '{name}' is {printable(repr(found))[:80]}, expected {expected}.{advice}")
