"""`arf data` as its users run it: a folder of images to shards that the trainer trains on."""

from __future__ import annotations

import json

import torch
from PIL import Image


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
