"""`arf train`: Ctrl-C saves after the step and says what goes on; the end says what comes next."""

from __future__ import annotations

import re
import shlex
from types import SimpleNamespace

import pytest
from support import releases
from support.resuming import assert_same_end, run_until, steps

from arf_plugin.hooks.command import Command

DETERMINISTIC = ("--arf-deterministic", "--aug-cfg", "scale=(0.3,1.0)", "--epochs", 2)


def goes_on(train, run, **options):
    """The run that the printed command makes."""
    (command,) = re.findall(r"goes on: arf train (.*)", run.output)
    train.argv = lambda *_: shlex.split(command)
    return train.forked(arf=True, name=run.folder.name, **options)


@pytest.mark.parametrize("release", releases.PARAMETERS)
@pytest.mark.parametrize("shape", ["anchors, accumulated", "class prompts"])
def test_ctrl_c_saves_and_the_printed_command_ends_alike(train, task, anchors, release, shape):
    """Its loader workers are told by the terminal, too; and what Ctrl-C needs changes no bit of a run."""
    flags = [*task.flags, *DETERMINISTIC, "--workers", 2]
    flags += ["--arf-anchors", anchors, "--accum-freq", 2] if "," in shape else task.prompts
    options = {"open_clip": releases.folder(release)}
    calm = train.forked(*flags, name="calm", **options)
    stopped = run_until(train, flags, 0.2, "interrupt", name="stopped", arf=True, **options)
    assert stopped.status == 130 and "Ctrl-C again stops at once" in stopped.output, stopped.output
    assert [path.suffix for path in (stopped.folder / "checkpoints").iterdir()] == [".pt"]
    resumed = goes_on(train, stopped, **options)
    assert steps(stopped.output + resumed.output) == steps(calm.output)
    assert_same_end(calm, resumed, 2)
    assert f"The model: {resumed.folder}/checkpoints/epoch_2.pt" in resumed.output


def test_a_run_that_asked_for_nothing_of_the_kind_goes_on_too(train, task):
    flags = [*task.flags, *task.prompts, "--epochs", 2]
    stopped = run_until(train, flags, 0.4, "interrupt", name="stopped", arf=True)
    assert stopped.status == 130 and "step 2 is saved" in stopped.output
    resumed = goes_on(train, stopped)
    assert "goes on after 2 of 4 batches, with the data in a fresh order" in resumed.output


def test_what_cannot_be_saved_is_not_promised(train, task):
    stopped = run_until(train, task.flags, 0.4, "interrupt", arf=True)
    assert stopped.status == 130 and "open_clip saves after whole epochs" in stopped.output
    assert "is saved" not in stopped.output and "Traceback" not in stopped.output, stopped.output
    command = Command(["--arf-freeze-bn", "--logs", "none"])
    command.args = SimpleNamespace(logs="none", distributed=False, remote_sync=None, checkpoint_path="none/x")
    assert not command.saves and "nothing has been saved" in command.stopped_at_once()


def test_a_second_ctrl_c_ends_at_once(train, task):
    flags = [*task.flags, *task.prompts, "--accum-freq", 4]
    stopped = run_until(train, flags, 0.2, "interrupt twice", arf=True)
    assert stopped.status == 130 and "what came after the last checkpoint is lost" in stopped.output
    assert not list(stopped.folder.glob("checkpoints/*.pt"))


def test_a_name_that_is_taken_is_an_error(train, task):
    flags = [*task.flags, "--arf-freeze-bn"]
    train.forked(*flags, arf=True)
    again = train.forked(*flags, arf=True, check=False)
    assert again.status == 1 and "--resume latest" in again.output


def test_its_help_calls_itself_so(run_arf):
    assert run_arf("train", "--help").stdout.startswith("usage: arf train ")
