"""What the tests of mistakes share: a module and a recording that must be as good after each as before."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.compiled import (
    HEIGHT,
    WIDTH,
    box,
    denoise,
    model_and_compiled,
    other_text,
)

MASK = box(4, 6, 11, 15)


class Usable:
    """A module with a recording, and the check that both still work."""

    def __init__(self) -> None:
        model, self.compiled = model_and_compiled()
        self.inputs = model.make_inputs(2, HEIGHT, WIDTH)
        with self.compiled.record() as self.recording:
            self.base = denoise(self.compiled, self.inputs)
        self.edited = self.edit()

    def edit(self, mask: Any = MASK) -> Tensor:
        with self.compiled.edit(self.recording, mask):
            return denoise(self.compiled, other_text(self.inputs))

    def check(self) -> None:
        assert torch.equal(self.compiled(**self.inputs)[0], self.compiled.original(**self.inputs)[0])
        assert torch.equal(self.edit(), self.edited)
        with self.compiled.record() as recording:
            assert torch.equal(denoise(self.compiled, self.inputs), self.base)
        assert recording.complete


@pytest.fixture
def usable() -> Iterator[Usable]:
    subject = Usable()
    yield subject
    subject.check()


def first_call(usable: Usable, **changes: Any) -> dict[str, Any]:
    return {**usable.inputs, "timestep": torch.tensor(900), **changes}
