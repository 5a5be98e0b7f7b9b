"""Which words two prompts share, told by a tokenizer's tokens, and which column of a cross-attention map that makes.

Words are found in what the tokenizer makes of a prompt, so that "a cat," and "a cat" share the cat and upper case
counts only if the tokenizer says so. They are aligned as sequences; a token has a counterpart only inside an unchanged
word.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fisedit_compiler.errors import ConfigError

_LONGEST_BELIEVABLE = 100_000
_WORD_END = "</w>"
_WORD_STARTS = ("\u0120", "\u2581")  # byte-level BPE's and SentencePiece's mark of a blank before a token

Aligned = Literal["unchanged", "replaced"]


@dataclass(frozen=True)
class Word:
    """One word of a prompt.

    Attributes:
        text: as the prompt has it (as the tokenizer has it, for tokenizers that do not tell places).
        ids: its tokens; two words are the same if these are.
        start: place of the first of them among the prompt's tokens, the start token included.
    """

    text: str
    ids: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class Words:
    """A prompt as words: ``first`` tokens before them (a start token or nothing), ``count`` tokens, all counted."""

    words: tuple[Word, ...]
    first: int
    count: int

    @classmethod
    def of(cls, tokenizer: Any, prompt: str) -> Words:
        """Read a prompt with any tokenizer of ``transformers``; nothing is cut off or padded."""
        fast = bool(getattr(tokenizer, "is_fast", False))
        encoded = tokenizer(
            prompt, truncation=False, verbose=False, **({"return_offsets_mapping": True} if fast else {})
        )
        ids = [int(token) for token in encoded["input_ids"]]
        start = getattr(tokenizer, "bos_token_id", None)
        first = int(bool(ids) and start is not None and ids[0] == start)
        groups = _fast_groups(encoded, prompt) if fast else _slow_groups(tokenizer, ids)
        words = tuple(Word(text, tuple(ids[place] for place in places), places[0]) for text, places in groups)
        return cls(words, first, len(ids))


def token_columns(
    tokenizer: Any,
    source: str,
    target: str,
    *,
    length: int | None = None,
    source_length: int | None = None,
    align_padding: bool = False,
    align_replaced: bool = False,
) -> Tensor:
    """For every token of ``target``, the token of ``source`` whose column of the cross-attention map it may take.

    As ``AttentionRefine`` of prompt-to-prompt (Hertz et al., 2022), with ``align_replaced`` also as its
    ``AttentionReplace``.

    Args:
        tokenizer: the pipeline's.
        source: the base's prompt.
        target: the edited prompt.
        length: tokens of the edited prompt as the text encoder gets it, padding included; by default the tokenizer's
            limit, and the prompt's own tokens if it has none. Later tokens are cut off.
        source_length: likewise of the base's prompt; ``length`` by default.
        align_padding: also align the end token, and what follows it by its distance from the end. These tokens carry
            what the whole prompt says, so by default they keep their own columns.
        align_replaced: where as many words were replaced as they were replaced by, align them in order; tokens of
            a word take the columns of the other word's in proportion.

    Returns:
        int64 ``[length]``: places in the base's tokens, -1 for a token without counterpart.

    Raises:
        ConfigError: a length is not positive.
    """
    before, after = Words.of(tokenizer, source), Words.of(tokenizer, target)
    length = _length(tokenizer, after) if length is None else length
    source_length = length if source_length is None else source_length
    for name, value in (("length", length), ("source_length", source_length)):
        if value < 1:
            raise ConfigError(f"token_columns({name}={value}) must be at least 1 token.")
    columns = [-1] * max(length, after.count)
    for place in range(min(before.first, after.first)):
        columns[place] = place
    for how, old, new in align(before.words, after.words):
        if how == "unchanged" or align_replaced:
            for number in range(len(new.ids)):
                columns[new.start + number] = old.start + number * len(old.ids) // len(new.ids)
    end, base_end = _end(after, length), _end(before, source_length)
    columns[end:] = [-1] * (len(columns) - end)
    if align_padding:
        columns[end:] = [base_end + number for number in range(len(columns) - end)]
    # What was cut off the base's prompt has no column: its last place is the end token's.
    kept = [
        column if column < (source_length if place >= end else base_end) else -1
        for place, column in enumerate(columns[:length])
    ]
    return torch.tensor(kept, dtype=torch.int64, device="cpu")


def guided_columns(columns: Tensor, images: int = 1) -> Tensor:
    """Columns of a batch with classifier-free guidance: int64 ``[2 * images, T]``, unconditional rows of -1 first.

    Args:
        columns: int64 ``[T]`` of the prompt, as from :func:`token_columns`.
        images: per prompt.
    """
    conditional = columns.expand(images, -1)
    return torch.cat([torch.full_like(conditional, -1), conditional])


def edit_columns(pipe: Any, source: str, targets: Sequence[str], batch: int) -> Tensor:
    """Columns for the calls of a pipeline's edits: int64 ``[edits * batch, T]``, guidance told by the batch's size.

    Args:
        pipe: a diffusers pipeline with one or two tokenizers of equal words, as SDXL's.
        source: the base's prompt.
        targets: the edited prompts, whose samples lie side by side.
        batch: samples of a recorded call; 1 without guidance.
    """
    each = torch.stack([token_columns(pipe.tokenizer, source, target) for target in targets])
    if batch == 1:
        return each
    conditional = each.repeat(batch // 2, 1)
    return torch.cat([torch.full_like(conditional, -1), conditional])


def changed_words(tokenizer: Any, source: str, target: str) -> tuple[list[str], list[str]]:
    """The words of ``source`` that ``target`` has not kept, and those of ``target`` that are new, in order."""
    before, after = Words.of(tokenizer, source).words, Words.of(tokenizer, target).words
    kept = [(old, new) for how, old, new in align(before, after) if how == "unchanged"]
    old_starts, new_starts = {old.start for old, _ in kept}, {new.start for _, new in kept}
    return (
        [word.text for word in before if word.start not in old_starts],
        [word.text for word in after if word.start not in new_starts],
    )


def align(source: Sequence[Word], target: Sequence[Word]) -> list[tuple[Aligned, Word, Word]]:
    """Pairs of words in order: as many unchanged ones as possible, of those alignments the one in fewest pieces.

    Between two unchanged pieces, words are paired as replaced if there are equally many on both sides. ``difflib``
    looks for the longest piece first and so may lose words on both sides of it.
    """
    pairs = _common(source, target)
    result: list[tuple[Aligned, Word, Word]] = []
    i = j = 0
    for next_i, next_j in (*pairs, (len(source), len(target))):
        if next_i - i == next_j - j:
            result += [("replaced", *words) for words in zip(source[i:next_i], target[j:next_j], strict=True)]
        if next_i < len(source):
            result.append(("unchanged", source[next_i], target[next_j]))
        i, j = next_i + 1, next_j + 1
    return result


def _common(source: Sequence[Word], target: Sequence[Word]) -> list[tuple[int, int]]:
    """A longest common subsequence with as many neighbours that stay neighbours as possible."""
    rows, columns = len(source) + 1, len(target) + 1
    # Of the words before (i, j): the best score, and the best that ends in the pair (i - 1, j - 1).
    best = [[(0, 0)] * columns for _ in range(rows)]
    paired: list[list[tuple[int, int] | None]] = [[None] * columns for _ in range(rows)]
    for i in range(1, rows):
        for j in range(1, columns):
            if source[i - 1].ids == target[j - 1].ids:
                words, neighbours = best[i - 1][j - 1]
                score = (words + 1, neighbours)
                before = paired[i - 1][j - 1]
                if before is not None:
                    score = max(score, (before[0] + 1, before[1] + 1))
                paired[i][j] = score
            best[i][j] = max(best[i - 1][j], best[i][j - 1], paired[i][j] or (0, 0))
    pairs: list[tuple[int, int]] = []
    i, j, wanted = len(source), len(target), best[-1][-1]
    in_piece = False
    while i and j and wanted[0]:
        if paired[i][j] == wanted and (in_piece or best[i][j] == wanted):
            pairs.append((i - 1, j - 1))
            before = paired[i - 1][j - 1]
            in_piece = before is not None and (before[0] + 1, before[1] + 1) == wanted
            wanted = before if in_piece and before is not None else (wanted[0] - 1, wanted[1])
            i, j = i - 1, j - 1
        elif best[i - 1][j] == wanted:
            i -= 1
        else:
            j -= 1
    return pairs[::-1]


def _fast_groups(encoded: Any, prompt: str) -> list[tuple[str, list[int]]]:
    """Text and token places of every word. A number is one word, though CLIP's tokenizer takes digits apart."""
    groups: list[tuple[str, list[int]]] = []
    previous: tuple[int | None, int, int] = (None, 0, 0)
    for place, (word, (start, end)) in enumerate(zip(encoded.word_ids(), encoded["offset_mapping"], strict=True)):
        if word is None:
            previous = (None, 0, 0)
            continue
        number, first, last = previous
        joined = (
            start == last and last > 0 and prompt[last - 1 : last].isalnum() and prompt[start : start + 1].isalnum()
        )
        if number is not None and (word == number or joined):
            groups[-1][1].append(place)
            groups[-1] = (prompt[first:end].strip(), groups[-1][1])
            previous = (word, first, end)
        else:
            groups.append((prompt[start:end].strip(), [place]))
            previous = (word, start, end)
    return groups


def _slow_groups(tokenizer: Any, ids: list[int]) -> list[tuple[str, list[int]]]:
    """The same from the tokens' own marks of where words end or begin."""
    special = set(getattr(tokenizer, "all_special_ids", ()))
    groups: list[tuple[str, list[int]]] = []
    open_word = False
    tokens = tokenizer.convert_ids_to_tokens(ids)
    ends = any(token.endswith(_WORD_END) for token in tokens)
    for place, token in enumerate(tokens):
        if ids[place] in special:
            open_word = False
            continue
        begins = not open_word or (not ends and token.startswith(_WORD_STARTS))
        text = token.removesuffix(_WORD_END).lstrip("".join(_WORD_STARTS))
        if begins:
            groups.append((text, [place]))
        else:
            groups[-1] = (groups[-1][0] + text, [*groups[-1][1], place])
        open_word = not (ends and token.endswith(_WORD_END))
    return groups


def _length(tokenizer: Any, words: Words) -> int:
    limit = int(getattr(tokenizer, "model_max_length", 0) or 0)
    return limit if 0 < limit < _LONGEST_BELIEVABLE else words.count


def _end(words: Words, length: int) -> int:
    """Place of the end token among ``length`` tokens; a prompt that is cut off ends there, too."""
    last = words.words[-1] if words.words else None
    end = words.first if last is None else last.start + len(last.ids)
    return min(end, length - 1)
