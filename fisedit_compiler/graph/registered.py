"""Tables of rules for operations of other packages, which ``fisedit_compiler.extend`` fills."""

from __future__ import annotations

from typing import Any

import torch

_TABLES: list[dict[Any, Any]] = []


def rule_table() -> dict[Any, Any]:
    """A new table of rules by operation; :func:`registered_namespaces` knows what stands in it."""
    table: dict[Any, Any] = {}
    _TABLES.append(table)
    return table


def registered_namespaces() -> frozenset[str]:
    """Namespaces of ``torch.ops`` that rules were registered for."""
    return frozenset(
        operation.namespace
        for rules in _TABLES
        for operation in tuple(rules)
        if isinstance(operation, torch._ops.OpOverload)
    )
