"""Which tokens of two prompts belong together: unchanged words, by the tokenizer's own tokens."""

from __future__ import annotations

from difflib import SequenceMatcher
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fisedit_compiler.errors import ConfigError
from fisedit_compiler.models import embedded_model_path
from fisedit_compiler.pipelines.editing.words import Words, align, changed_words, guided_columns, token_columns

VOCABULARY = ["a", "cat", "dog", "the", "red", "planet", "fireworks", "quixotic", ",", "left."]
prompts = st.lists(st.sampled_from(VOCABULARY), max_size=9).map(" ".join)


@cache
def clip() -> Any:
    """Byte-level BPE with ``</w>``; knows whole words, and takes others apart."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(embedded_model_path("emoji-scenes") / "tokenizer")


@cache
def byte_level() -> Any:
    """Byte-level BPE that marks the blank before a word, without limit, start or end token."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    model = ByteLevelBPETokenizer(add_prefix_space=True)
    model.train_from_iterator(
        ["a cat and a dog on the left of the red planet"] * 4, vocab_size=280, show_progress=False
    )
    return PreTrainedTokenizerFast(tokenizer_object=model._tokenizer)


class Slow:
    """CLIP's tokenizer without word ids and offsets."""

    is_fast = False

    def __init__(self) -> None:
        self.bos_token_id, self.model_max_length = clip().bos_token_id, clip().model_max_length
        self.all_special_ids, self.convert_ids_to_tokens = clip().all_special_ids, clip().convert_ids_to_tokens

    def __call__(self, text: str, **options: Any) -> Any:
        assert "return_offsets_mapping" not in options
        return {"input_ids": clip()(text, **options)["input_ids"]}


def tokens(prompt: str) -> list[str]:
    """The prompt's tokens with start and end, without padding."""
    return clip().convert_ids_to_tokens(clip()(prompt)["input_ids"])


def pairs(source: str, target: str, **options: Any) -> list[tuple[str, str]]:
    """Aligned tokens as text, without the start token."""
    before, after = tokens(source), tokens(target)
    columns = token_columns(clip(), source, target, **options).tolist()
    assert columns[0] == 0
    return [
        (before[column].removesuffix("</w>"), after[place].removesuffix("</w>"))
        for place, column in enumerate(columns[: len(after)])
        if column >= 0 and place
    ]


def test_one_column_for_every_token_of_the_text_encoder() -> None:
    columns = token_columns(clip(), "a cat", "a red cat")
    assert columns.dtype == torch.int64 and columns.shape == (clip().model_max_length,)
    assert columns[:6].tolist() == [0, 1, -1, 2, -1, -1]
    assert bool((columns[5:] == -1).all()), "the end and what follows keep their own"
    assert token_columns(clip(), "a cat", "a red cat", length=77).shape == (77,)
    assert token_columns(byte_level(), "a cat", "a dog").shape == (Words.of(byte_level(), "a dog").count,)


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        ("a cat", "a cat", "a cat"),
        ("a cat", "a red cat", "a cat"),
        ("a red cat", "a cat", "a cat"),
        ("a cat on the left", "a dog on the left", "a on the left"),
        ("A Cat", "a cat", "a cat"),
        ("a cat, a dog", "a cat and a dog", "a cat a dog"),
        ("a cat and a dog", "a dog", "a dog"),
        ("a cat", "a cat and a cat", "a cat"),
        ("", "a cat", ""),
        ("a cat", "", ""),
        ("cat", "dog", ""),
    ],
)
def test_insertions_deletions_and_replacements(source: str, target: str, expected: str) -> None:
    found = pairs(source, target)
    assert all(old == new for old, new in found)
    assert " ".join(new for _, new in found) == expected


def test_a_repeated_word_keeps_its_neighbours() -> None:
    """Either "a" of the base would do for the count; the one before "dog" stays in its place."""
    source, target = "a cat and a dog", "a dog"
    assert token_columns(clip(), source, target)[1:3].tolist() == [4, 5]


def test_a_token_has_a_counterpart_only_within_an_unchanged_word() -> None:
    """Words that share their first tokens are other words all the same."""
    first, second = Words.of(clip(), "zebrawood").words[0], Words.of(clip(), "zebrafish").words[0]
    assert len(first.ids) > 1 and first.ids[0] == second.ids[0]
    assert pairs("a zebrawood", "a zebrafish") == [("a", "a")]
    columns = token_columns(clip(), "a zebrawood table", "a red zebrawood table")
    own = Words.of(clip(), "a red zebrawood table").words[2]
    assert columns[own.start : own.start + len(own.ids)].tolist() == [2 + n for n in range(len(own.ids))]


def test_numbers_and_punctuation() -> None:
    assert [word.text for word in Words.of(clip(), "in 2024, 3d. don't").words] == [
        "in",
        "2024",
        ",",
        "3d",
        ".",
        "don",
        "'t",
    ]
    assert changed_words(clip(), "in 2024, a cat", "in 2025, a cat!") == (["2024"], ["2025", "!"])


def test_changed_words_for_a_report() -> None:
    assert changed_words(clip(), "a cat on the left", "a Big dog on the left") == (["cat"], ["Big", "dog"])
    assert changed_words(clip(), "a cat", "a cat") == ([], [])
    assert changed_words(clip(), "", "a cat") == ([], ["a", "cat"])


def test_replaced_words_can_be_aligned() -> None:
    assert pairs("a cat on the left", "a dog on the left", align_replaced=True)[1] == ("cat", "dog")
    assert pairs("a cat here", "a big dog here", align_replaced=True) == pairs("a cat here", "a big dog here")
    long = len(Words.of(clip(), "quixotic").words[0].ids)
    assert long > 1
    columns = token_columns(clip(), "a cat left", "a quixotic left", align_replaced=True).tolist()
    assert columns[: long + 3] == [0, 1, *[2] * long, 3]
    columns = token_columns(clip(), "a quixotic left", "a cat left", align_replaced=True).tolist()
    assert columns[:4] == [0, 1, 2, 2 + long]


def test_padding_can_be_aligned_by_its_distance_from_the_end() -> None:
    columns = token_columns(clip(), "a cat", "a red cat", length=8, align_padding=True)
    assert columns.tolist() == [0, 1, -1, 2, 3, 4, 5, 6]
    columns = token_columns(clip(), "a red cat", "a cat", length=8, align_padding=True)
    assert columns.tolist() == [0, 1, 3, 4, 5, 6, 7, -1]


def test_prompts_that_are_cut_off() -> None:
    words = "a cat and a dog on the left"
    assert token_columns(clip(), words, words, length=5).tolist() == [0, 1, 2, 3, -1]
    columns = token_columns(clip(), words, f"red {words}", length=6, source_length=3)
    assert columns.tolist() == [0, -1, 1, -1, -1, -1], "the base's third token is its end"
    assert int(token_columns(clip(), words, words, length=20, source_length=6, align_padding=True).max()) == 5
    with pytest.raises(ConfigError, match="length=0"):
        token_columns(clip(), words, words, length=0)


def test_rows_for_guidance() -> None:
    columns = token_columns(clip(), "a cat", "a red cat", length=5)
    assert guided_columns(columns).tolist() == [[-1] * 5, columns.tolist()]
    assert guided_columns(columns, 2).shape == (4, 5)


@given(source=prompts, target=prompts)
def test_every_tokenizer_tells_the_same_words(source: str, target: str) -> None:
    """Words with the marks of one tokenizer, offsets of another."""
    assert [word.text for word in Words.of(Slow(), source).words] == [w.text for w in Words.of(clip(), source).words]
    assert torch.equal(token_columns(Slow(), source, target), token_columns(clip(), source, target))
    assert changed_words(byte_level(), source, target) == changed_words(clip(), source, target)


@given(prompt=prompts)
def test_equal_prompts_are_the_identity(prompt: str) -> None:
    for tokenizer in (clip(), byte_level()):
        words = Words.of(tokenizer, prompt)
        columns = token_columns(tokenizer, prompt, prompt, length=64)
        end = min(words.count - words.first, 63)  # a longer prompt is cut off, and ends there
        assert columns[:end].tolist() == list(range(end))
        assert token_columns(tokenizer, prompt, prompt, length=64, align_padding=True).tolist() == list(range(64))


@given(source=prompts, target=prompts, align_replaced=st.booleans(), align_padding=st.booleans())
def test_columns_are_in_order_and_within_the_base(
    source: str, target: str, align_replaced: bool, align_padding: bool
) -> None:
    columns = token_columns(
        clip(), source, target, length=24, source_length=20, align_replaced=align_replaced, align_padding=align_padding
    )
    found = [column for column in columns.tolist() if column >= 0]
    assert all(first <= second if align_replaced else first < second for first, second in pairwise(found))
    assert columns.shape == (24,) and int(columns.min()) >= -1 and int(columns.max()) < 20
    ids = [clip()(prompt)["input_ids"] for prompt in (source, target)]
    if not align_replaced and not align_padding:
        assert all(ids[0][column] == ids[1][place] for place, column in enumerate(columns.tolist()) if column >= 0)


@given(source=prompts, target=prompts)
def test_as_many_words_as_can_be_are_aligned(source: str, target: str) -> None:
    before, after = Words.of(clip(), source).words, Words.of(clip(), target).words
    kept = [(old, new) for how, old, new in align(before, after) if how == "unchanged"]
    assert all(old.ids == new.ids for old, new in kept)
    assert all(a.start < c.start and b.start < d.start for (a, b), (c, d) in pairwise(kept))
    assert len(kept) == longest([word.ids for word in before], [word.ids for word in after])
    matcher = SequenceMatcher(None, [word.ids for word in before], [word.ids for word in after], autojunk=False)
    assert len(kept) >= sum(block.size for block in matcher.get_matching_blocks())


def longest(first: list[Any], second: list[Any]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for item in first:
        diagonal = 0
        for place, other in enumerate(second, 1):
            above = row[place]
            row[place] = diagonal + 1 if item == other else max(row[place], row[place - 1])
            diagonal = above
    return row[-1]


def test_difflib_would_lose_words() -> None:
    source, target = "red planet a cat the", "a , cat , the red planet"
    before, after = (Words.of(clip(), prompt).words for prompt in (source, target))
    matcher = SequenceMatcher(None, [w.ids for w in before], [w.ids for w in after], autojunk=False)
    assert sum(block.size for block in matcher.get_matching_blocks()) < len(pairs(source, target)) == 3
