"""Sample ids for every kind of shard URL."""

from __future__ import annotations

import pytest

from arf_plugin.anchors.ids import sample_id, shard_name
from arf_plugin.errors import TaskDataError


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("train-0001.tar", "train-0001"),
        ("/data/a.b/train-0001.tar", "train-0001"),
        ("./x/shard.v2.tar", "shard.v2"),
        ("file:/data/00000.tar", "00000"),
        ("s3://bucket/a/00000.tar", "00000"),
        ("https://host:81/a/00000.tar?token=a/b.tar#part", "00000"),
        ("/data/what?/00000.tar", "00000"),
        ("/data/00000.tar.gz", "00000"),
        ("pipe:aws s3 cp s3://bucket/a/00000.tar -", "00000"),
        ("pipe:curl -s 'https://host/00001.tar?sig=1&x=2' | cat", "00001"),
        ("pipe:cat '/data/with space/00002.tar'", "00002"),
        ("/data/00003", "00003"),
    ],
)
def test_shard_name(url: str, name: str):
    assert shard_name(url) == name


def test_sample_id_keeps_the_key_as_it_is():
    assert (
        sample_id("s3://bucket/00000.tar", "n01440764/n01440764_10026") == "00000/n01440764/n01440764_10026"
    )


def test_a_command_without_a_tar_is_refused():
    with pytest.raises(TaskDataError, match="names no tar file"):
        shard_name("pipe:generate-samples --fast")
