"""What a node of an entry may call: functional operations of known namespaces, and arithmetic on sizes.

Names in an entry are looked up in tables made here. No attribute of a module is ever reached by a name from a file.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch

from fisedit_compiler.graph.registered import registered_namespaces

_NAMESPACES = frozenset({"aten", "prims", "fisedit"})
_RESULTS = frozenset(
    {
        *("Tensor", "List[Tensor]", "Optional[Tensor]", "List[int]", "List[SymInt]"),
        *("int", "SymInt", "float", "SymFloat", "bool", "SymBool", "number"),
    }
)

_OPERATORS = (
    "abs", "add", "and_", "eq", "floordiv", "ge", "getitem", "gt", "invert", "le", "lshift", "lt", "mod", "mul", "ne",
    "neg", "not_", "or_", "pos", "pow", "rshift", "sub", "truediv", "xor",
)  # fmt: skip
_SYMBOLIC = ("float", "fresh_size", "int", "ite", "max", "min", "not", "sqrt", "sum")
FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{f"operator.{name}": getattr(operator, name) for name in _OPERATORS},
    **{f"torch.sym_{name}": getattr(torch, f"sym_{name}") for name in _SYMBOLIC if hasattr(torch, f"sym_{name}")},
}
_NAMES = {function: name for name, function in FUNCTIONS.items()}

VALUES: dict[str, Any] = {
    str(value): value
    for value in (getattr(torch, name) for name in dir(torch))
    if isinstance(value, (torch.dtype, torch.layout, torch.memory_format))
}
"""Data types, layouts and memory formats by their text, such as ``torch.float32``."""


def target_text(target: Any) -> str:
    """The name of a call's target.

    Raises:
        NotImplementedError: an entry may not hold it.
    """
    if isinstance(target, torch._ops.OpOverload):
        _check(target)
        return f"op:{target.namespace}.{target._opname}.{target._overloadname}"
    try:
        return f"fn:{_NAMES[target]}"
    except (KeyError, TypeError):
        raise NotImplementedError(f"call of {target!r}") from None


def find_target(text: str) -> Any:
    """The target of that name.

    Raises:
        ValueError: there is none, or an entry may not call it.
    """
    kind, _, name = text.partition(":")
    if kind == "fn" and name in FUNCTIONS:
        return FUNCTIONS[name]
    parts = name.split(".")
    if kind != "op" or len(parts) != 3 or not _is_known(parts[0]) or parts[1].startswith("__"):
        raise ValueError(f"it calls {text!r}, which is not allowed")
    packet = getattr(getattr(torch.ops, parts[0]), parts[1], None)
    if not isinstance(packet, torch._ops.OpOverloadPacket) or parts[2] not in packet.overloads():
        raise ValueError(f"it calls {text!r}, which does not exist")
    operation = getattr(packet, parts[2])
    try:
        _check(operation)
    except NotImplementedError as error:
        raise ValueError(str(error)) from error
    return operation


def _is_known(namespace: str) -> bool:
    return namespace in _NAMESPACES or namespace in registered_namespaces()


def _check(operation: torch._ops.OpOverload) -> None:
    """Only what computes tensors and sizes from others: no files, no printing, nothing written in place."""
    schema = operation._schema
    if not _is_known(operation.namespace):
        raise NotImplementedError(
            f"{operation} is of an unknown package; a rule of fisedit_compiler.extend makes its namespace known"
        )
    results = {str(result.type) for result in schema.returns}
    if not results or not results <= _RESULTS or schema.is_mutable or schema.overload_name == "out":
        raise NotImplementedError(f"{operation} does more than to compute a tensor")
    if any(argument.name == "filename" for argument in schema.arguments):
        raise NotImplementedError(f"{operation} reads files")
