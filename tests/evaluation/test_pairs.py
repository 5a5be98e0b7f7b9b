"""Files of pairs: what is read, and how every wrong line is named."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from fisedit_compiler.errors import FiseditError
from fisedit_compiler.evaluation.pairs.pairs import EditPair, check_prompts, parse_line, read_pairs, write_pairs

GOOD = {"input": "a cat", "edit": "dog", "output": "a dog"}


def line(**changes: Any) -> str:
    return json.dumps({name: value for name, value in (GOOD | changes).items() if value is not ...})


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    pairs = [
        EditPair("a cat", "dog", "a dog", seed=3, region=(0.0, 0.25, 1.0, 1.0), kind="object", line=1),
        EditPair("a key in fog", "to\u2028clé", "a clé", line=2),
    ]
    write_pairs(pairs, tmp_path / "pairs.jsonl")
    file = read_pairs(tmp_path / "pairs.jsonl")
    assert list(file.pairs) == pairs
    assert file.rejected == ()
    assert file.digest == hashlib.sha256((tmp_path / "pairs.jsonl").read_bytes()).hexdigest()


def test_other_fields_and_empty_lines_do_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + line(url="x").encode() + b"\r\n\r\n  \n" + line(seed=None).encode())
    assert [(pair.line, pair.seed) for pair in read_pairs(path).pairs] == [(1, None), (4, None)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("not json", "not JSON"),
        ("[1, 2]", "must be a JSON object, not list"),
        ("[" * 100_000, "not a pair"),
        (line(output=...), "the field output is missing"),
        (line(edit=..., input=...), "the field input and edit is missing"),
        (line(input=3), "input must be text, not int"),
        (line(output=" "), "output is empty"),
        (line(output=" a cat"), "the same caption"),
        (line(seed=-1), "seed must be a whole number"),
        (line(seed=True), "seed must be a whole number"),
        (line(seed=1.5), "seed must be a whole number"),
        (line(region=[0, 0, 1]), "region must be four numbers"),
        (line(region=[0, 0, 1, "1"]), "region must be four numbers"),
        (line(region=[0.5, 0, 0.5, 1]), "top < bottom"),
        (line(region=[0, 0, 1, 256]), "fractions of the picture"),
        (line(kind="colour"), "kind 'colour' is unknown"),
        (line(kind=["object"]), "is unknown"),
        (line(region=[0, 0, 1, 10**400]), "fractions of the picture"),
        (line(region=[-(10**400), 0, 1, 1]), "fractions of the picture"),
        (line(region=[0, 0, 1, float("nan")]), "fractions of the picture"),
        (line(region=[0, 0, 1, float("inf")]), "fractions of the picture"),
        (line(seed=10**400), "seed must be a whole number"),
        ('{"input": "a", "edit": "", "output": "b", "seed": ' + "9" * 5000 + "}", "not JSON that can be read"),
        (line(input="a \ud83d cat"), "input has half of a surrogate pair"),
        (line(edit="\udc00"), "edit has half of a surrogate pair"),
    ],
)
def test_a_wrong_line_is_named_and_the_others_count(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(f"{line()}\n{text}\n{line()}\n")
    file = read_pairs(path)
    assert [pair.line for pair in file.pairs] == [1, 3]
    assert [item.line for item in file.rejected] == [2]
    assert words in file.rejected[0].reason and len(file.rejected[0].reason) < 300
    assert file.problems()[0].startswith(f"{path}:2: ")


def test_a_line_that_is_not_utf8_is_named() -> None:
    with pytest.raises(ValueError, match="not UTF-8"):
        parse_line(b'{"input": "\xff"}')


def test_captions_that_are_cut_off_are_named_with_their_line(tmp_path: Path, tiny_pipe: Any) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(f"{line(output='a cat and ' * 20)}\n{line()}\n")
    file = check_prompts(tiny_pipe, read_pairs(path))
    assert [pair.line for pair in file.pairs] == [2]
    assert file.rejected[0].line == 1
    assert "the output has" in file.rejected[0].reason


def test_a_missing_file_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(FiseditError, match="--make-pairs"):
        read_pairs(tmp_path / "none.jsonl")
    with pytest.raises(FiseditError, match="name another file"):
        write_pairs([], tmp_path)
