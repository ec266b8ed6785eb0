"""Writes patches/: the hook table, and fixes of upstream's bugs, as source patches for each release of open_clip.

For maintainers, after the hook table or the list of releases changed. Sources are what pip installs:

    for release in 2.29.0 2.32.0 3.3.0; do pip download --no-deps open_clip_torch==$release -d wheels; done
    python scripts/versions/make_patches.py wheels/*.whl

Every edit below must fit its file exactly as often as it says, in each release; the patches are then made by git.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = "open_clip_train"


@dataclasses.dataclass(frozen=True)
class Edit:
    """A replacement in a file of `PACKAGE`.

    Attributes:
        file: Name of the file.
        old: Text that is there.
        new: Text in its place; ``{release}`` stands for the release.
        count: How often it is there.
    """

    file: str
    old: str
    new: str
    count: int = 1


@dataclasses.dataclass(frozen=True)
class Patch:
    """A patch of a series.

    Attributes:
        name: Its file's name, without number and extension.
        why: First lines of the patch.
        edits: What it changes.
    """

    name: str
    why: str
    edits: tuple[Edit, ...]


IMPORT = "from arf_plugin.hooks import patched as arf\n"

SERIES = {
    "arf": (
        Patch(
            "flags",
            "The trainer's parser knows the --arf-* flags; a run that has some puts the hook table in force.",
            (
                Edit(
                    "params.py",
                    "    args = parser.parse_args(args)\n",
                    f"    {IMPORT}\n    arf.add_flags(parser)\n    args = parser.parse_args(args)\n",
                ),
                Edit(
                    "main.py",
                    "    args = parse_args(args)\n",
                    '    args = arf.parse_args(parse_args, args, release="{release}")\n',
                ),
                Edit(
                    "main.py",
                    "from open_clip_train.train import train_one_epoch, evaluate\n",
                    f"from open_clip_train.train import train_one_epoch, evaluate\n{IMPORT}",
                ),
            ),
        ),
        Patch(
            "model-data-loss",
            "What the trainer calls for model, data, loss and epochs goes through the rows of the hook table.",
            (
                Edit(
                    "main.py",
                    " = create_model_and_transforms(",
                    ' = arf.hook("create-model", create_model_and_transforms)(',
                    2,
                ),
                Edit("main.py", "    data = get_data(", '    data = arf.hook("get-data", get_data)('),
                Edit(
                    "main.py",
                    "    loss = create_loss(args)",
                    '    loss = arf.hook("create-loss", create_loss)(args)',
                ),
                Edit(
                    "main.py",
                    "        train_one_epoch(model,",
                    '        arf.hook("train-one-epoch", train_one_epoch)(model,',
                ),
            ),
        ),
        Patch(
            "step-checkpoints",
            "--resume goes on from a step checkpoint, in the middle of an epoch.",
            (
                Edit(
                    "main.py",
                    "resume_from = get_latest_checkpoint(",
                    'resume_from = arf.hook("latest-checkpoint", get_latest_checkpoint)(',
                ),
                Edit(
                    "main.py", " = pt_load(args.resume", ' = arf.hook("load-checkpoint", pt_load)(args.resume'
                ),
                Edit(
                    "train.py",
                    "    for i, batch in enumerate(dataloader):\n        i_accum",
                    '    for i, batch in arf.hook("count-batches", enumerate)(dataloader):\n        i_accum',
                ),
                Edit("train.py", "\nimport numpy as np\n", f"\n{IMPORT}import numpy as np\n"),
            ),
        ),
    ),
    "upstream": (
        Patch(
            "ddp-on-cpu",
            "DistributedDataParallel takes no device_ids for a module on the CPU, so two processes cannot train there.",
            (
                Edit(
                    "main.py",
                    "device_ids=[device], **ddp_args)",
                    "device_ids=None if torch.device(device).type == 'cpu' else [device], **ddp_args)",
                    2,
                ),
            ),
        ),
        Patch(
            "webdataset-end-of-shard",
            "webdataset > 0.2.86 marks the end of each shard by an empty item, which has no 'fname'.",
            (
                Edit(
                    "data.py",
                    "        assert isinstance(filesample, dict)\n",
                    "        assert isinstance(filesample, dict)\n"
                    "        if not filesample:  # the end of a shard, from webdataset > 0.2.86\n"
                    "            continue\n",
                ),
            ),
        ),
    ),
}


def main() -> int:
    flags = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    flags.add_argument("wheels", nargs="+", type=Path, help="open_clip_torch-*.whl, one per release")
    flags.add_argument("--out", type=Path, default=ROOT / "patches", help="default: patches/")
    args = flags.parse_args()
    for wheel in args.wheels:
        release = wheel.name.split("-")[1]
        for series, patches in SERIES.items():
            folder = args.out / release / series
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            write_series(wheel, release, patches, folder)
            print(f"{folder}: {len(patches)} patches")
    return 0


def write_series(wheel: Path, release: str, patches: tuple[Patch, ...], folder: Path) -> None:
    """Edits a copy of the sources, patch after patch, and writes each difference."""
    with tempfile.TemporaryDirectory() as scratch:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.startswith(f"{PACKAGE}/")]
            archive.extractall(scratch, names)
        git(scratch, "init", "-q")
        git(scratch, "add", "-A")
        for number, patch in enumerate(patches, 1):
            for edit in patch.edits:
                path = Path(scratch, PACKAGE, edit.file)
                text = path.read_text(encoding="utf-8")
                found = text.count(edit.old)
                if found != edit.count:
                    sys.exit(
                        f"{release}: {edit.file} has {found} x {edit.old!r}, expected {edit.count}: adapt {patch.name}"
                    )
                path.write_text(
                    text.replace(edit.old, edit.new.replace("{release}", release)), encoding="utf-8"
                )
            difference = git(scratch, "diff", "--no-color", "-U2")
            (folder / f"{number:04d}-{patch.name}.patch").write_text(
                f"{patch.why}\n\n{difference}", encoding="utf-8"
            )
            git(scratch, "add", "-A")


def git(folder: str, *argv: str) -> str:
    """Runs git in a folder, whatever the user's own settings are."""
    return subprocess.run(
        ["git", "-c", "core.autocrlf=false", "-c", "diff.noprefix=false", *argv],
        cwd=folder,
        check=True,
        capture_output=True,
        text=True,
    ).stdout


if __name__ == "__main__":
    sys.exit(main())
