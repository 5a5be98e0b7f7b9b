"""What a pass from outside wrote: whether each call gives what its spec says.

The package's own passes know the shape of what they write, and their tests hold them to it. A pass of another package
may be wrong in it, and a wrong spec goes on into every rewrite after it. So each call that such a pass wrote or gave
other arguments is run once, on the meta device, with a number for every symbol: half a millisecond a call.
"""

from __future__ import annotations

from typing import Any, cast

import sympy
import torch
from torch import fx

from fisedit_compiler.errors import VerificationError
from fisedit_compiler.graph import ir
from fisedit_compiler.graph.specs import ValueSpec
from fisedit_compiler.passes.verify import broken

Calls = frozenset[tuple[fx.Node, Any, str]]

_SIZES = {"b": 2, "h": 3, "w": 5, "t": 7}
"""Sizes of the example; each count of rows gets a larger odd number of its own."""


def calls_of(graph: fx.Graph) -> Calls:
    """The calls of a graph as they stand: what :func:`verify_calls` is told was there before."""
    return frozenset(
        (node, node.target, f"{node.args}{node.kwargs}")
        for node in graph.nodes
        if node.op == "call_function" and node.target not in ir.MARKERS
    )


def verify_calls(graph: fx.Graph, before: Calls, after: str) -> None:
    """Check every call that was not there ``before``.

    Raises:
        VerificationError: a call cannot be made, or gives another shape or dtype than its spec; names pass ``after``
            and the node.
    """
    sizes = _Sizes()
    for node in sorted((call[0] for call in calls_of(graph) - before), key=list(graph.nodes).index):
        try:
            result = cast(Any, node.target)(*sizes.of(node.args), **sizes.of(node.kwargs))
        except Exception as error:
            raise _wrong(node, f"cannot be called ({type(error).__name__}: {error})", after) from error
        spec = node.meta.get("spec")
        expected = [*spec] if isinstance(spec, tuple) else [spec]
        given = [*result] if isinstance(spec, tuple) and isinstance(result, tuple | list) else [result]
        if len(given) != len(expected) or not all(map(sizes.fits, given, expected)):
            found, due = " and ".join(map(_described, given)), " and ".join(map(sizes.described, expected))
            raise _wrong(node, f"gives {found} where its spec says {due}", after)


class _Sizes:
    """Numbers in the place of symbols."""

    def __init__(self) -> None:
        self._numbers = {sympy.Symbol(name, positive=True, integer=True): size for name, size in _SIZES.items()}

    def number(self, size: Any) -> int:
        size = sympy.sympify(size)
        for symbol in sorted(size.free_symbols, key=str):
            self._numbers.setdefault(symbol, 11 + 2 * len(self._numbers))
        return int(size.subs(self._numbers))

    def fits(self, value: Any, spec: ValueSpec | None) -> bool:
        """Whether a value is what its spec says; a size has none."""
        if spec is None or not isinstance(value, torch.Tensor):
            return spec is None and not isinstance(value, torch.Tensor)
        return tuple(value.shape) == tuple(map(self.number, spec.shape)) and value.dtype == spec.dtype

    def described(self, spec: ValueSpec | None) -> str:
        return f"{tuple(map(self.number, spec.shape))} {spec.dtype} for {spec.shape}" if spec else "no tensor"

    def of(self, arguments: Any) -> Any:
        return fx.map_arg(arguments, self._example)

    def _example(self, node: fx.Node) -> Any:
        if "expr" in node.meta:
            return self.number(node.meta["expr"])
        spec = node.meta["spec"]
        return [self._tensor(item) for item in spec] if isinstance(spec, tuple) else self._tensor(spec)

    def _tensor(self, spec: ValueSpec) -> torch.Tensor:
        return torch.empty(tuple(map(self.number, spec.shape)), dtype=spec.dtype, device="meta")


def _described(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{tuple(value.shape)} {value.dtype}"
    return "several values" if isinstance(value, tuple | list) else repr(value)


def _wrong(node: fx.Node, problem: str, after: str) -> VerificationError:
    return broken(after, node, f"{problem}; write it with the spec of what it gives")
