"""Makes the mistakes that people make, for real, and notes what is said: docs/mistakes.json, then docs/mistakes.md.

    python scripts/mistakes.py            make them, in a minute or two, and write docs/mistakes.json
    python scripts/mistakes.py --check    exit with status 1 if something else is said
    python scripts/tables.py              puts the table into docs/mistakes.md

Each runs in a shell, as it is shown, in a folder with images, a pool, task data and anchors. One disk is filled: that
takes `unshare`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
FILE = ROOT / "docs" / "mistakes.json"
sys.path.insert(0, str(ROOT / "tests"))

DATA = "--train-data 'task/train/{000000..000007}.tar'"
NAMES = "--arf-classnames task/classnames.txt"
# What every training has beside what is shown.
REST = "--model local-dir:clip --batch-size 8 --workers 1 --epochs 50 --lr 1e-5 --warmup 1 --device cpu --logs runs"
ROOM = "mount -t tmpfs -o size=1m none small"


class Mistake(NamedTuple):
    """A mistake; ``...`` in its command stands for `REST`, the first of which may be given again."""

    name: str
    command: str
    lacks: str = ""  # a library that is not installed
    disk: bool = False  # small/ is a disk without room
    ctrl_c: bool = False  # is pressed after the first step
    after: bool = False  # the mistake before, whose run is there


MISTAKES = (
    Mistake("a wrong path", "arf fit my-imags --model local-dir:clip"),
    Mistake(
        "images, not a folder of them; a glob without quotes",
        "arf fit my-images/cross/*.jpg --model local-dir:clip",
    ),
    Mistake(
        "a glob where the trainer takes braces", f"arf train --train-data 'task/train/*.tar' {NAMES} ..."
    ),
    Mistake("braces without quotes", f"arf train --train-data task/train/{{000000..000007}}.tar {NAMES} ..."),
    Mistake(
        "a folder where tars are named", f"arf anchors {DATA} --pool pool --model local-dir:clip --out new"
    ),
    Mistake("anchors of other data", f"arf train {DATA} {NAMES} --arf-anchors anchors-of-other-data ..."),
    Mistake("class names of other data", f"arf train {DATA} --arf-classnames cat-and-dog.txt ..."),
    Mistake("forgotten class names", f"arf train {DATA} --arf-anchors anchors ..."),
    Mistake(
        "a file of class names that is not there", f"arf train {DATA} --arf-classnames task/classname.txt ..."
    ),
    Mistake("a wrong model", "arf fit my-images --model ViT-B-61@openai"),
    Mistake("wrong weights", "arf fit my-images --model ViT-B-32-quickgelu@opnai"),
    Mistake("a captioner that is none", "arf fit my-images --model local-dir:clip --captioner captionr/"),
    Mistake("a full disk", "arf fit my-images --model local-dir:clip --out small/fit", disk=True),
    Mistake("a full disk, training", f"arf train {DATA} {NAMES} ... --logs small --name mine", disk=True),
    Mistake("a missing extra", "arf fit my-images --model local-dir:clip", lacks="matplotlib"),
    Mistake(
        "a batch above the data", "arf fit my-images --model local-dir:clip --set batch-size=512 --dry-run"
    ),
    Mistake("the same, training", f"arf train {DATA} {NAMES} ... --batch-size 512"),
    Mistake("more workers than shards", f"arf train {DATA} {NAMES} ... --workers 12"),
    Mistake("Ctrl-C", f"arf train {DATA} {NAMES} ... --name mine", ctrl_c=True),
    Mistake("a name that is taken", f"arf train {DATA} {NAMES} ... --name mine", after=True),
)


def prepare(root: Path) -> None:
    """Writes what the commands name."""
    from support import building, data

    from arf_plugin.anchors.task import scan_task_ids

    for n in range(60):
        path = root / "my-images" / building.SHAPES[n % 3] / f"{n}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(building.drawing(n))
    building.write_pool(root / "pool")
    building.save_tiny_clip(root / "clip")
    (root / "small").mkdir()
    (root / "cat-and-dog.txt").write_text("cat\ndog\n")
    (root / "without" / "matplotlib").mkdir(parents=True)
    missing = "raise ModuleNotFoundError(\"No module named 'matplotlib'\")\n"
    (root / "without" / "matplotlib" / "__init__.py").write_text(missing)
    status, output = run(root, "arf data my-images --out task")
    if status:
        raise SystemExit(output)
    ids = scan_task_ids("task/train/{000000..000007}.tar").ids
    data.write_captions(root / "anchors", {one: "a shape" for one in ids})
    data.write_captions(root / "anchors-of-other-data", {f"cats/{n:06d}": "a cat" for n in range(50)})


def run(root: Path, command: str, mistake: Mistake | None = None) -> tuple[int, str]:
    """Exit status and output of a command in the shell's words: in a fork, but where it needs a world of its own."""
    from support import forks

    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "80"}
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    output = root / "output"
    output.write_text("")
    if mistake is not None and (mistake.disk or mistake.lacks):
        environment["PYTHONPATH"] = f"{root / 'without'}:{path}" if mistake.lacks else path
        script = f'arf() {{ "$PYTHON" -m arf_plugin.cli.main "$@"; }}; {command}'
        own = ["unshare", "-rm"] if mistake.disk else []
        script = f"{ROOM} && {script}" if mistake.disk else script
        with output.open("wb") as stream:
            done = subprocess.run(
                [*own, "bash", "-c", script], stdout=stream, stderr=stream, check=False,
                env=environment | {"PYTHON": sys.executable},
            )  # fmt: skip
        return done.returncode, output.read_text()
    words = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {command}"], capture_output=True, text=True, check=True
    )
    process = forks.start("arf_plugin.cli.main", words.stdout.split("\0")[1:-1], environment, output)
    while mistake is not None and mistake.ctrl_c and process.exitcode is None:
        time.sleep(0.1)
        if "Train Epoch" in output.read_text():
            os.killpg(process.pid, signal.SIGINT)
            break
    process.join()
    return process.exitcode, output.read_text()


def said(output: str, root: Path) -> str:
    """The sentence that a command has ended with."""
    last = re.split(r"^arf(?: \w+)?: (?:error: )?", output, flags=re.M)[-1].strip()
    last = re.sub(r"\n[IWE]\d{4} .*", "", last, flags=re.S)  # what torch's compiler says at the end
    text = re.sub(r"\bstep \d+\b", "step N", last)
    return text.replace(f"{root}/", "").replace(REST, "...")


def main() -> int:
    """Makes all of them."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve()
        os.chdir(root)  # before there are processes to fork
        prepare(root)
        for mistake in MISTAKES:
            if not mistake.after:
                shutil.rmtree("runs", ignore_errors=True)
            status, output = run(root, mistake.command.replace("...", REST), mistake)
            words = said(output, root)
            found.append(
                {"mistake": mistake.name, "command": mistake.command, "status": status, "said": words}
            )
            print(f"$ {mistake.command}   ({status})\n{words}\n", flush=True)
    text = json.dumps(found, indent=1, ensure_ascii=False) + "\n"
    if "--check" in sys.argv:
        return int(FILE.read_text(encoding="utf-8") != text)
    FILE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
