"""`arf data` as its users run it: a folder of images to shards that the trainer trains on."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import torch
from PIL import Image
from support import building, hub


def test_folders_of_images_train(run_arf, train, tmp_path):
    for n in range(24):
        torch.manual_seed(n)
        path = tmp_path / "my images" / ["a cat", "dog"][n % 2] / f"IMG {n}{['.JPG', '.png'][n // 2 % 2]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(torch.randint(0, 256, (40, 30, 3), dtype=torch.uint8).numpy()).save(path)
    (tmp_path / "my images" / "dog" / "broken.jpeg").write_bytes(b"\xff\xd8\xff no more")
    out = tmp_path / "task"
    command = ("data", tmp_path / "my images", "--val", 0.2, "--shard-size", 5, "--out", out, "--json")
    plan = json.loads(run_arf(*command, "--dry-run").stdout)
    assert plan["samples"] == 24 and not out.exists()
    done = json.loads(run_arf(*command).stdout)
    assert done["images"] == {"train": 20, "val": 4} and done["rejected"] == 1
    again = run_arf(*command)
    assert "nothing left to do" in again.stderr and json.loads(again.stdout)["images"] == done["images"]

    flags = ["--train-data", done["train_data"], "--train-num-samples", 20]
    flags += ["--arf-classnames", out / "classnames.txt", "--arf-templates", out / "templates.txt"]
    run = train.forked(*flags, name="run")
    assert "Train Epoch" in run.output

    missing = run_arf("data", tmp_path / "my image", "--out", tmp_path / "x", check=False)
    assert missing.returncode == 1 and "Did you mean 'my images'?" in missing.stderr


def test_a_pool_on_the_hub_is_copied_and_made(run_arf, tmp_path):
    """`hf://` by huggingface_hub's own file system, as it speaks to a hub."""
    images = {f"{n}.png": building.drawing(n, "PNG") for n in range(12)}
    rows = [json.dumps({"file_name": name, "text": f"drawing {name}"}) for name in images]
    files = {f"train/{name}": data for name, data in images.items()} | {"README.md": b"# drawings"}
    with hub.Hub({**files, "train/metadata.jsonl": "\n".join(rows).encode()}) as server:
        command = ("data", f"hf://datasets/{hub.NAME}", "--pool", "--out", tmp_path / "pool", "--json")
        refused = run_arf(*command, "--dry-run", check=False)
        assert refused.returncode == 1 and "not on this machine" in refused.stderr

        def arf():  # a process of its own: huggingface_hub reads the environment once
            own = {**os.environ, "HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0"}
            words = [sys.executable, "-m", "arf_plugin.cli.main", *map(str, command)]
            done = subprocess.run(words, env=own, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            return json.loads(done.stdout)

        done = arf()
        assert done["images"] == {"train": 12} and done["rejected"] == 0
        read = len(server.read)
        assert arf()["images"] == {"train": 12}
        assert len(server.read) == read
