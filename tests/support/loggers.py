"""What open_clip's loggers were given, read from the files that they write."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

VENVS = Path(__file__).parents[2] / ".venvs"
TENSORBOARD = VENVS / "tensorboard-2.21.0"  # scripts/test.sh puts it there
WANDB = VENVS / "wandb-0.31.0"  # `install_wandb` puts it there


def tensorboard_events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Scalars of TensorBoard's event files: name -> (step, value), read by TensorFlow's record format.

    A record is its length (8 bytes), a checksum (4), a protobuf message, a checksum (4).
    """
    sys.path.append(str(TENSORBOARD))
    try:
        from tensorboard.compat.proto.event_pb2 import Event
    finally:
        sys.path.remove(str(TENSORBOARD))
    found: dict[str, list[tuple[int, float]]] = {}
    for path in sorted(folder.glob("events.*")):
        content, place = path.read_bytes(), 0
        while place < len(content):
            (length,) = struct.unpack_from("<Q", content, place)
            event = Event.FromString(content[place + 12 : place + 12 + length])
            place += 12 + length + 4
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def install_wandb() -> None:
    """Puts wandb into a folder of its own, the first time."""
    if WANDB.is_dir():
        return
    partial = f"{WANDB}.incomplete"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--target", partial, "wandb==0.31.0"]
    subprocess.run(pip, check=True)
    Path(partial).rename(WANDB)


# A log as LevelDB writes it, of protobuf messages; read by a process of its own, which alone knows wandb.
HISTORY = """
import json, struct, sys
from wandb.proto.wandb_internal_pb2 import Record
content, place, record = open(sys.argv[1], 'rb').read(), 7, b''
while place + 7 <= len(content):
    if 32768 - place % 32768 < 7:  # records do not begin at the end of a block
        place += 32768 - place % 32768
        continue
    _, length, part = struct.unpack_from('<IHB', content, place)
    record, place = record + content[place + 7 : place + 7 + length], place + 7 + length
    if part not in (1, 4):  # whole, or its last part
        continue
    parsed, record = Record.FromString(record), b''
    if parsed.HasField('history'):
        print(json.dumps({item.key or '/'.join(item.nested_key): json.loads(item.value_json)
            for item in parsed.history.item}))
"""


def wandb_history(records: Path) -> list[dict[str, Any]]:
    """The lines of a run's history in wandb's file of an offline run."""
    argv = [sys.executable, "-c", HISTORY, str(records)]
    done = subprocess.run(
        argv, env={**os.environ, "PYTHONPATH": str(WANDB)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]
