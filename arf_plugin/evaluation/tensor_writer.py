"""Checkpoints written tensor by tensor, so that no whole model need be in memory; ``torch.save`` wants all of it.

The two file formats are plain: safetensors is a JSON header and then the tensors; torch's is an uncompressed zip
archive of a pickle, which names shapes and types, and one record per tensor
(https://pytorch.org/docs/stable/notes/serialization.html).
"""

from __future__ import annotations

import io
import json
import pickle
import shutil
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from arf_plugin.anchors.files import replacing
from arf_plugin.errors import EvaluationError
from arf_plugin.evaluation.tensor_files import RUN, TensorInfo

if TYPE_CHECKING:
    import torch

# dtype: name in safetensors, name of torch's storage class
_DTYPES = {
    "float64": ("F64", "DoubleStorage"),
    "float32": ("F32", "FloatStorage"),
    "float16": ("F16", "HalfStorage"),
    "bfloat16": ("BF16", "BFloat16Storage"),
    "int64": ("I64", "LongStorage"),
    "int32": ("I32", "IntStorage"),
    "int16": ("I16", "ShortStorage"),
    "int8": ("I8", "CharStorage"),
    "uint8": ("U8", "ByteStorage"),
    "bool": ("BOOL", "BoolStorage"),
}
_ALIGNMENT = 64  # of a record in torch's archives, so that mapped tensors are aligned


def write_order(tensors: Mapping[str, TensorInfo]) -> list[str]:
    """Names with wide types first, which keeps the tensors of a safetensors file aligned."""
    return sorted(
        tensors, key=lambda name: -tensors[name].dtype.itemsize
    )  # stable: otherwise the model's order


@contextmanager
def writing(
    path: Path, tensors: Mapping[str, TensorInfo], name: str, run: str | None = None
) -> Iterator[Callable[[torch.Tensor], None]]:
    """Writes a checkpoint tensor by tensor; it appears under its name when it is whole.

    Args:
        path: target. A ``.safetensors`` file holds the bare tensors; any other is what open_clip's trainer writes, so
            that ``--resume`` and ``--pretrained`` take it.
        tensors: what will be written, in this order; see :func:`write_order`.
        name: the run's name, kept in the checkpoint.
        run: what to tell of the run behind it, from :func:`arf_plugin.evaluation.run_flags.note`.

    Yields:
        A function that writes the next tensor.

    Raises:
        EvaluationError: for a type that is not known, or a full disk.
    """
    for key, info in tensors.items():
        if _name(info.dtype) not in _DTYPES:
            raise EvaluationError(
                f"'{key}' is of type {info.dtype}. Expected one of {', '.join(_DTYPES)}; convert it first."
            )
    require_space(path.parent, sum(info.bytes for info in tensors.values()), path.name)
    with replacing(path) as temporary, temporary.open("wb") as file:
        form = _write_safetensors if path.suffix == ".safetensors" else _write_pickle
        with form(file, tensors, {"name": name, **({RUN: run} if run else {})}) as write:
            yield write


def require_space(folder: Path, needed: int, what: str) -> None:
    """Raises an EvaluationError if a folder's disk has no room for what is to be written."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise EvaluationError(
            f"{what} needs {needed / 1e9:.2f} GB and {folder} has {free / 1e9:.2f} GB free. "
            "Make room, name another place, or write fewer checkpoints."
        )


@contextmanager
def _write_safetensors(
    file: IO[bytes], tensors: Mapping[str, TensorInfo], texts: Mapping[str, str]
) -> Iterator[Callable[[torch.Tensor], None]]:
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **texts}}
    offset = 0
    for key, info in tensors.items():
        header[key] = {
            "dtype": _DTYPES[_name(info.dtype)][0],
            "shape": list(info.shape),
            "data_offsets": [offset, offset + info.bytes],
        }
        offset += info.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    yield lambda tensor: _write_bytes(file, tensor)


@contextmanager
def _write_pickle(
    file: IO[bytes], tensors: Mapping[str, TensorInfo], texts: Mapping[str, str]
) -> Iterator[Callable[[torch.Tensor], None]]:
    records = {key: _Record(str(number), info) for number, (key, info) in enumerate(tensors.items())}
    skeleton = io.BytesIO()
    _Pickler(skeleton, protocol=2).dump({**texts, "state_dict": records})
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for member, data in (
            ("data.pkl", skeleton.getvalue()),
            ("byteorder", b"little"),
            ("version", b"3\n"),
        ):
            archive.writestr(zipfile.ZipInfo(f"archive/{member}"), data)
        remaining = iter(records.values())

        def write(tensor: torch.Tensor) -> None:
            record = next(remaining)
            with _open_record(archive, file, f"archive/data/{record.key}", record.info.bytes) as member:
                _write_bytes(member, tensor)

        yield write


@dataclass(frozen=True)
class _Storage:
    """Stands for a tensor's bytes in the pickle: torch looks them up by key in the archive."""

    key: str
    info: TensorInfo


@dataclass(frozen=True)
class _Record:
    """Stands for a tensor in the pickle."""

    key: str
    info: TensorInfo


class _Pickler(pickle.Pickler):
    """Writes a record as ``torch.save`` would write the contiguous tensor it stands for."""

    def persistent_id(self, obj: Any) -> Any:
        import torch

        if not isinstance(obj, _Storage):
            return None
        kind = getattr(torch, _DTYPES[_name(obj.info.dtype)][1])
        return ("storage", kind, obj.key, "cpu", obj.info.count)

    def reducer_override(self, obj: Any) -> Any:
        from torch._utils import _rebuild_tensor_v2

        if not isinstance(obj, _Record):
            return NotImplemented
        shape, strides, step = obj.info.shape, [], 1
        for size in reversed(shape):
            strides.append(step)
            step *= max(size, 1)
        storage = _Storage(obj.key, obj.info)
        return _rebuild_tensor_v2, (storage, 0, shape, tuple(reversed(strides)), False, OrderedDict())


def _open_record(archive: zipfile.ZipFile, file: IO[bytes], name: str, size: int) -> IO[bytes]:
    """Opens a member of the archive whose data start at a multiple of the alignment."""
    info = zipfile.ZipInfo(name)  # zipfile's own time stamp, 1980: equal weights are equal bytes
    info.file_size = size
    wide = size * 1.05 > zipfile.ZIP64_LIMIT
    start = file.tell() + 30 + len(name.encode()) + (20 if wide else 0) + 4
    padding = -start % _ALIGNMENT
    info.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding  # torch marks its padding so, too
    return archive.open(info, "w", force_zip64=wide)


def _write_bytes(file: IO[bytes], tensor: torch.Tensor) -> None:
    import torch

    if tensor.numel():
        file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
