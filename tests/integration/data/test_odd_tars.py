"""The real trainer and `arf check` on tars that stock open_clip trains on, and that once ended runs."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

from support import data
from support.tars import write_tar

from arf_plugin.anchors.task import scan_task_ids


def write_odd_task(folder: Path) -> str:
    """Latin-1 names in GNU's format, system files, a text in Latin-1, samples that lack something, odd members."""
    folder.mkdir()
    for shard in range(2):
        members: list[tuple[str, bytes]] = [
            (".DS_Store", b"x"),
            ("README.txt", b"a README"),
            ("._0.png", b"apple"),
        ]
        for number in range(12):
            key = f"d/stra\udcdfe_{number}"
            members += [
                (f"d/._stra\udcdfe_{number}.png", b"apple"),
                (f"{key}.png", data.image(shard * 12 + number)),
                (f"{key}.cls", str(number % 4).encode()),
                (f"{key}.txt", "Straße".encode("latin-1") if number == 5 else b"a street"),
                (f"{key}.json", b""),
                (f"{key}.pyd", b"cos\nsystem\n(S'touch PWNED'\ntR."),
            ]
        members += [("lost.txt", b"no image"), ("__MACOSX/d/._x.png", b"apple")]
        with tarfile.open(
            folder / f"{shard}.tar", "w", format=tarfile.GNU_FORMAT, errors="surrogateescape"
        ) as tar:
            for name, content in members:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    (folder / "names.txt").write_text("\n".join(data.CLASSNAMES))
    (folder / "templates.txt").write_text("a {c}\n")
    return f"{folder}/{{0..1}}.tar"


def test_train_and_check(tmp_path: Path, train, run_arf, monkeypatch):
    monkeypatch.chdir(tmp_path)
    task = write_odd_task(tmp_path / "task")
    ids = scan_task_ids(task).ids
    assert len(ids) == 24 and ids[0] == "0/d/stra\\xdfe_0"
    anchors = tmp_path / "set"
    data.write_captions(anchors, {identity: f"caption of {identity}" for identity in ids})
    for shard in range(2):
        members = []
        for number in range(4):
            members += [
                (f"._{number}.png", b"apple"),
                (f"{number}.png", data.image(500 + shard * 4 + number)),
                (f"{number}.txt", b"a pair"),
                (f"{number}.json", b""),
                (f"{number}.cls", b"cat"),
                (f"{number}.pyd", b"cos\nsystem\n(S'touch PWNED'\ntR."),
            ]
        write_tar(anchors / "pairs" / f"{shard}.tar", members)
    prompts = [
        "--arf-classnames",
        tmp_path / "task/names.txt",
        "--arf-templates",
        tmp_path / "task/templates.txt",
    ]
    flags = ["--train-data", task, "--train-num-samples", 16, "--arf-anchors", anchors]
    run = train.forked(*flags, *prompts, "--arf-missing-caption", "prompt", "--workers", 1)
    assert run.output.count("Train Epoch") == 2 and "Pair_anchor_loss" in run.output
    assert not list(tmp_path.rglob("PWNED")), "a member of the data has run"
    checked = run_arf("check", anchors, "--train-data", task, "--full")
    assert "24 of 24 samples have a caption" in checked.stdout and "all good" in checked.stdout
