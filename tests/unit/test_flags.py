"""Each flag of the trainer is declared once, and those of the commands are spelt as the trainer's."""

from __future__ import annotations

import argparse
import dataclasses

import pytest

from arf_plugin.cli.main import build_parser
from arf_plugin.errors import FlagError
from arf_plugin.flags import ArfConfig, add_arf_flags, spelling, wants_arf


def test_every_field_has_a_flag_that_says_its_default_where_it_is_no_switch():
    parser = argparse.ArgumentParser()
    add_arf_flags(parser)
    flags = {action.dest: action for action in parser._actions if action.dest != "help"}
    fields = {f"arf_{field.name}": field for field in dataclasses.fields(ArfConfig)}
    assert flags.keys() == fields.keys()
    for name, action in flags.items():
        default = fields[name].default
        assert action.option_strings == [spelling(fields[name].name)] and action.default is None
        shown = f"{default:g}" if isinstance(default, float) else str(default)
        assert default in (None, False, ()) or f"default: {shown}" in action.help, name


@pytest.mark.parametrize(
    "command",
    [
        ("caption", "--captioner", "c", "--out", "o"),
        ("embed", "--model", "m", "--out", "o"),
        ("probe", "--classnames", "imagenet", "--model", "m", "--out", "o"),
        ("check", "A"),
    ],
    ids=lambda command: command[0],
)
def test_task_data_is_an_older_spelling_of_train_data(command):
    parsed = [
        vars(build_parser().parse_args([*command, flag, "x.tar"])) for flag in ("--train-data", "--task-data")
    ]
    for one in parsed:
        del one["parser"]  # each is another object
    assert parsed[0] == parsed[1] and "x.tar" in parsed[0].values()


def test_a_command_line_concerns_the_plugin_if_it_has_a_flag_of_its_own_or_asks_for_help():
    assert wants_arf(["--arf-anchors=A"]) and wants_arf(["--model", "m", "-h"])
    assert not wants_arf(["--model", "m", "--train-data", "arf.tar"])


def test_a_preset_fills_in_what_is_not_given(parse):
    base = ("--train-data", "x.tar", "--arf-anchors", "A")
    ours = parse(*base, "--arf-preset", "recommended", "--batch-size", 40)
    assert (ours.pair_loss, ours.pair_weight, ours.pair_batch_size) == ("feature", 10, 10)
    assert (ours.caption_loss, ours.caption_weight) == ("contrastive", 1)
    own = parse(
        *base, "--arf-preset", "recommended", "--arf-pair-batch-size", 3, "--arf-pair-loss", "difference"
    )
    assert (own.pair_loss, own.pair_batch_size) == ("difference", 3)
    papers = [
        dataclasses.replace(parse(*base, *more), preset=None) for more in ((), ("--arf-preset", "paper"))
    ]
    assert papers[0] == papers[1] and papers[0].pair_loss == "contrastive"
    with pytest.raises(FlagError, match="--arf-preset given without --arf-anchors"):
        parse("--train-data", "x.tar", "--arf-preset", "paper")
