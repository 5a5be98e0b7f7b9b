"""Pairs from the embedded model's grammar."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from transformers import CLIPTokenizer

from fisedit_compiler.errors import ConfigError
from fisedit_compiler.evaluation.pairs.grammar import (
    COLOURS,
    OVERLAYS,
    SCENES,
    WEATHER,
    WHOLE,
    has_plain_background,
    make_pairs,
)
from fisedit_compiler.evaluation.pairs.pairs import LOCAL_KINDS, EditPair
from fisedit_compiler.models import embedded_model_path, embedded_object_names

MANY = make_pairs(400)

CENTRES = {
    "on the left": (0.55, 0.25), "on the right": (0.55, 0.75), "in the center": (0.5, 0.5), "at the top": (0.25, 0.5),
    "at the bottom": (0.75, 0.5), "in the top left": (0.25, 0.25), "in the top right": (0.25, 0.75),
    "in the bottom left": (0.75, 0.25), "in the bottom right": (0.75, 0.75),
}  # fmt: skip


def changed_object(pair: EditPair) -> str:
    """The object of either caption that is not in the other one, with its words."""
    before, after = (re.split(r" and |, ", caption) for caption in (pair.input, pair.output))
    return next(thing for thing in after if thing not in before)


def test_the_same_seed_gives_the_same_pairs_and_none_twice() -> None:
    assert make_pairs(30, 7) == make_pairs(30, 7) != make_pairs(30, 8)
    assert make_pairs(30) == MANY[:30]
    assert len({(pair.input, pair.output) for pair in MANY}) == 400
    assert all(pair.seed is not None for pair in MANY)


def test_most_pairs_swap_an_object_and_all_kinds_occur() -> None:
    kinds = Counter(pair.kind for pair in MANY)
    assert kinds == {
        "object": 280, "background": 40, "attribute": 20, "size": 20, "add": 20, "weather": 10, "overlay": 10,
    }  # fmt: skip


def test_captions_fit_the_text_encoder_and_use_its_words() -> None:
    tokenizer = CLIPTokenizer.from_pretrained(embedded_model_path("emoji-scenes") / "tokenizer")
    words = {
        word for phrase in (*embedded_object_names(), *COLOURS, *SCENES, *WEATHER, *OVERLAYS) for word in phrase.split()
    }
    words |= {"a", "an", "and", "on", "in", "at", "the", "top", "bottom", "left", "right", "center", "background"}
    words |= {"small", "tiny", "large", "golden", "silver"}
    for pair in MANY:
        for caption in (pair.input, pair.output):
            assert len(tokenizer(caption).input_ids) <= 32, caption
            assert set(caption.replace(",", "").split()) <= words, caption


def test_the_region_holds_the_place_of_the_changed_object() -> None:
    for pair in MANY:
        assert pair.region is not None
        if pair.kind not in LOCAL_KINDS:
            assert pair.region == WHOLE
            continue
        thing = changed_object(pair)
        y, x = next(centre for words, centre in CENTRES.items() if thing.endswith(words))
        top, left, bottom, right = pair.region
        assert top < y < bottom and left < x < right, pair


def test_two_objects_have_regions_of_their_own() -> None:
    for pair in MANY:
        if pair.kind == "object" and " and " in pair.input:
            other = next(thing for thing in re.split(r" and |, ", pair.input) if thing in pair.output)
            y, x = next(centre for words, centre in CENTRES.items() if other.endswith(words))
            top, left, bottom, right = pair.region or WHOLE
            assert not (top < y < bottom and left < x < right), pair


def test_articles() -> None:
    text = " ".join(pair.output for pair in MANY)
    assert not re.search(r"\ba [aeio]|\ban [^aeiou]|\ban (uni|ufo)|\ba umb", text)


def test_plain_backgrounds_are_told_from_scenes() -> None:
    assert has_plain_background("a cat on the left, teal background")
    assert not has_plain_background("a blue cat, desert")
    assert not has_plain_background("a cat, teal background, in the rain")
    plain = sum(has_plain_background(pair.input) for pair in MANY)
    assert 150 < plain < 250


def test_a_number_below_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="from 1 to"):
        make_pairs(0)
