"""The stage pack against plain reading of the pool's tars, and what it leaves unopened.

python scripts/bench/pack.py --json runs/bench/pack.json
python scripts/bench/pack.py --tars 40 --images 1000 --chosen 0.05

Plain reading is what a pack without an index of offsets has to do at least: `tar` to a null device over all the tars
that hold a chosen pair (with --chosen 1, all tars).
"""

from __future__ import annotations

import hashlib
import io
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from common import Bar, interleave, parser, report

from arf_plugin.anchors.tars import scan_samples
from arf_plugin.pipeline.execution import Execution
from arf_plugin.pipeline.pack import PackStage

opened: set[str] = set()


def main() -> int:
    args_parser = parser(__doc__.split("\n")[0], rounds=5)
    args_parser.add_argument("--tars", type=int, default=20, help="in the pool")
    args_parser.add_argument("--images", type=int, default=500, help="per tar")
    args_parser.add_argument("--bytes", type=int, default=60_000, help="per image, on average")
    args_parser.add_argument(
        "--needed", type=float, default=0.5, help="fraction of the tars that hold a chosen pair"
    )
    args_parser.add_argument(
        "--chosen", type=float, default=0.1, help="fraction of their pairs that are chosen"
    )
    args = args_parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tars = [
            write_tar(folder / f"pool-{i:04d}.tar", args.images, args.bytes, seed=i) for i in range(args.tars)
        ]
        needed = tars[:: max(1, round(1 / args.needed))]
        sparse = choose(folder / "sparse", needed, args.chosen)
        whole = choose(folder / "whole", tars, 1.0)
        packs = {
            f"arf pack, {args.chosen:.0%} of {len(needed)} tars": pack(folder / "a", sparse),
            f"tar reads {len(needed)} tars": lambda: read(needed),
            f"arf pack, all of {args.tars} tars": pack(folder / "b", whole),
            f"tar reads {args.tars} tars": lambda: read(tars),
            f"cp copies {args.tars} tars": lambda: copy(tars, folder / "copy.tar"),
        }
        sys.addaudithook(lambda event, given: opened.add(str(given[0])) if event == "open" else None)
        pack(folder / "c", sparse)()
        unneeded = set(map(str, tars)) - set(map(str, needed))
        touched = len(unneeded & opened)
        assert set(map(str, needed)) <= opened, "the audit hook sees what is opened"
        before = bytes_read()
        pack(folder / "d", sparse)()
        wanted = sum(pq.read_table(sparse / "pairs.parquet")["size"].to_pylist())
        excess = (bytes_read() - before) / wanted
        timed = interleave(packs, args.rounds)
        rates = [megabytes / statistics.median(seconds) for megabytes, seconds in zip(
            (wanted / 1e6, size(needed), size(tars), size(tars), size(tars)), timed.values(), strict=True)]  # fmt: skip
    facts: dict[str, object] = {
        "pool": f"{args.tars} tars, {size_text(args)}",
        "opened": f"{len(needed)} of {args.tars} tars; {touched} that hold no chosen pair",
    }
    facts |= {f"{variant}, MB/s": f"{rate:.0f}" for variant, rate in zip(timed, rates, strict=True)}
    bars = [
        Bar("tars opened that hold no chosen pair", touched, 0),
        Bar("bytes read, of the bytes of the chosen images", excess, 1.1),
    ]
    return report("pack: cost of copying pairs", timed, bars, args.json, **facts)


def write_tar(path: Path, images: int, mean: int, seed: int) -> Path:
    """Writes a pool tar with images as opaque as JPEGs are: an intact frame around random bytes."""
    rng = np.random.default_rng(seed)
    with tarfile.open(path, "w") as tar:
        for i in range(images):
            data = b"\xff\xd8" + rng.bytes(int(rng.integers(mean // 2, 3 * mean // 2))) + b"\xff\xd9"
            for name, content in ((f"{i:06d}.jpg", data), (f"{i:06d}.txt", f"picture {i}".encode())):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def choose(out: Path, tars: list[Path], fraction: float) -> Path:
    """Writes the list of pairs that the stage retrieve would hand on: every n-th of these tars."""
    rows = []
    for path in tars:
        for i, sample in enumerate(scan_samples(str(path), read=("jpg",))):
            if sample.image is not None and int(i * fraction) != int((i + 1) * fraction):
                place = {"offset": sample.image.offset, "size": sample.image.size, "ext": "jpg"}
                place["sha256"] = hashlib.sha256(sample.image.data or b"").hexdigest()
                known = {"id": f"{path.stem}/{sample.key}", "tar": str(path), "caption": f"picture {i}"}
                found = {"similarity": 0.5, "query_count": 1, "queries": ["q"], "query_similarities": [0.5]}
                rows.append({"row": len(rows), "image_path": sample.key} | known | place | found)
    out.mkdir()
    pq.write_table(pa.Table.from_pylist(rows), out / "pairs.parquet")
    return out


def pack(out: Path, retrieved: Path):
    """Packs all shards, over whatever an earlier call has left."""
    stage = PackStage(out, retrieved)
    shards = stage.plan()
    return lambda: [stage.process(shard, Execution(), lambda count: None) for shard in shards]


def read(tars: list[Path]) -> None:
    for path in tars:
        with Path(os.devnull).open("wb") as nowhere:
            subprocess.run(["tar", "-xOf", str(path)], stdout=nowhere, check=True)


def copy(tars: list[Path], out: Path) -> None:
    with out.open("wb") as file:
        for path in tars:
            with path.open("rb") as source:
                os.sendfile(file.fileno(), source.fileno(), 0, path.stat().st_size)
        file.flush()
        os.fsync(file.fileno())


def bytes_read() -> int:
    """Bytes that this process has read, from disk or cache."""
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


def size(tars: list[Path]) -> float:
    return sum(path.stat().st_size for path in tars) / 1e6


def size_text(args) -> str:
    return f"{args.images} images each of about {args.bytes:,} bytes"


if __name__ == "__main__":
    sys.exit(main())
