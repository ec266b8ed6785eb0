"""EmojiNet's anchors through a real clip-retrieval service, and the fine-tune that uses them.

scripts/emojinet/service.sh starts it.

Serves the embeddings that the quickstart made of the pool (scripts/knn_service.sh), runs `arf anchors` with
`--backend service` from the start, compares what both searches chose, and fine-tunes ARF, seed 0, on the result.
"""

from __future__ import annotations

import argparse
import contextlib
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pyarrow.parquet as pq
from benchmarks.files import read_json, write_json
from benchmarks.trainer import TrainingError, call, train

from emojinet.quickstart import Quickstart
from emojinet.recipe import FAST, FULL
from emojinet.report import metrics

SCRIPT = Path(__file__).resolve().parent.parent / "knn_service.sh"


@contextlib.contextmanager
def serving(embeddings: Path, index: Path) -> Iterator[str]:
    """Serves an embedding folder on a free port of the loopback; yields the address.

    `arf anchors` waits for it while it starts. It ends with this process at the latest.
    """
    subprocess.run(["bash", SCRIPT, "--install-only"], check=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        "bash",
        str(SCRIPT),
        "--embeddings",
        str(embeddings),
        "--index",
        str(index),
        "--port",
        str(port),
    ]
    index.parent.mkdir(parents=True, exist_ok=True)
    with index.with_suffix(".log").open("w") as log:
        process = subprocess.Popen([*command, "--stop-after", "3600"], stdout=log, stderr=log)
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait()


def hits(anchors: Path) -> dict[tuple[str, int], float]:
    """What the search found: (query, row of the pool) -> similarity."""
    table = pq.read_table(anchors / "work" / "retrieve" / "hits", columns=["query", "row", "similarity"])
    return {(hit["query"], hit["row"]): hit["similarity"] for hit in table.to_pylist()}


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fast", action="store_true", help="after scripts/quickstart.sh --fast")
    args = parser.parse_args()
    suffix = "-fast" if args.fast else ""
    out = Path(f"runs/quickstart{suffix}")
    quickstart = Quickstart(Path(f"data/emojinet{suffix}"), out, FAST if args.fast else FULL, 1, args.fast)
    try:
        clip = quickstart.prepare()
        exact = quickstart.anchors(clip)
        quickstart.title("1/3 anchors through the service")
        with serving(exact / "work" / "pool", out / "service" / "index") as url:
            anchors = quickstart.anchors(
                clip, "anchors-service", ("--backend", "service", "--service-url", url)
            )
        here, there = hits(exact), hits(anchors)
        same = here.keys() & there.keys()
        apart = max((abs(here[hit] - there[hit]) for hit in same), default=0.0)
        quickstart.title("2/3 fine-tune ARF, seed 0, on them")
        run = quickstart.fine_tuning("arf-service-0", clip, 0, anchors)
        weights = train(run, "arf (service) seed 0")
        quickstart.title("3/3 evaluate")
        figures = out / "service" / "accuracy.json"
        sets = str(quickstart.data / "evaluation" / "test")
        call(["arf", "evaluate", str(weights), "--model", clip, "--data", sets, "--json", str(figures)])
    except (TrainingError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    result = {
        "hits": {"exact": len(here), "service": len(there), "same": len(same), "largest difference": apart},
        "accuracy": metrics(read_json(figures)["accuracy"][str(weights)]),
    }
    write_json(out / "service" / "results.json", result)
    print(f"\nThe exact search found {len(here)} hits, the service {len(there)}; {len(same)} are the same.")
    print(f"Similarities of those differ by {apart:.1e} at most.")
    scores = ", ".join(f"{name} {value:.1f}" for name, value in result["accuracy"].items())
    print(f"ARF on the service's anchors, seed 0: {scores}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
