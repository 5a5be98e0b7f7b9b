"""Calls of an edit that take what comes up from below from an earlier call, for the oracle.

The submodule whose output the finest level reads is named by the test. In a full call its output is kept; in a shallow
call the whole network runs as always, and the kept output stands in for that submodule's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class TapeEntry:
    """The tensors one boundary read in the base run, in argument order (keyword arguments last)."""

    function: str
    tensors: tuple[Tensor, ...]

    @property
    def sites(self) -> int:
        """How many sites the first of them has."""
        first = self.tensors[0]
        if self.function == "scaled_dot_product_attention":
            return first.shape[-2]
        return first.shape[2:].numel()


class HeldOutput:
    """The output of one submodule, kept from the full calls of an edit and given back in its shallow ones.

    Args:
        module: the submodule.

    Attributes:
        shallow: whether the next call is given the kept output.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.shallow = False
        self._output: Tensor | None = None
        self._tape: Sequence[TapeEntry] = ()

    @contextmanager
    def around_a_call(self) -> Iterator[None]:
        def after(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            if not self.shallow:
                self._output = output.detach().clone()
            assert self._output is not None, "a shallow call comes after a full one"
            return self._output.clone()

        hook = self.module.register_forward_hook(after)
        try:
            yield
        finally:
            hook.remove()

    def tape_of(self, tape: Sequence[TapeEntry], finest: int) -> list[TapeEntry]:
        """The tape of a call: a shallow one saw maps of fewer sites than ``finest`` as the last full one did."""
        if not self.shallow:
            self._tape = tape
            return list(tape)
        return [then if now.sites < finest else now for now, then in zip(tape, self._tape, strict=True)]
