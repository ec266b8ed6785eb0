"""What ``arf train`` adds to a run with ``--arf-*`` flags: Ctrl-C that saves, and at the end what comes next.

Several processes are torchrun's, which passes Ctrl-C on as it likes: they have ``--arf-stop-file``.
"""

from __future__ import annotations

import os
import shlex
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from arf_plugin.trainer_args import TrainerArgs


class Command:
    """The command line of an ``arf train``, and what became of it.

    Args:
        argv: The trainer's flags as they were given.

    Attributes:
        args: The trainer's namespace; None without ``--arf-*`` flags, where nothing is touched.
        asked: Whether the run is to stop after this step.
    """

    def __init__(self, argv: Sequence[str]) -> None:
        self.argv = list(argv)
        self.args: TrainerArgs | None = None
        self.asked = False
        self._process = os.getpid()

    @property
    def saves(self) -> bool:
        """Whether Ctrl-C can save a step checkpoint, asked for or not."""
        args: Any = self.args
        apart = args.distributed or getattr(args, "horovod", False) or args.remote_sync
        return not apart and self._folder is not None

    def listen(self) -> None:
        """Lets the first Ctrl-C ask to stop after the step; the second one ends the process."""
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._ask)

    def _ask(self, *_: object) -> None:
        if os.getpid() != self._process:
            return  # a loader worker, which a terminal tells, too, and which the step may still need
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self.asked = True
        os.write(2, b"\narf train: finishing this step, then saving; Ctrl-C again stops at once\n")

    @property
    def again(self) -> str:
        """The command that goes on with the run."""
        assert self.args is not None
        wanted = [("--name", self.args.name), ("--resume", "latest")]
        given = list(zip(self.argv, self.argv[1:], strict=False))
        more = [word for flag in wanted if flag not in given for word in flag]
        return shlex.join(["arf", "train", *self.argv, *more])

    def stopped_at_once(self) -> str:
        """What is left of a run that did not come to save, and what to do."""
        if self.args is None:
            return (
                "open_clip saves after whole epochs; add --resume latest and the run's --name to go on from the last. "
                "With an --arf-* flag, such as --arf-deterministic, Ctrl-C saves after the step"
            )
        if self._folder is None:
            return "nothing has been saved; the same command begins anew"
        return f"what came after the last checkpoint is lost. From there, or anew without one: {self.again}"

    @property
    def refused(self) -> bool:
        """Whether the trainer has ended without a run, as it does where there is one of this --name already."""
        args = self.args
        return (
            args is not None
            and bool(getattr(args, "log_path", None))
            and not hasattr(args, "checkpoint_path")
        )

    def finished(self) -> str | None:
        """Where the fine-tuned model is, and what comes next; None if there is none."""
        if self._folder is None or self.args is None:
            return None
        args, last = self.args, self._folder / f"epoch_{self.args.epochs}.pt"
        if not last.exists():
            return None
        start = args.pretrained or "ORIGINAL"
        if args.pretrained and not Path(args.pretrained).exists():
            start = f"{args.model}@{start}"
        ends = shlex.join([start, str(last), "--model", args.model])
        return (
            f"The model: {last}\nWhat it can do, what it has forgotten, and the mixtures between:\n"
            f"  arf interpolate {ends} --alphas --data FOLDER ..."
        )

    @property
    def _folder(self) -> Path | None:
        """Where checkpoints are; None if nowhere, or not yet."""
        args: Any = self.args
        if args is None or (args.logs or "none").lower() == "none":
            return None
        path = getattr(args, "checkpoint_path", None)
        return Path(path) if path else None
