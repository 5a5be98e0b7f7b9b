"""What a program is specialised on: the tensors of a call, which of their axes are symbolic, and its constants.

One captured program serves every call of the same :class:`CallSignature`: any batch, height and width. How a call is
signed is in ``capture/arguments.py``.
"""

from __future__ import annotations

import builtins
import keyword
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import torch

_RESERVED = frozenset({*dir(builtins), *keyword.kwlist, "device", "inf", "nan", "torch"})


@dataclass(frozen=True)
class TensorSpec:
    """One tensor argument: ``axes[i]`` is ``"b"``, ``"h"``, ``"w"``, ``"t"`` (text tokens) or a fixed size.

    ``level`` is the resolution of a spatial argument relative to the first one (2 is half), 0 for all others.
    """

    name: str
    dtype: torch.dtype
    axes: tuple[str | int, ...]
    level: Fraction = Fraction(0)

    @property
    def is_spatial(self) -> bool:
        return self.level != 0

    def identifier(self) -> str:
        """The name of the graph's placeholder."""
        return identifier(self.name)


def identifier(name: str) -> str:
    """The name of a tensor argument in a graph; torch.fx would rename what hides a builtin, such as ``input``."""
    plain = name.replace(".", "_")
    return f"{plain}_" if plain in _RESERVED else plain


@dataclass(frozen=True)
class CallSignature:
    """What a captured program is specialised on; equal signatures share a program.

    ``tensors`` are sorted by name, ``primary`` names the spatial one that sets height and width.
    """

    tensors: tuple[TensorSpec, ...]
    constants: tuple[tuple[str, str], ...]
    device: str
    primary: str

    @property
    def spatial(self) -> TensorSpec:
        """The spatial tensor that sets height and width."""
        return next(spec for spec in self.tensors if spec.name == self.primary)

    @cached_property
    def sample_name(self) -> str:
        """Placeholder name of that tensor."""
        return self.spatial.identifier()

    @cached_property
    def spatial_names(self) -> tuple[str, ...]:
        """Placeholder names of all spatial tensors, the primary one first."""
        others = [s.identifier() for s in self.tensors if s.is_spatial and s.name != self.primary]
        return (self.sample_name, *others)
