"""A checkpoint that runs a command when it is unpickled: at every entry, whatever the environment asks of torch."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from types import SimpleNamespace

import open_clip
import pytest
import torch
from support import releases
from support.evaluation import save_checkpoint, save_config, write_set

from arf_plugin.cli.main import main
from arf_plugin.errors import ArfError, CheckpointError, FlagError
from arf_plugin.hooks.resume import get_latest_checkpoint, pt_load
from arf_plugin.safe_loading import safe_loading

pytestmark = releases.FOLDERS_OF_MODELS


class Command:
    """Creates a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.fixture
def mark(tmp_path, monkeypatch):
    """What a checkpoint would create; torch's environment asks to unpickle everything."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    yield tmp_path / "mark"
    assert not (tmp_path / "mark").exists()
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"  # other libraries' own affair


@pytest.fixture
def hostile(mark, tmp_path) -> list[Path]:
    """The command in torch's format, in its old one, and as a plain pickle, under the names that are read."""
    content = {
        "epoch": 1,
        "state_dict": {"a": torch.zeros(1)},
        "optimizer": {"param_groups": []},
        "more": Command(mark),
    }
    paths = [tmp_path / name for name in ("new.pt", "old.pt", "plain.pt", "pytorch_model.bin")]
    torch.save(content, paths[0])
    torch.save(content, paths[1], _use_new_zipfile_serialization=False)
    for path in paths[2:]:
        path.write_bytes(pickle.dumps(content))
    return paths


@pytest.fixture
def clip(tmp_path) -> str:
    return save_config(tmp_path / "clip")


@pytest.fixture
def named(model_configs) -> str:
    open_clip.add_model_config(model_configs)
    return "tiny-vit"


def refused(capsys, *argv: object) -> str:
    """A command ends with status 1 and a sentence."""
    assert main(list(map(str, argv))) == 1
    said = capsys.readouterr().err
    assert "Traceback" not in said and "error:" in said
    return said


@pytest.mark.process  # many commands
def test_commands(hostile, named, clip, tmp_path, capsys):
    write_set(tmp_path / "set")
    good = save_checkpoint(named, tmp_path / "good.pt", 1)
    data, out = ("--data", tmp_path / "set", "--workers", 0), tmp_path / "out.pt"
    (tmp_path / "task.csv").write_text("filepath\ttitle\tcls\n")
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    task = ("--task-data", tmp_path / "task.csv", "--classnames", tmp_path / "names.txt")
    for path in hostile:
        assert path.name in refused(capsys, "evaluate", path, "--model", named, *data)
        assert path.name in refused(capsys, "evaluate", good, path, "--wise", 0.5, "--model", named, *data)
        refused(capsys, "evaluate", "--model", named, "--pretrained", path, *data)
        assert path.name in refused(capsys, "interpolate", good, path, "--out", out)
        assert path.name in refused(capsys, "interpolate", path, good, "--out", out)
        refused(capsys, "interpolate", f"{named}@{path}", good, "--out", out)
        refused(capsys, "probe", *task, "--model", named, "--pretrained", path, "--out", out)
        refused(
            capsys, "embed", "--pool", tmp_path / "set/test/{0..1}.tar", "--out", tmp_path / "e",
            *("--model", named, "--pretrained", path),
        )  # fmt: skip
    hostile[3].rename(tmp_path / "clip" / "open_clip_pytorch_model.bin")  # as a folder of a model holds it
    refused(capsys, "evaluate", "--model", clip, *data)


def test_resuming(hostile):
    from open_clip_train.file_utils import pt_load as stock

    session = SimpleNamespace(resumed=None, version="3.3.0", model=None)
    for path in hostile:
        with pytest.raises(CheckpointError, match="is no checkpoint that can be read") as error:
            pt_load(stock, session)(str(path), map_location="cpu")
        assert path.name in str(error.value) and "\x1b" not in str(error.value)
        find = get_latest_checkpoint(lambda folder, remote, path=path: str(path), session)
        assert find(str(path.parent), False) == str(path)  # its end is looked at, and not more


def test_starting_weights_of_a_run(hostile, named):
    from arf_plugin.config import ArfConfig
    from arf_plugin.hooks.model import create_model_and_transforms

    build = create_model_and_transforms(
        open_clip.create_model_and_transforms, SimpleNamespace(config=ArfConfig(), model=None)
    )
    for path in hostile:
        with pytest.raises(FlagError, match="The model's weights cannot be loaded"):
            build(named, str(path))


def test_both_variables_at_once_are_no_way_out(mark, hostile, named, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")
    good = save_checkpoint_with_variables(named, tmp_path / "good.pt", monkeypatch)
    assert main(["interpolate", str(good), str(good), "--out", str(tmp_path / "out.pt")]) == 0
    refused(capsys, "interpolate", good, hostile[0], "--out", tmp_path / "out.pt")


def save_checkpoint_with_variables(named: str, path: Path, monkeypatch) -> Path:
    with monkeypatch.context() as clean:
        clean.delenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
        return save_checkpoint(named, path, 1)


def test_an_old_torch_is_refused(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.5.1+cu121")
    with pytest.raises(ArfError, match=r"torch 2\.5\.1\+cu121 runs code .* 2\.6 or later"), safe_loading():
        pass


def test_what_is_no_file(mark, named, tmp_path, capsys):
    """Neither a traceback nor a wait without end."""
    from open_clip_train.file_utils import pt_load as stock

    os.mkfifo(tmp_path / "fifo.pt")
    (tmp_path / "folder.pt").mkdir()
    (tmp_path / "empty.pt").touch()
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "dangling.pt").symlink_to(tmp_path / "nowhere")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"epoch": 1}, tmp_path / "bare.pt")
    torch.save({"epoch": 1e30, "state_dict": {"a": torch.zeros(1)}, "optimizer": {}}, tmp_path / "epoch.pt")
    torch.save({"epoch": 1, "state_dict": {}, "optimizer": {}}, tmp_path / "nothing.pt")
    torch.save({"epoch": 1, "state_dict": {"a": torch.zeros(1)}, "optimizer": 3}, tmp_path / "optimizer.pt")
    torch.save({}, tmp_path / "void.pt")
    torch.save({"name": "x", "state_dict": {"a": torch.zeros(1)}}, tmp_path / "mixture.pt")
    session = SimpleNamespace(resumed=None, version="3.3.0", model=None)
    names = sorted(path.name for path in tmp_path.glob("*.pt"))
    assert len(names) == 12
    for name in names:
        with pytest.raises(CheckpointError, match=name):
            pt_load(stock, session)(str(tmp_path / name), map_location="cpu")
    for name in ("fifo.pt", "folder.pt", "empty.pt", "text.pt", "dangling.pt", "list.pt", "void.pt"):
        for command in (
            ("evaluate", tmp_path / name, "--model", named, "--data", write_set(tmp_path / "set")),
        ):
            assert name in refused(capsys, *command)
    find = get_latest_checkpoint(lambda folder, remote: str(tmp_path / "fifo.pt"), session)
    with pytest.raises(CheckpointError, match="is a pipe"):
        find(str(tmp_path), False)
