"""Numbers for contents: equal contents, equal numbers, and no comparison for a tensor that was seen before."""

from __future__ import annotations

import pytest
import torch

from fisedit_compiler.runtime.contents import ContentNumbers


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one at every comparison of two tensors."""
    made: list[int] = []
    equal = torch.equal
    monkeypatch.setattr(torch, "equal", lambda a, b: (made.append(1), equal(a, b))[1])
    return made


def test_equal_contents_have_one_number() -> None:
    numbers, text = ContentNumbers(), torch.randn(2, 3)
    first = numbers.of("text", text, 2)
    assert numbers.of("text", text.clone(), 2) == first
    assert numbers.of("text", text + 1, 2) != first
    assert numbers.of("image", text, 2) != first, "numbers of different inputs are not compared"


@pytest.mark.parametrize(
    "other", [torch.zeros(3, 2), torch.zeros(2, 3, dtype=torch.float64), torch.ones(2, 3)], ids=str
)
def test_shape_dtype_and_values_count(other: torch.Tensor) -> None:
    numbers = ContentNumbers()
    assert numbers.of("text", torch.zeros(2, 3), 2) != numbers.of("text", other, 2)


def test_a_tensor_seen_before_is_not_compared(compared: list[int]) -> None:
    numbers, base, edit = ContentNumbers(), torch.zeros(2), torch.ones(2)
    expected = [numbers.of("text", base, 2), numbers.of("text", edit, 2)]
    before = len(compared)
    for _ in range(3):
        assert [numbers.of("text", base, 2), numbers.of("text", edit, 2)] == expected
    assert len(compared) == before
    again = edit.clone()
    assert numbers.of("text", again, 2) == expected[1] and len(compared) == before + 1
    assert numbers.of("text", again, 2) == expected[1] and len(compared) == before + 1, "the copy is known now"


def test_a_write_in_place_is_seen() -> None:
    numbers, text = ContentNumbers(), torch.zeros(2)
    first = numbers.of("text", text, 2)
    text.add_(1)
    second = numbers.of("text", text, 2)
    assert second != first
    assert numbers.of("text", torch.zeros(2), 2) != second
    assert numbers.of("text", torch.ones(2), 2) == second


def test_a_write_to_an_inference_tensor_is_seen() -> None:
    """It has no version counter."""
    numbers = ContentNumbers()
    with torch.inference_mode():
        text = torch.zeros(2)
        first = numbers.of("text", text, 2)
        assert numbers.of("text", text, 2) == first
        text.add_(1)
        assert numbers.of("text", text, 2) != first


def test_old_contents_are_forgotten_and_their_numbers_not_given_again() -> None:
    numbers, texts = ContentNumbers(), [torch.full((2,), float(value)) for value in range(4)]
    given = [numbers.of("text", text, 2) for text in texts]
    assert len(set(given)) == 4
    assert numbers.of("text", texts[2], 2) == given[2]
    assert numbers.of("text", texts[0], 2) not in given
    numbers.clear()
    assert numbers.of("text", texts[2], 2) not in given
