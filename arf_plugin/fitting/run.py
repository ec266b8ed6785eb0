"""The stages of a fit, one after the other.

Each is a command of this package, or the trainer, that goes on where it stopped; so does the fit.

    data -> captions and pairs -> check -> train -> choose alpha on validation data -> evaluate -> report

OUT/ then holds ``best/`` (open_clip takes it as ``local-dir:OUT/best``), ``best.pt``, ``results.json``, ``report/``,
``config.yaml`` (``arf fit --config`` makes the same again), ``commands.sh``, ``log.txt``, and what stages have made.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import is_zipfile

from arf_plugin.ablation.launch import RunProgress, cpu_threads, follow, last_lines, parse_step, take, trainer
from arf_plugin.errors import FitError, MissingDependencyError, PoolError
from arf_plugin.files import digest, list_files, not_there, replacing, write_json
from arf_plugin.fitting import outcome, recipe
from arf_plugin.fitting.settings import NONE, FitSettings, seconds
from arf_plugin.untrusted import read_json
from arf_plugin.weights import require_known

if TYPE_CHECKING:
    from arf_plugin.anchors.pairs import RawPair

# What evaluation and report import late, and often is not installed.
EXTRAS = ("clip_benchmark", "jinja2", "matplotlib", "scipy", "torchmetrics")
TRIAL_STEPS = 8
FEWEST = 20  # pairs of the pool that retrieval is measured on
SAVE_EVERY = 200  # optimizer steps between two checkpoints that a killed run goes on from
SAY_FIRST, SAY_EVERY = 10, 60  # seconds from the first step, and between two lines of how far a training is
_PROGRESS = re.compile(rb"[a-z]+: \d+ of \d+ \w+, ")  # a line of a stage of anchor building
_BATCH_TIME = re.compile(r"Batch \(t\): ([\d.]+)")
_COMMAND = re.compile(r"^\$ ", re.M)  # in log.txt
_ERROR = re.compile(r"^arf \S+: error: .*", re.M | re.S)

Values = dict[str, tuple[str, str]]  # by flag of the trainer: what it is set to, and why


class Interrupted(KeyboardInterrupt):
    """The user has stopped the fit; says what goes on."""


class Fit:
    """One fit.

    Args:
        settings: What the user says.
        say: Called with each line for the user.
    """

    def __init__(self, settings: FitSettings, say: Callable[[str], object] = print) -> None:
        self.settings = settings
        self.say = say
        self.out = Path(settings.out)
        self.task = self.out / "task"
        self.has_pairs, self.has_captions = settings.pool != NONE, settings.captioner != NONE
        if settings.captioner_url:
            from arf_plugin.pipeline.captioner import Endpoint

            if not self.has_captions:
                raise FitError("--captioner-url needs --captioner, the name of a model of that server.")
            Endpoint(settings.captioner_url)  # or it is no address
        self.anchors = self.out / "anchors" if self.has_pairs or self.has_captions else None
        self.start = settings.start()
        self.began = time.monotonic()
        self.commands: list[str] = []
        self._lock = threading.Lock()  # of the list of commands
        self._running: set[subprocess.Popen[bytes]] = set()

    def run(self) -> dict[str, Any]:
        """Runs what is left of all stages.

        Returns:
            What ``results.json`` holds.

        Raises:
            ArfError: What `check` finds, or a stage that has failed; its last lines are in the message.
            Interrupted: The user has stopped it.
        """
        self.check()
        self.out.mkdir(parents=True, exist_ok=True)
        self._settings_file()
        (self.out / "stop").unlink(missing_ok=True)
        hub = f"; of the hub, if they are not here: {', '.join(self.fetched)}" if self.fetched else ""
        self.say(f"        weights and checkpoints will take about {self._disk / 2**30:.1f} GiB{hub}")
        self._data()
        self._say_time(self.pool if self.has_pairs else None)
        self._anchors()
        chosen = self._recipe()
        runs = self._train_all(chosen)
        self._title("choose", "alpha on validation data, evaluate")
        found = outcome.measure(self.settings, runs, self._pairs() if self.has_pairs else [])
        self._report(found["alphas"])
        write_json(self.out / "results.json", found)
        return found

    def check(self) -> None:
        """Refuses what would fail in a stage that comes after long ones.

        Raises:
            ArfError: The first of it.
        """
        from arf_plugin.anchors.task import require_files
        from arf_plugin.data.prompts import load_classnames, load_templates
        from arf_plugin.datasets.forms import read_source
        from arf_plugin.evaluation.sets import find_sets
        from arf_plugin.pipeline.captioner import require_captioner

        settings = self.settings
        require_known(settings.architecture, self.start[3] if len(self.start) > 2 else None)
        for library in EXTRAS:
            try:
                importlib.import_module(library)
            except ImportError:
                raise MissingDependencyError(library, "arf fit", "evaluation") from None
        if self.has_captions and not getattr(settings, "captioner_url", None):
            require_captioner(settings.captioner)
        if self.has_pairs:
            if settings.pool.endswith(".tar"):
                require_files(settings.pool, PoolError)
            elif not re.search(r"[*?\[{]|::|://", settings.pool) and not Path(settings.pool).exists():
                raise PoolError(f"--pool {not_there(settings.pool)}")
        for folder in settings.keep:
            find_sets(Path(folder))
        if settings.classnames:
            load_classnames(settings.classnames, "--classnames")
        if settings.templates:
            load_templates(settings.templates, "--templates")
        if not (self.task / "data.json").is_file():
            read_source(settings.images)
            if isinstance(settings.val, str):
                read_source(settings.val)
        place = next(one for one in (self.out, *self.out.absolute().parents) if one.exists())
        if not (self.out / "runs").exists() and shutil.disk_usage(place).free < self._disk:
            raise FitError(
                f"{self.out} has room for {shutil.disk_usage(place).free / 2**30:.2f} GiB, and weights and checkpoints "
                f"take about {self._disk / 2**30:.2f} GiB. Make room, or give another --out."
            )

    @property
    def fetched(self) -> list[str]:
        """What the model hub is asked for, where it is not here already."""
        model, captioner = self.settings.model, self.settings.captioner
        hub = [model] if "@" in model or model.startswith("hf-hub:") else []
        local = self.settings.captioner_url or Path(captioner).exists() or "local-dir:" in captioner
        return hub + ([captioner] if self.has_captions and not local else [])

    @property
    def _disk(self) -> float:
        """Bytes, about: of each run weights, optimizer and chosen models."""
        return 4.0 * self._size[0] * (len(self.arms) * self.settings.seeds * 4 + 3)

    def plan(self) -> dict[str, Any]:
        """What a fit would do, having looked at the images alone; writes nothing."""
        from arf_plugin.datasets.stage import DataStage

        settings = self.settings
        self.check()
        stage = DataStage(
            self.task,
            settings.images,
            settings.val,
            classnames=settings.classnames,
            templates=settings.templates,
        )
        made = stage.made
        shards = sum(shard.source[0] == "train" for shard in stage.plan())
        images = {part: len(samples) for part, samples in made.parts.items()}
        runs = len(self.arms) * settings.seeds
        disk = self._disk + sum(images.values()) * 2e5  # and the shards
        values = self._values(images["train"], shards)
        return {
            "images": images,
            "classes": len(made.classnames),
            "rejected": len(made.rejected),
            "notes": made.notes,
            "hyperparameters": values,
            "arms": self.arms,
            "runs": runs,
            "fetched": self.fetched,
            "disk": f"{disk / 2**30:.1f} GiB",
            "minutes": self._minutes(values, images, self._pool_tars if self.has_pairs else None),
        }

    @cached_property
    def arms(self) -> dict[str, list[str]]:
        """What is trained, by name: the flags of the preset beside the recipe's, and none of FLYP's."""
        preset: str = self.settings.preset
        terms, _ = recipe.PRESETS[preset]
        if not self.has_pairs:
            terms = [] if preset == "paper" else ["--arf-teacher", "start", "--arf-teacher-every", "4"]
        if self.anchors is not None:
            terms = ["--arf-anchors", str(self.anchors), *terms]
        arms = {preset if terms else "flyp": terms}
        return arms | {"flyp": []} if self.settings.baseline else arms

    @cached_property
    def pool(self) -> str:
        """The pool's tars; images with texts in another form become some first."""
        if (tars := self._pool_tars) is not None:
            return tars
        self._call("data", self.settings.pool, "--pool", "--out", self.out / "pool")
        return "::".join(map(str, list_files(self.out / "pool", ".tar")))

    @property
    def _pool_tars(self) -> str | None:
        """The pool's tars, if that is what it is given as."""
        given = self.settings.pool
        if given.endswith(".tar") or "::" in given:
            return given
        begun = Path(given, "work", "download")
        if begun.is_dir() and not (begun / "finished.json").is_file():
            raise FitError(f"{given} is not finished: run its arf download again to the end.")
        if Path(given).is_dir() and (tars := sorted(Path(given).rglob("*.tar"))):
            return "::".join(map(str, tars))
        return None

    @cached_property
    def data(self) -> dict[str, Any]:
        """What the stage of that name has made."""
        found: dict[str, Any] = read_json(self.task / "data.json", FitError)
        return found

    @cached_property
    def machine(self) -> recipe.Machine:
        """What trains."""
        return recipe.Machine.here(self.settings.device)

    # --- stages ----------------------------------------------------------------------------------------------------

    def _title(self, stage: str, text: str) -> None:
        """Announces a stage, with the time since the start."""
        minutes, secs = divmod(int(time.monotonic() - self.began), 60)
        self.say(f"[{minutes:02d}:{secs:02d}] {stage}: {text}")

    def _data(self) -> None:
        settings = self.settings
        self._title("data", settings.images)
        texts = ["--classnames", settings.classnames] if settings.classnames else []
        texts += ["--templates", settings.templates] if settings.templates else []
        self._call("data", settings.images, "--out", self.task, "--val", settings.val, *texts)
        counts = ", ".join(f"{count} {part}" for part, count in self.data["images"].items())
        self.say(f"        {counts} images of {self.data['classes']} classes ({self.data['form']})")
        for note in self.data["notes"]:
            self.say(f"        {note}")
        if rejected := (self.task / "rejected.tsv").read_text(encoding="utf-8"):
            aside = self.out / "rejected.tsv"
            _write(aside, rejected)
            self.say(f"        {len(rejected.splitlines())} images were set aside: {aside}")

    def _anchors(self) -> None:
        if self.anchors is None:
            self.say("        no pool and no captioner: the model itself is the anchor (see --preset)")
            return
        self._title("anchors", " and ".join(["captions"] * self.has_captions + ["pairs"] * self.has_pairs))
        flags: list[Any] = []
        if self.has_captions:
            flags += ["--captioner", self.settings.captioner]
            flags += ["--captioner-url", self.settings.captioner_url] if self.settings.captioner_url else []
            flags += ["--prompt", self.settings.captioner_prompt] if self.settings.captioner_prompt else []
        if self.has_pairs:
            flags += ["--pool", self.pool, *self.start]
        data = ["--train-data", self.data["train_data"]]
        self._call("anchors", *data, "--out", self.anchors, *flags, "--device", self.settings.device)
        self._title("check", "do the anchors fit the data?")
        names = ["--arf-classnames", self.task / "classnames.txt"]
        self._call("check", self.anchors, *data, *names, "--arf-missing-caption", "prompt")

    def _recipe(self) -> Values:
        samples, shards = self.data["images"]["train"], len(list_files(self.task / "train", ".tar"))
        values = self._values(samples, shards)
        if self.settings.time is not None and "--epochs" not in self.settings.own_flags:
            values = self._values(samples, shards, self._epochs_for(self.settings.time, values, samples))
        if values:
            self.say("        hyper-parameters, each with its reason; --set FLAG=VALUE sets another:")
        for flag, (value, reason) in values.items():
            self.say(f"          {flag} {value:<8} {reason}")
        return values

    def _values(self, samples: int, shards: int, epochs: int | None = None) -> Values:
        parameters, pixels = self._size
        own = self.settings.own_flags
        values = recipe.recipe(
            parameters=parameters, pixels=pixels, samples=samples, shards=shards, preset=self.settings.preset,
            pairs=self.has_pairs, machine=self.machine, epochs=epochs or int(own.get("--epochs", 0)) or None,
            batch=int(own.get("--batch-size", 0)) or None, accumulate=int(own.get("--accum-freq", 1)),
        )  # fmt: skip
        values = {flag: value for flag, value in values.items() if flag not in own}
        images = self._images_a_step(values)
        if images > samples:
            raise FitError(
                f"A step takes {images} images, and there are {samples} to train on. Lower --set batch-size."
            )
        if (workers := int(self._setting("--workers", values)) * max(1, self.machine.gpus)) > shards:
            raise FitError(f"{workers} loader workers for {shards} shards of images. Lower --set workers.")
        return values

    def _images_a_step(self, values: Values) -> int:
        micro = int(self._setting("--batch-size", values)) * int(self._setting("--accum-freq", values, "1"))
        return micro * max(1, self.machine.gpus)

    @cached_property
    def _size(self) -> tuple[int, int]:
        """Parameters of the model, and pixels of an image in one direction."""
        from arf_plugin.fitting.speed import image_size

        model = self._model[0]
        return sum(p.numel() for p in model.parameters()), image_size(model)[0]

    @cached_property
    def _model(self) -> tuple[Any, Any, Any]:
        """The model without its weights, its preprocessing and tokenizer; let go of before the long stages."""
        import torch

        from arf_plugin.evaluation.candidates import build

        return build(self.settings.architecture, None, torch.device("cpu"))

    def _say_time(self, pool: str | None) -> None:
        """Says how long what is left will take, but where `--time` does, or runs have begun, which say so."""
        if self.settings.time is None and not (self.out / "runs").exists():
            counts = self.data["images"]
            values = self._values(counts["train"], len(list_files(self.task / "train", ".tar")))
            if minutes := self._minutes(values, counts, pool):
                told = ", ".join(f"{what} {value:.1f}" for what, value in minutes.items())
                captions = "; captions, which say so themselves," if self.has_captions else ";"
                self.say(
                    f"        about {sum(minutes.values()):.1f} minutes of computing ({told}){captions} and what "
                    "starting and loading take come on top"
                )
        self.__dict__.pop("_model", None)

    def _minutes(self, values: Values, images: dict[str, int], pool: str | None) -> dict[str, float]:
        """By stage, as far as it can be told beforehand; empty if the device has no room for a try."""
        from arf_plugin.anchors.task import expand_urls
        from arf_plugin.evaluation.sets import find_sets
        from arf_plugin.fitting import kept, speed
        from arf_plugin.pipeline.execution import pick_device

        own, device = self.settings, pick_device(self.settings.device)
        held = int(self._setting("--batch-size", values))
        pairs = int(self._setting("--arf-pair-batch-size", values, str(held))) * self.has_pairs
        steps = {
            arm: speed.step_of(terms, held, pairs, self.has_captions) for arm, terms in self.arms.items()
        }
        # Runs side by side share the cores, or the GPU.
        threads = max(1, self.machine.cores // own.jobs)
        at_once = 1 if self.machine.gpus else min(own.jobs, self.machine.cores)
        precision = self._setting("--precision", values)
        try:
            of_arms, of_image = speed.measure(self._model, steps, device, precision, threads)
        except RuntimeError:  # of memory, as a rule
            return {}
        micro = (
            images["train"] // self._images_a_step(values) * int(self._setting("--accum-freq", values, "1"))
        )
        embedded = images["train"] + (speed.pool_size(expand_urls(pool)) or 0) if pool else 0
        sets = [one for folder in own.keep for one in find_sets(Path(folder))]
        seen = images.get("val", 0) + sum(one.images for one in sets) + kept.PAIRS * self.has_pairs
        mixtures = len(self.arms) * own.seeds * len(outcome.ALPHAS)
        of_runs = own.seeds * sum(of_arms.values()) * micro * int(self._setting("--epochs", values)) / at_once
        seconds = {
            "embedding": of_image * embedded,
            "training": of_runs,
            "evaluation": of_image * seen * mixtures,
        }
        return {name: round(value / 60, 2) for name, value in seconds.items() if value}

    def _epochs_for(self, time: str, values: Values, samples: int) -> int:
        """Epochs that fit into the time, from a few steps of a trial."""
        batch = self._images_a_step(values)
        log = self.out / "runs" / "trial" / "out.log"
        if not log.is_file():
            self._title("trial", f"{TRIAL_STEPS} steps, for --time {time}")
            wanted = ["--train-num-samples", min(samples, TRIAL_STEPS * batch)]
            own = [*self.settings.overrides(), "--epochs", 1, "--save-frequency", 0]
            self._call_trainer("trial", next(iter(self.arms)), values, ["--name", "trial", *wanted, *own])
        times = [float(t) for t in _BATCH_TIME.findall(log.read_text(encoding="utf-8", errors="replace"))]
        if not times:
            raise FitError(f"The trial has made no step, so --time cannot be met. Its log: {log}")
        runs = len(self.arms) * self.settings.seeds
        epoch = statistics.median(times[1:] or times) * (samples // batch)
        fit = int(seconds(time) / runs / max(epoch, 1e-6))
        if fit < 1:
            raise FitError(f"An epoch takes {epoch:.0f} s, {runs} runs of one do not fit into {time}.")
        return fit

    def _train_all(self, values: Values) -> dict[str, list[Path]]:
        """Trains every arm with every seed, some of them side by side; returns the last checkpoints."""
        with ThreadPoolExecutor(self.settings.jobs) as pool:
            runs = {
                (arm, seed): pool.submit(self._train, arm, seed, values)
                for seed in range(self.settings.seeds)
                for arm in self.arms
            }
            try:
                wait(runs.values(), return_when=FIRST_EXCEPTION)
                return {arm: [runs[arm, n].result() for n in range(self.settings.seeds)] for arm in self.arms}
            except BaseException as cause:  # of one of them, or Ctrl-C: the others finish their step and save
                (self.out / "stop").touch()
                pool.shutdown(wait=False, cancel_futures=True)
                if type(cause) is not KeyboardInterrupt:
                    raise
                self.say("        stopping after this step, and saving; Ctrl-C again stops at once")
                try:
                    wait([run for run in runs.values() if not run.cancelled()])  # for the others, forever
                except KeyboardInterrupt:
                    self._end()
                raise self._interrupted() from None

    def _train(self, arm: str, seed: int, values: Values) -> Path:
        """Trains one run, or goes on with it; returns its last checkpoint."""
        name = f"{arm}-{seed}"
        flags = ["--seed", seed, "--name", name, "--resume", "latest", "--arf-deterministic"]
        flags += ["--arf-checkpoint-every", SAVE_EVERY, "--arf-stop-file", self.out / "stop"]
        # Of epochs the last alone is saved, so that its checkpoint says that the run is finished.
        flags += [*self.settings.overrides(), "--save-frequency", self._setting("--epochs", values)]
        last = self._finished(name)
        if last is None:
            self._title("train", f"{name} ({recipe.PRESETS[arm][1]})" if arm in recipe.PRESETS else name)
        log = f"log-{name}.txt" if self.settings.jobs > 1 else "log.txt"
        progress = RunProgress(name, int(self._setting("--epochs", values)))
        how = {"finished": last is not None, "log": log, "progress": progress}
        self._call_trainer("train", arm, values, flags, **how)
        last = last or self._finished(name)
        if last is None:
            raise self._interrupted()
        return last

    def _finished(self, name: str) -> Path | None:
        """The last checkpoint of a run that has come to its end; one that a kill left truncated is none."""
        found = list_files(self.out / "runs" / name / "checkpoints", ".pt")
        whole = (path for path in found if re.fullmatch(r"epoch_\d+\.pt", path.name) and is_zipfile(path))
        return max(whole, key=lambda path: int(path.stem.removeprefix("epoch_")), default=None)

    def _pairs(self) -> list[RawPair]:
        """Pairs of the pool that no anchor uses; none where these are too few."""
        from arf_plugin.anchors.task import expand_urls
        from arf_plugin.fitting.kept import set_aside

        pairs = set_aside(expand_urls(self.pool), self.anchors, self.out / "kept.tar")
        if len(pairs) >= FEWEST:
            return pairs
        self.say(f"        {len(pairs)} pairs of the pool are no anchors: too few to measure what is kept")
        return []

    def _setting(self, flag: str, values: Values, default: str = "") -> str:
        own = self.settings.own_flags.get(flag)
        return str(own) if own is not None else values.get(flag, (default, ""))[0]

    def _report(self, alphas: dict[str, float]) -> None:
        """Makes the report, to which a fit is a grid of its arms and seeds."""
        page = self.out / "report"
        self._title("report", str(page / "index.html"))
        arms: list[dict[str, Any]] = [{"name": "before", "kind": "before"}]
        for arm, terms in self.arms.items():
            _, what = recipe.PRESETS.get(arm, (None, ""))
            kind, label = ("arf", arm) if terms else ("baseline", "FLYP")
            arms.append({"name": arm, "label": label, "what": what, "kind": kind})
        grid = {
            "name": Path(self.settings.images).name,
            "arms": arms,
            "seeds": list(range(self.settings.seeds)),
            "anchors": None if self.anchors is None else str(self.anchors),
            "data": {"task": self.data["train_data"]},
        }
        write_json(self.out / "grid.json", grid)
        wise = {arm: {"chosen": alpha} for arm, alpha in alphas.items()}
        write_json(self.out / "choices.json", {"wise": wise})
        self._call("report", self.out, "--out", page)

    # --- processes -------------------------------------------------------------------------------------------------

    def _call_trainer(self, stage: str, arm: str, values: Values, flags: list[Any], **how: Any) -> None:
        """Trains; FLYP knows no anchors, so it gets none of their values. For `how`, see `_call`."""
        terms, task = self.arms[arm], self.task
        recipes = [(flag, value) for flag, (value, _) in values.items() if terms or "arf" not in flag]
        self._call(
            *(trainer(self.machine.gpus) if self.machine.gpus > 1 else ["train"]),
            *("--train-data", self.data["train_data"], "--train-num-samples", self.data["images"]["train"]),
            *self.start,
            *("--arf-classnames", task / "classnames.txt", "--arf-templates", task / "templates.txt"),
            *("--logs", self.out / "runs", "--log-every-n-steps", 1),
            *itertools.chain(*recipes),
            *(["--device", self.settings.device] if self.settings.device != "auto" else []),
            *terms,
            *flags,
            stage=stage,
            **how,
        )

    def _call(
        self,
        *words: Any,
        stage: str | None = None,
        finished: bool = False,
        log: str = "log.txt",
        progress: RunProgress | None = None,
    ) -> None:
        """Runs a command of `arf`, or of torchrun, with its output in a log; says how far it is once a minute.

        Args:
            *words: Of the command.
            stage: What it is called, if not as the command.
            finished: Only notes the command, which an earlier fit has run.
            log: A file in the fit's folder.
            progress: Of a training.

        Raises:
            FitError: It has failed.
            Interrupted: By Ctrl-C.
        """
        argv = [str(word) for word in words]
        own = not argv[0].endswith("torchrun")
        shown, file = shlex.join(["arf", *argv] if own else argv), self.out / log
        with self._lock:
            self.commands.append(shown)
            _write(self.out / "commands.sh", "\n".join(["set -e", *self.commands]) + "\n")
        if finished:
            return
        jobs = self.settings.jobs if stage == "train" else 1
        threads = cpu_threads(max(1, self.machine.cores // jobs)) if jobs > 1 else {}
        said = 0.0

        def tell(line: bytes) -> None:
            nonlocal said
            if progress is not None and (step := parse_step(line)) is not None:
                progress.advance(step)
                now = time.monotonic()
                if not said:  # its rate is that of the steps, without what loading took
                    said, progress.started, progress.first = now - SAY_EVERY + SAY_FIRST, now, progress.images
                elif now - said >= SAY_EVERY:
                    said = now
                    self.say(f"        {progress.text()}")
            elif _PROGRESS.match(line):
                self.say(f"        {line.decode(errors='replace').rstrip()}")

        with file.open(
            "ab"
        ) as stream:  # locked as long as the process is there, whatever becomes of this one
            if not take(stream.fileno()):
                self.say("        an earlier start is still at work; waiting for its end")
                follow(file, tell, lambda: not take(stream.fileno()), stream.tell())
            stream.write(f"\n$ {shown}\n".encode())
            stream.flush()
            start = stream.tell()
            process = subprocess.Popen(
                [sys.executable, "-m", "arf_plugin.cli.main", *argv] if own else argv,
                stdout=stream,
                stderr=stream,
                env={**os.environ, **threads, "PYTHONUNBUFFERED": "1"},
                start_new_session=True,
            )
        self._running.add(process)
        try:
            follow(file, tell, lambda: process.poll() is None, start)
            status = process.wait()
        except KeyboardInterrupt:
            self._end()
            raise self._interrupted() from None
        finally:
            self._running.discard(process)
        if status in (130, -signal.SIGINT):
            raise self._interrupted()
        if status:
            lines = _COMMAND.split(last_lines(file))[-1]
            error = _ERROR.search(lines)
            raise FitError(
                f"The stage {stage or argv[0]} has failed (status {status}):\n"
                + "\n".join(f"  {line}" for line in (error[0] if error else lines).splitlines())
                + f"\nAll of it: {file}. What is finished is kept: the same command goes on."
            )

    def _end(self) -> None:
        """Ends the processes that are running."""
        for process in list(self._running):
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()

    def _interrupted(self) -> Interrupted:
        return Interrupted(f"this goes on: arf fit --config {self.out / 'config.yaml'}")

    def _settings_file(self) -> None:
        """Notes the settings; other settings in the same folder are refused.

        Raises:
            FitError: The folder holds a fit of other settings.
        """
        given = self.settings.model_dump()
        known = self.out / "settings.json"
        made = known.is_file() and (self.task / "data.json").is_file()
        other = read_json(known, FitError) if made else given
        for name, value in given.items():
            if digest(other.get(name)) != digest(value):
                raise FitError(
                    f"{self.out} holds a fit with another --{name.replace('_', '-')}: {other.get(name)!r}, "
                    f"now {value!r}. Give another --out, or remove the folder."
                )
        write_json(known, given)
        lines = [f"{n}: {json.dumps(v, ensure_ascii=False)}" for n, v in given.items() if v is not None]
        _write(self.out / "config.yaml", "\n".join(["# arf fit --config config.yaml", *lines]) + "\n")


def _write(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
