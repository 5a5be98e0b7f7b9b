"""What a convolution costs by the size of its blocks: one formula, its coefficients fitted to measured times.

The formula is a sympy expression in the sizes of a convolution and of the plan; the coefficients are in
``block_costs.json`` beside this file, per device type, path and block size, each with what it was measured on.
``python -m benchmarks.fit_block_costs`` measures and fits them again. This is the cost model behind the adaptive
pixel-wise sparse convolution of FISEdit (Yu et al., AAAI 2024).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import sympy

FILE = "block_costs.json"

BATCH, ROWS, BLOCKS, OUTPUTS, PATCH = sympy.symbols("batch rows blocks outputs patch", positive=True)
"""Batch, active sites, blocks, outputs of a block (``b*b``), sites of a patch (``p*p``; for size 1 the taps)."""
TAPS, CHANNELS, OUT_CHANNELS, ELEMENT = sympy.symbols("taps channels out_channels element", positive=True)
"""Taps of the kernel, channels in and out, bytes of an element."""
FEATURES = (BATCH, ROWS, BLOCKS, OUTPUTS, PATCH, TAPS, CHANNELS, OUT_CHANNELS, ELEMENT)

TERMS: Mapping[str, sympy.Expr] = {
    "call": sympy.Integer(1),
    "gathered_bytes": BATCH * BLOCKS * PATCH * CHANNELS * ELEMENT,
    "operations": 2 * BATCH * BLOCKS * OUTPUTS * TAPS * CHANNELS * OUT_CHANNELS,
    "weight_bytes": TAPS * CHANNELS * OUT_CHANNELS * ELEMENT,
    "output_bytes": BATCH * (BLOCKS * OUTPUTS + ROWS) * OUT_CHANNELS * ELEMENT,
}
"""What takes time, by name. Putting rows and ring together costs every size the same, so it is not among them."""

COST = sympy.Add(*(sympy.Symbol(name, nonnegative=True) * term for name, term in TERMS.items()))
"""Microseconds of one convolution; the coefficients are symbols named after their terms."""


@dataclass(frozen=True)
class Fitted:
    """The fit of one block size on one device type.

    Attributes:
        size: sites along a block's side.
        path: how blocks of that size are computed: ``taps`` (gather and GEMM), ``patches`` (gather and a convolution
            without padding) or ``implicit`` (the Triton kernel that reads through the table).
        coefficients: microseconds per unit of every term of :data:`TERMS`.
    """

    size: int
    path: str
    coefficients: Mapping[str, float]

    def microseconds(self, features: Mapping[str, Any]) -> Any:
        """The estimate for one convolution, or for many at once.

        Args:
            features: by name of a symbol of :data:`FEATURES`, numbers or numpy arrays of one shape.
        """
        return _function()(**self.coefficients, **features)


@cache
def _function() -> Callable[..., Any]:
    coefficients = [sympy.Symbol(name, nonnegative=True) for name in TERMS]
    function: Callable[..., Any] = sympy.lambdify([*coefficients, *FEATURES], COST, modules="numpy")
    return function


def read(contents: Mapping[str, Any]) -> dict[str, dict[int, Fitted]]:
    """The fits in the contents of the file, by device type and block size: of each size the path that is used."""
    found: dict[str, dict[int, Fitted]] = {}
    for entry in contents["fits"]:
        if entry["used"]:
            fitted = Fitted(entry["size"], entry["path"], entry["coefficients"])
            found.setdefault(entry["device"], {})[fitted.size] = fitted
    return found


@cache
def _packaged() -> dict[str, dict[int, Fitted]]:
    return read(json.loads((resources.files(__package__) / FILE).read_text(encoding="utf-8")))


def fits(device_type: str) -> Mapping[int, Fitted]:
    """The packaged fits of one device type (``torch.device.type``) by block size; none where nobody measured."""
    return _packaged().get(device_type, {})
