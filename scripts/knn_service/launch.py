"""Runs clip-retrieval's own, unedited command line with four things that it has no options for.

    python launch.py [--stop-after SECONDS] [--models DIR] COMMAND [ARGUMENTS of clip-retrieval]

- ``back`` listens on 127.0.0.1 alone; clip-retrieval asks for every address of the machine.
- It ends with the process that started it, and after ``--stop-after`` seconds if that is given.
- ``back --clip_model none`` starts without a CLIP model. clip-retrieval loads one from a hub though queries that are
  sent as embeddings never touch it. A text or an image is then refused; it is not encoded by some other model.
- ``--models DIR`` makes open_clip's model configurations in a folder known, so that
  ``--clip_model open_clip:NAME//PATH/TO/WEIGHTS.pt`` loads a model that is on no hub.

It runs in the environment that scripts/knn_service.sh makes, which this project's own package is not installed in.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time

NO_MODEL = "none"


class NoModel:
    """Stands where clip-retrieval keeps its model; refuses what would need one."""

    def __call__(self, *args: object, **settings: object) -> None:
        """Tokenizes, prepares and encodes nothing."""
        raise RuntimeError(
            "this service was started without a CLIP model: send queries as embedding_input, or start it "
            "with --clip-model"
        )

    encode_image = encode_text = __call__


def without_model(load_clip):
    """Wraps all_clip's ``load_clip`` so that the name ``none`` loads nothing."""

    def load(clip_model: str, *args: object, **settings: object):
        if clip_model == NO_MODEL:
            return NoModel(), NoModel(), NoModel()
        return load_clip(clip_model, *args, **settings)

    return load


def on_loopback(run):
    """Wraps ``Flask.run``, which ``back`` calls with the address 0.0.0.0."""

    def run_on_loopback(app, host: str | None = None, port: int | None = None, **settings: object) -> None:
        run(app, "127.0.0.1", port, **settings)

    return run_on_loopback


def end_with(parent: int, seconds: float, status: int) -> None:
    """Ends this process once its parent is gone or its time is up."""
    last = time.monotonic() + seconds
    while os.getppid() == parent and time.monotonic() < last:
        time.sleep(0.5)
    reason = "its time is up" if os.getppid() == parent else "the process that started it is gone"
    print(f"clip-retrieval ends: {reason}", file=sys.stderr, flush=True)
    os._exit(status)  # the web server's own threads do not listen to exceptions


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stop-after", type=float, default=float("inf"), metavar="SECONDS")
    parser.add_argument("--models", metavar="DIR", help="folder of open_clip model configurations")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="COMMAND ...")
    args = parser.parse_args()
    status = 0 if args.arguments[:1] == ["back"] else 1  # a service is not done before it is stopped
    threading.Thread(target=end_with, args=(os.getppid(), args.stop_after, status), daemon=True).start()

    import all_clip
    import flask

    flask.Flask.run = on_loopback(flask.Flask.run)
    all_clip.load_clip = without_model(all_clip.load_clip)
    if args.models:
        import open_clip

        open_clip.add_model_config(args.models)
    from clip_retrieval.cli import main as clip_retrieval

    sys.argv = ["clip-retrieval", *args.arguments]
    clip_retrieval()


if __name__ == "__main__":
    main()
