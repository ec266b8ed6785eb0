"""What is taken out of captions, and what stays."""

from __future__ import annotations

import pytest

from arf_plugin.pipeline.caption_cleaning import Cleaning

clean = Cleaning()


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("a dog on a mat", "a dog on a mat"),
        ("  a\tdog\non \x00 a mat ", "a dog on a mat"),
        ("there is a dog on a mat", "a dog on a mat"),
        ("There are two dogs", "two dogs"),
        ("This is, in this image, a dog", "a dog"),
        ("araffe dog on a mat", "dog on a mat"),
        ("arafed view of a city", "a city"),
        ("the image shows: a city at night", "a city at night"),
        ("thistle in a field", "thistle in a field"),
        ("this isn't a dog", "this isn't a dog"),
        ("a photo of a dog", "a photo of a dog"),
        ("bye bye", "bye bye"),
        ("a very very old car", "a very very old car"),
        ("dog dog dog dog", "dog"),
        ("a dog dog dog on a mat", "a dog on a mat"),
        ("Dog, dog, dog.", "dog."),
        ("a cat and a cat and a cat and a cat", "a cat and a cat"),
        ("a man on a horse a man on a horse", "a man on a horse"),
        ("on the table on the table with a cup", "on the table with a cup"),
        ("red and white and red and white", "red and white and red and white"),
        ("çok çok çok güzel 犬 犬 犬", "çok güzel 犬"),
        ("", None),
        (" \n", None),
        ("there is", None),
        ("...!", None),
    ],
)
def test_captions(said: str, kept: str | None):
    assert clean(said) == kept


def test_a_clean_caption_stays_as_it_is():
    for said in (
        "there is dog dog dog on the mat on the mat",
        "the image shows this is a cat",
        "a b a b a b a b c c c",
    ):
        once = clean(said)
        assert once is not None and clean(once) == once


def test_settings():
    assert Cleaning(boilerplate=False, repeats=False)("there is a dog dog dog") == "there is a dog dog dog"
    assert Cleaning(prefixes=("A picture of",))("there is a picture of a dog") == "a dog"
    assert Cleaning(min_words=2)("dog") is None
    assert Cleaning(prefixes=("x",)).config() != clean.config()


def test_very_long_captions_take_no_time():
    assert clean("a " * 50_000) == "a"
    words = " ".join(map(str, range(50_000)))
    assert clean(words) == words
