"""The stages of a fit, one after the other.

Each is a command of this package, or the trainer, that goes on where it stopped; so does the fit.

    data -> captions and pairs -> check -> train -> choose alpha on validation data -> evaluate -> report

OUT/ then holds ``best/`` (open_clip takes it as ``local-dir:OUT/best``), ``best.pt``, ``results.json``, ``report/``,
``config.yaml`` (``arf fit --config`` makes the same again), ``commands.sh``, ``log.txt``, and what stages have made.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from arf_plugin.errors import FitError
from arf_plugin.files import digest, replacing, write_json
from arf_plugin.fit import outcome, recipe
from arf_plugin.fit.settings import NONE, FitSettings, seconds
from arf_plugin.untrusted import read_json

TRIAL_STEPS = 8
SAVE_EVERY = 200  # optimizer steps between two checkpoints that a killed run goes on from
_BATCH_TIME = re.compile(r"Batch \(t\): ([\d.]+)")


class Interrupted(Exception):
    """The user has stopped the fit; the same command goes on."""


@dataclasses.dataclass(frozen=True)
class Arm:
    """A way to train: its name, and its flags beside the recipe's."""

    name: str
    flags: list[str]


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
        self.start = settings.start()
        self.began = time.monotonic()
        self.commands: list[str] = []

    # --- the whole -------------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Runs what is left of all stages.

        Returns:
            What ``results.json`` holds.

        Raises:
            FitError: A stage has failed; its last lines are in the message.
            Interrupted: The user has stopped it.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        self._settings_file()
        (self.out / "stop").unlink(missing_ok=True)
        self._data()
        self._anchors()
        self._check()
        chosen = self._recipe()
        for arm in self.arms:
            for seed in range(self.settings.seeds):
                self._train(arm, seed, chosen)
        self._write_commands()
        self.title("choose", "alpha on validation data, evaluate")
        found = outcome.measure(self, [arm.name for arm in self.arms])
        self._report()
        write_json(self.out / "results.json", found)
        return found

    def plan(self) -> dict[str, Any]:
        """What a fit would do, having looked at the images alone; writes nothing."""
        from arf_plugin.datasets.stage import DataStage

        stage = DataStage(
            self.task, self.settings.images, self.settings.val, classnames=self.settings.classnames
        )
        made = stage.made
        shards = sum(shard.source[0] == "train" for shard in stage.plan())
        values = self._values(len(made.parts["train"]), shards)
        return {
            "images": {part: len(samples) for part, samples in made.parts.items()},
            "classes": len(made.classnames),
            "rejected": len(made.rejected),
            "notes": made.notes,
            "hyperparameters": {value.flag: [value.value, value.reason] for value in values},
            "arms": {arm.name: arm.flags for arm in self.arms},
            "runs": len(self.arms) * self.settings.seeds,
            "fetched": self.fetched,
            "disk": f"{self._disk(sum(map(len, made.parts.values()))) / 2**30:.1f} GiB",
        }

    @property
    def task(self) -> Path:
        """The folder of task data."""
        return self.out / "task"

    @property
    def anchors(self) -> Path | None:
        """The anchor set, if there is to be one."""
        return self.out / "anchors" if self.has_captions or self.has_pairs else None

    @property
    def has_pairs(self) -> bool:
        """Whether there is a pool for pair anchors."""
        return self.settings.pool != NONE

    @property
    def has_captions(self) -> bool:
        """Whether there is a captioner for caption anchors."""
        return self.settings.captioner != NONE

    @cached_property
    def arms(self) -> list[Arm]:
        """What is trained: the preset, and FLYP beside it."""
        terms, _ = recipe.PRESETS[self.settings.preset]
        if not self.has_pairs:
            terms = (
                []
                if self.settings.preset == "paper"
                else ["--arf-teacher", "start", "--arf-teacher-every", "4"]
            )
        anchors = ["--arf-anchors", str(self.anchors)] if self.anchors else []
        arms = [Arm(self.settings.preset if anchors or terms else "flyp", [*anchors, *terms])]
        if self.settings.baseline and arms[0].name != "flyp":
            arms.append(Arm("flyp", []))
        return arms

    @cached_property
    def fetched(self) -> list[str]:
        """What would be asked of a model hub."""
        named = (
            [self.settings.model]
            if "@" in self.settings.model or self.settings.model.startswith("hf-hub:")
            else []
        )
        captioner = self.settings.captioner
        if (
            captioner != NONE
            and not Path(captioner).exists()
            and not captioner.startswith("open_clip:local-dir:")
        ):
            named.append(captioner)
        return named

    # --- stages ----------------------------------------------------------------------------------------------------

    def title(self, stage: str, text: str) -> None:
        """Announces a stage, with the time since the start."""
        minutes, secs = divmod(int(time.monotonic() - self.began), 60)
        self.say(f"[{minutes:02d}:{secs:02d}] {stage}: {text}")

    def _data(self) -> None:
        self.title("data", self.settings.images)
        names = ["--classnames", self.settings.classnames] if self.settings.classnames else []
        self._call(
            "data", "data", self.settings.images, "--out", self.task, "--val", self.settings.val, *names
        )
        found = read_json(self.task / "data.json", FitError)
        counts = ", ".join(f"{count} {part}" for part, count in found["images"].items())
        self.say(f"        {counts} images of {found['classes']} classes ({found['form']})")
        for note in found["notes"]:
            self.say(f"        {note}")
        rejected = (self.task / "rejected.tsv").read_text(encoding="utf-8")
        if rejected:
            with replacing(self.out / "rejected.tsv") as temporary:
                temporary.write_text(rejected, encoding="utf-8")
            self.say(
                f"        {len(rejected.splitlines())} images were set aside: {self.out / 'rejected.tsv'}"
            )

    def _anchors(self) -> None:
        if self.anchors is None:
            self.say("        no pool and no captioner: the model itself is the anchor (see --preset)")
            return
        self.title("anchors", " and ".join(["captions"] * self.has_captions + ["pairs"] * self.has_pairs))
        flags: list[Any] = []
        if self.has_captions:
            flags += ["--captioner", self.settings.captioner]
            flags += ["--prompt", self.settings.captioner_prompt] if self.settings.captioner_prompt else []
        if self.has_pairs:
            flags += ["--pool", self.pool, *self.start]
        flags += ["--device", self.settings.device]
        self._call("anchors", "anchors", "--train-data", self.train_data, "--out", self.anchors, *flags)

    @cached_property
    def pool(self) -> str:
        """The pool's tars; images with texts in another form become some first."""
        given = self.settings.pool
        if given.endswith(".tar") or "::" in given or given.endswith("}.tar"):
            return given
        if Path(given).is_dir() and (tars := sorted(Path(given).rglob("*.tar"))):
            return "::".join(map(str, tars))
        self._call("data", "data", given, "--pool", "--out", self.out / "pool")
        return "::".join(map(str, sorted((self.out / "pool").glob("*.tar"))))

    @cached_property
    def train_data(self) -> str:
        """The task's training shards."""
        return str(read_json(self.task / "data.json", FitError)["train_data"])

    def _check(self) -> None:
        if self.anchors is None:
            return
        self.title("check", "do the anchors fit the data?")
        names = ["--arf-classnames", self.task / "classnames.txt"]
        self._call(
            "check",
            "check",
            self.anchors,
            "--train-data",
            self.train_data,
            *names,
            "--arf-missing-caption",
            "prompt",
        )

    def _recipe(self) -> list[recipe.Value]:
        data = read_json(self.task / "data.json", FitError)
        shards = len(list((self.task / "train").glob("*.tar")))
        values = self._values(data["images"]["train"], shards)
        if self.settings.time is not None and "epochs" not in self.settings.set:
            values = self._values(
                data["images"]["train"], shards, self._epochs_for(values, data["images"]["train"])
            )
        self.say("        hyper-parameters, each with its reason; --set FLAG=VALUE sets another:")
        for value in values:
            self.say(f"          {value.flag} {value.value:<8} {value.reason}")
        return values

    def _values(self, samples: int, shards: int, epochs: int | None = None) -> list[recipe.Value]:
        parameters, pixels = self._size
        machine = recipe.Machine.here(self.settings.device)
        epochs = epochs or int(self.settings.set.get("epochs", 0)) or None
        values = recipe.recipe(
            parameters=parameters, pixels=pixels, samples=samples, shards=shards, preset=self.settings.preset,
            pairs=self.has_pairs, machine=machine, epochs=epochs,
        )  # fmt: skip
        mine = {f"--{name.replace('_', '-')}" for name in self.settings.set}
        return [value for value in values if value.flag not in mine]

    @cached_property
    def _size(self) -> tuple[int, int]:
        """Parameters of the model, and pixels of an image in one direction."""
        import torch

        from arf_plugin.evaluation.candidates import build

        model: Any = build(self.settings.architecture, None, torch.device("cpu"))[0]
        size: Any = getattr(model.visual, "image_size", 224)
        return sum(p.numel() for p in model.parameters()), int(
            size[0] if isinstance(size, (tuple, list)) else size
        )

    def _disk(self, images: int) -> float:
        """Bytes that a fit takes, about: weights, optimizer and the chosen models of each run, and the shards."""
        runs = len(self.arms) * self.settings.seeds
        return 4.0 * self._size[0] * (runs * 4 + 3) + images * 2e5

    def _train(self, arm: Arm, seed: int, values: Sequence[recipe.Value]) -> None:
        """Trains one run, or goes on with it."""
        name = f"{arm.name}-{seed}"
        if self.finished(name) is not None:
            return
        self.title("train", f"{name} ({recipe.PRESETS[arm.name][1]})" if arm.name in recipe.PRESETS else name)
        epochs = self._setting("epochs", values)
        flags = [
            *self._trainer_flags(arm, values),
            "--seed",
            str(seed),
            "--name",
            name,
            "--save-frequency",
            epochs,
        ]
        flags += ["--resume", "latest", "--arf-checkpoint-every", str(SAVE_EVERY), "--arf-deterministic"]
        flags += ["--arf-stop-file", str(self.out / "stop"), *self.settings.overrides()]
        self._call("train", *self._trainer(), *flags, follow=True)
        if self.finished(name) is None:
            raise Interrupted

    def _trainer(self) -> list[str]:
        gpus = recipe.Machine.here(self.settings.device).gpus
        if gpus > 1:
            from arf_plugin.ablation.launch import trainer

            return trainer(gpus)
        return ["train"]

    def _trainer_flags(self, arm: Arm, values: Sequence[recipe.Value]) -> list[str]:
        pairs = [part for value in values for part in (value.flag, value.value)]
        if not arm.flags:  # FLYP knows no anchors
            pairs = [
                part for value in values if "arf" not in value.flag for part in (value.flag, value.value)
            ]
        samples = read_json(self.task / "data.json", FitError)["images"]["train"]
        device = ["--device", self.settings.device] if self.settings.device != "auto" else []
        return [
            *("--train-data", self.train_data, "--train-num-samples", str(samples), *self.start),
            *("--arf-classnames", str(self.task / "classnames.txt")),
            *("--arf-templates", str(self.task / "templates.txt")),
            *("--logs", str(self.out / "runs"), "--log-every-n-steps", "1"),
            *pairs,
            *device,
            *arm.flags,
        ]

    def _setting(self, name: str, values: Sequence[recipe.Value]) -> str:
        given = self.settings.set.get(name)
        return str(given) if given is not None else next(v.value for v in values if v.flag == f"--{name}")

    def finished(self, name: str) -> Path | None:
        """The last checkpoint of a run that has come to its end."""
        done = sorted((self.out / "runs" / name / "checkpoints").glob("epoch_[0-9]*.pt"))
        whole = [path for path in done if re.fullmatch(r"epoch_\d+\.pt", path.name)]
        return whole[-1] if whole else None

    def _epochs_for(self, values: Sequence[recipe.Value], samples: int) -> int:
        """Epochs that fit into the time, from a few steps of a trial."""
        assert self.settings.time is not None
        micro, accumulate = int(self._setting("batch-size", values)), 1
        accumulate = int(next((v.value for v in values if v.flag == "--accum-freq"), "1"))
        log = self.out / "runs" / "trial" / "out.log"
        if not log.is_file():
            self.title("trial", f"{TRIAL_STEPS} steps, for --time {self.settings.time}")
            wanted = min(samples, TRIAL_STEPS * micro * accumulate)
            flags = self._trainer_flags(self.arms[0], values)
            flags += ["--name", "trial", "--train-num-samples", str(wanted), *self.settings.overrides()]
            self._call(
                "trial", *self._trainer(), *flags, "--epochs", "1", "--save-frequency", "0", follow=True
            )
        times = [float(t) for t in _BATCH_TIME.findall(log.read_text(encoding="utf-8", errors="replace"))]
        if not times:
            raise FitError(f"The trial has made no step, so --time cannot be met. Its log: {log}")
        runs = len(self.arms) * self.settings.seeds
        epoch = statistics.median(times[1:] or times) * (samples // (micro * accumulate))
        fit = int(seconds(self.settings.time) / runs / max(epoch, 1e-6))
        if fit < 1:
            raise FitError(
                f"An epoch takes {epoch:.0f} s, {runs} runs of one do not fit into {self.settings.time}."
            )
        return fit

    def _report(self) -> None:
        runs = [
            self.out / "runs" / f"{arm.name}-{seed}"
            for arm in self.arms
            for seed in range(self.settings.seeds)
        ]
        self.title("report", str(self.out / "report" / "index.html"))
        anchors = ["--anchors", self.anchors, "--train-data", self.train_data] if self.anchors else []
        names = ["--classnames", self.task / "classnames.txt"]
        self._call(
            "report",
            "report",
            *runs,
            self.out / "records.jsonl",
            "--out",
            self.out / "report",
            *anchors,
            *names,
        )

    # --- processes -------------------------------------------------------------------------------------------------

    def _call(self, stage: str, *words: Any, follow: bool = False) -> None:
        """Runs a command of `arf` with its output in log.txt.

        The first Ctrl-C lets a training finish its step and save; a second one ends it.

        Raises:
            FitError: It has failed.
            Interrupted: By Ctrl-C.
        """
        argv = [str(word) for word in words]
        own = not argv[0].endswith("torchrun")
        command = [sys.executable, "-m", "arf_plugin.cli.main", *argv] if own else argv
        self.commands.append(shlex.join(["arf", *argv] if own else argv))
        with (self.out / "log.txt").open("ab") as log:
            log.write(f"\n$ {self.commands[-1]}\n".encode())
            log.flush()
            begin = log.tell()
            environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
            process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, start_new_session=True
            )
            status = self._wait(process, stage, follow)
        if status == 130:
            raise Interrupted
        if status:
            with (self.out / "log.txt").open("rb") as log:
                log.seek(begin)
                lines = log.read().decode("utf-8", "replace").strip().splitlines()
            last = [line for line in lines if line.startswith("arf ") and "error" in line] or lines[-15:]
            raise FitError(
                f"The stage {stage} has failed (status {status}):\n" + "\n".join(f"  {line}" for line in last[-15:]) +
                f"\nAll of it: {self.out / 'log.txt'}. What is finished is kept: the same command goes on."
            )  # fmt: skip

    def _wait(self, process: subprocess.Popen[bytes], stage: str, follow: bool) -> int:
        asked = False
        while True:
            try:
                return 130 if (status := process.wait()) in (-signal.SIGINT, 130) else status
            except KeyboardInterrupt:
                if follow and not asked:
                    asked = True
                    (self.out / "stop").touch()
                    self.say("        stopping after this step, and saving; Ctrl-C again stops at once")
                    continue
                os.killpg(process.pid, signal.SIGTERM)
                process.wait()
                raise Interrupted from None

    def _settings_file(self) -> None:
        """Notes the settings; other settings in the same folder are refused.

        Raises:
            FitError: The folder holds a fit of other settings.
        """
        given = self.settings.model_dump()
        known = self.out / "settings.json"
        if known.is_file():
            other = read_json(known, FitError)
            changed = [name for name in given if digest(other.get(name)) != digest(given[name])]
            if changed:
                raise FitError(
                    f"{self.out} holds a fit with another --{changed[0].replace('_', '-')}: {other.get(changed[0])!r}, "
                    f"now {given[changed[0]]!r}. Give another --out, or remove the folder."
                )
        write_json(known, given)
        with replacing(self.out / "config.yaml") as temporary:
            lines = [
                f"{name}: {json.dumps(value, ensure_ascii=False)}"
                for name, value in given.items()
                if value is not None
            ]
            temporary.write_text(
                "\n".join(["# arf fit --config config.yaml", *lines]) + "\n", encoding="utf-8"
            )

    def _write_commands(self) -> None:
        with replacing(self.out / "commands.sh") as temporary:
            temporary.write_text("set -e\n" + "\n".join(self.commands) + "\n", encoding="utf-8")
