"""``--arf-watch``: what is seen between epochs, into the trainer's own log, TensorBoard, wandb and one file of records.

``LOGS/NAME/arf_watch.jsonl`` has one line per set and moment::

    {"format": 1, "epoch": 3, "step": 1200, "set": "pets", "images": 500, "classes": 37, "headline": "top1",
     "metrics": {"top1": 88.2, ...}, "start": 91.0, "drift": {"image_cosine": 0.93, "image_cka": 0.97, ...}, ...}

``epoch`` counts finished epochs, 0 is before the first step; ``start`` is the accuracy there. A resumed run goes on
with that file, and with the starting features beside it; where an epoch occurs twice, the later line counts.
"""

from __future__ import annotations

import datetime
import logging
import math
import warnings
from pathlib import Path
from typing import Any

import torch
from open_clip import get_input_dtype

from arf_plugin.errors import EvaluationError
from arf_plugin.evaluation.distributed import Processes
from arf_plugin.evaluation.metrics import drift
from arf_plugin.evaluation.records import FORMAT, EvalRecord, append_record, read_records
from arf_plugin.evaluation.sets import EvaluationSet
from arf_plugin.evaluation.watch import Features, Observation, Observer
from arf_plugin.files import replacing
from arf_plugin.hooks.session import EpochListener, Session, Training, autocast_of
from arf_plugin.trainer_args import TrainerArgs
from arf_plugin.untrusted import printable, require_regular

RECORDS, START = "arf_watch.jsonl", "arf_watch_start.pt"


class Watch(EpochListener):
    """Measures on sets before the first epoch and after each, with the trainer's tokenizer and transform."""

    def __init__(
        self,
        session: Session,
        args: TrainerArgs,
        sets: list[EvaluationSet],
        preprocess: Any,
        tokenizer: Any,
    ) -> None:
        device = torch.device(args.device)
        self.session, self.config = session, session.config
        self.processes = Processes.joined()
        self.observer = Observer(
            sets=sets,
            preprocess=preprocess,
            tokenizer=tokenizer,
            device=device,
            autocast=autocast_of(args.precision, device),
            amp=args.precision.startswith("amp"),
            dtype=get_input_dtype(args.precision),
            batch_size=args.batch_size,
            workers=args.workers,
            processes=self.processes,
        )
        self._folder: Path | None = None
        self._start: dict[str, float] = {}
        self._start_features: dict[str, Features] = {}

    def begin(self, training: Training) -> None:
        """Measures where training starts from, unless a resumed run has its scores already."""
        if training.args.save_logs:
            self._folder = Path(training.args.logs, training.args.name)
        known = self._known() if self.processes.first else {}
        if not self.processes.share(bool(known)):
            self._look(training, training.epoch)
        elif self.processes.first:
            self._start = {name: record["start"] for name, record in known.items()}
            accuracies = ", ".join(f"{name} {start:.1f} %" for name, start in self._start.items())
            logging.info(f"ARF watch: goes on; top-1 before training: {accuracies}")

    def after_epoch(self, training: Training) -> None:
        """Measures; an image that has become unreadable since the start does not end the training."""
        try:
            self._look(training, training.epoch + 1)
        except EvaluationError as error:
            logging.error(f"ARF watch: nothing measured after epoch {training.epoch + 1}: {error}")

    def _known(self) -> dict[str, EvalRecord]:
        """The last record of each set in the file, if it has records of all sets as they are now."""
        path = self._folder / RECORDS if self._folder else None
        if path is None or not path.is_file():
            return {}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            found = {record["set"]: record for record in read_records(path)}
        for warning in caught:
            logging.warning(f"ARF watch: {warning.message}")
        for dataset in self.observer.sets:
            record = found.get(dataset.name, {})
            same = (record.get("data"), record.get("prompts")) == (dataset.samples.digest, dataset.prompts)
            if not same or not isinstance(record.get("start"), (int, float)):
                logging.warning(
                    f"ARF watch: {path} has no scores of the set '{dataset.name}' as it is now (another version may "
                    "have measured it, or its images are others); the accuracy here counts as the start."
                )
                return {}
        if self.config.watch_drift and not self._load_features(path.with_name(START)):
            return {}
        return {dataset.name: found[dataset.name] for dataset in self.observer.sets}

    def _load_features(self, path: Path) -> bool:
        problem = None
        try:
            if path.is_file():
                require_regular(path, EvaluationError)
                self._start_features = torch.load(path, weights_only=True, map_location="cpu")
                misfits = [each.name for each in self.observer.sets if not _fit(self._start_features, each)]
                if misfits:
                    problem = f"{path} has no features of the images and classes of '{misfits[0]}'"
            else:
                problem = f"there is no {path}"
        except Exception as cause:  # a damaged archive raises many kinds
            reason = printable(str(cause).strip().partition("\n")[0])[:200] or type(cause).__name__
            problem = f"{path} cannot be read ({reason})"
        if problem is not None:
            self._start_features = {}
            logging.warning(f"ARF watch: {problem}, so drift is measured from here on.")
        return problem is None

    def _look(self, training: Training, epoch: int) -> None:
        assert self.session.model is not None, "the model is built before it trains"
        seen = self.observer.observe(self.session.model.model)
        if not self.processes.first:
            return
        if not self._start:
            self._start = {one.dataset.name: one.metrics["top1"] for one in seen}
            self._keep_features(seen)
        for one in seen:
            record = self._record(one, training.args, epoch)
            self._log(record, one.seconds)
            if self._folder is not None:
                append_record(self._folder / RECORDS, record)
            self._report(record, training)

    def _keep_features(self, seen: list[Observation]) -> None:
        if not self.config.watch_drift:
            return
        self._start_features = {one.dataset.name: one.features for one in seen}
        if self._folder is not None:
            with replacing(self._folder / START) as temporary:
                torch.save(self._start_features, temporary)

    def _record(self, one: Observation, args: TrainerArgs, epoch: int) -> EvalRecord:
        loader = self.session.loader
        assert loader is not None, "the data are built before the model trains"
        dataset, moved = one.dataset, {}
        for kind, start in self._start_features.get(dataset.name, {}).items():
            if one.features[kind].shape != start.shape:  # of another model
                logging.warning(
                    f"ARF watch: {START} holds {kind} features of another size: no drift of them."
                )
                continue
            measured = drift(one.features[kind], start)
            moved.update({f"{kind}_{name}": _number(value) for name, value in measured.items()})
        return {
            **{"format": FORMAT, "epoch": epoch, "step": epoch * loader.steps.steps_per_epoch},
            **{"set": dataset.name, "split": dataset.split, "checkpoint": f"epoch_{epoch}"},
            **{"model": args.model, "precision": args.precision},
            **{"images": dataset.images, "classes": len(dataset.classnames), "headline": "top1"},
            **{
                "metrics": one.metrics,
                "right": one.right,
                "start": self._start[dataset.name],
                "drift": moved,
            },
            **{"prompts": dataset.prompts, "data": dataset.samples.digest, "seconds": round(one.seconds, 3)},
            "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        }

    def _log(self, record: EvalRecord, seconds: float) -> None:
        metrics, when, name = record["metrics"], _when(record["epoch"]), record["set"]
        now, start, chance = metrics["top1"], record["start"], 100.0 / record["classes"]
        moved = ", ".join(
            f"{kind.replace('_', ' ').replace('cka', 'CKA')} {'none' if value is None else f'{value:.3f}'}"
            for kind, value in record["drift"].items()
        )
        logging.info(
            f"ARF watch: {when}: {name}: zero-shot top-1 {now:.2f} % "
            f"(start {start:.2f} %), mean per class {metrics['mean_per_class']:.2f} %"
            + (f"; {moved}" if moved else "")
            + f" [{record['images']} images, {seconds:.1f} s]"
        )
        if now < start * (1.0 - self.config.watch_drop):
            logging.warning(
                f"ARF watch: zero-shot accuracy on '{name}' has collapsed: {start:.1f} % before training, "
                f"{now:.1f} % {when}, {100 * (1 - now / start):.0f} % of it lost (--arf-watch-drop "
                f"{self.config.watch_drop:g}). The model forgets: train with --arf-anchors, a lower --lr or fewer "
                "--epochs, or mix the weights with those of the start (arf interpolate)."
            )
        elif record["epoch"] == 0 and start < 1.2 * chance:
            logging.warning(
                f"ARF watch: before training, accuracy on '{name}' is {start:.1f} %, and guessing among its "
                f"{record['classes']} classes gives {chance:.1f} %: a collapse would not show. Is --pretrained "
                "missing, or are the class names not those of the images?"
            )

    def _report(self, record: EvalRecord, training: Training) -> None:
        """Hands scores to the loggers that the trainer uses: by epoch, or by step in wandb, as it does itself."""
        values = {
            f"watch/{record['set']}/{name}": value
            for name, value in {**record["metrics"], **record["drift"]}.items()
            if value is not None
        }
        if training.tb_writer is not None:
            for name, value in values.items():
                training.tb_writer.add_scalar(name, value, record["epoch"])
        if training.wandb is not None:
            training.wandb.log({**values, "epoch": record["epoch"]}, step=record["step"])


def _fit(features: Any, dataset: EvaluationSet) -> bool:
    """Whether features are those of a set's images and classes, by their numbers."""
    own = features.get(dataset.name) if isinstance(features, dict) else None
    counts = {"image": dataset.images, "text": len(dataset.classnames)}
    return isinstance(own, dict) and all(
        isinstance(own.get(kind), torch.Tensor)
        and own[kind].ndim == 2
        and len(own[kind]) == count
        and own[kind].is_floating_point()
        for kind, count in counts.items()
    )


def _when(epoch: int) -> str:
    return f"after epoch {epoch}" if epoch else "before training"


def _number(value: float) -> float | None:
    return round(value, 6) if math.isfinite(value) else None
