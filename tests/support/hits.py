"""``arf retrieve`` and the hits that it writes, read and compared."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


def retrieve(
    arf, task: Path, pool: Path, out: Path, *more: object, k: int = 10, status: int = 0
) -> tuple[str, str]:
    return arf("retrieve", "--queries", task, "--pool", pool, "--k", k, "--out", out, *more, status=status)


def hits_of(out: Path) -> tuple[np.ndarray, np.ndarray]:
    """Rows and similarities, [queries, k]."""
    table = pa.concat_tables([pq.read_table(path) for path in sorted((out / "hits").iterdir())])
    queries = len(set(table["query_row"].to_pylist()))
    return (
        table["row"].to_numpy().reshape(queries, -1),
        table["similarity"].to_numpy().reshape(queries, -1),
    )


def assert_same_hits(one: Path, other: Path, tolerance: float = 1e-3) -> None:
    """The same similarities at every rank, and the same rows but for those that tie with the last one."""
    (rows, values), (other_rows, other_values) = hits_of(one), hits_of(other)
    np.testing.assert_allclose(values, other_values, atol=tolerance)
    for a, similarity, b, theirs in zip(rows, values, other_rows, other_values, strict=True):
        floor = min(similarity[-1], theirs[-1]) + tolerance
        assert set(a[similarity > floor]) <= set(b) and set(b[theirs > floor]) <= set(a)
        assert len(set(b)) == len(b)
