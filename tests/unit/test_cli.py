"""What the parser of `arf` says of words that are mistyped, and to a shell that completes them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from arf_plugin.anchors.task import in_braces
from arf_plugin.cli.main import main


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian"], "Did you mean 'train'?"),
        (["fit", "images", "--modle", "x"], "Did you mean '--model'?"),
        (["fit", "images", "--preset", "papr"], "Did you mean 'paper'?"),
        (["check", "anchors", "--trian-data=x"], "Did you mean '--train-data'?"),
        (["fit", "images", __file__, "--model", "x"], "Put it in quotes"),
    ],
)
def test_what_was_probably_meant(words, said, capsys):
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("paths", "named"),
    [
        (["a/08.tar", "a/09.tar", "a/10.tar"], "a/{08..10}.tar"),
        (["a/1.tar", "a/3.tar"], "a/1.tar::a/3.tar"),
        (["a/x.tar"], "a/x.tar"),
    ],
)
def test_files_as_the_trainer_names_them(paths, named):
    assert in_braces(paths) == named


@pytest.mark.process
def test_a_shell_is_told_what_comes_next():
    pytest.importorskip("argcomplete", reason="the extra 'completion' is not installed")
    asked = {
        "_ARGCOMPLETE": "1",
        "COMP_LINE": "arf fit --cap",
        "COMP_POINT": "13",
        "_ARGCOMPLETE_STDOUT_FILENAME": "/dev/stdout",
    }
    command = [sys.executable, "-m", "arf_plugin.cli.main"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **asked}, check=False)
    assert "--captioner" in done.stdout, done.stderr
