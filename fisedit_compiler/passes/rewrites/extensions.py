"""Operations of other packages, rewritten by rules registered from outside (``fisedit_compiler.extend``).

Before: ``mylib.scale_tokens(x [B,S,C], gain)``
After:  whatever the rule writes, such as ``mylib.scale_tokens(rows(x) [B,N,C], gain)``
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from fisedit_compiler.errors import FiseditError, VerificationError
from fisedit_compiler.graph import ir
from fisedit_compiler.graph.registered import rule_table
from fisedit_compiler.passes.base import EVERY_OTHER, Pass, Rewriter

RewriteRule = Callable[[fx.Node, Rewriter], str | None]
RULES: dict[Any, RewriteRule] = rule_table()
"""Rules by operation (``torch._ops.OpOverload``)."""


class Extensions(Pass):
    """Operations with a registered rule."""

    name = "extensions"
    before = (EVERY_OTHER,)  # a rule has the first word, also for an operation that is known here

    @classmethod
    def looks_for(cls, target: Any) -> bool:
        return target in RULES

    def rewrite(self, node: fx.Node, rewriter: Rewriter) -> str | None:
        rule = RULES[node.target]
        place = ir.describe(node)
        try:
            reason = rule(node, rewriter)
        except FiseditError:
            raise
        except Exception as error:
            raise VerificationError(
                f"The rewrite rule {_name(rule)} failed on {place}: {type(error).__name__}: {error}. Mend the rule, or "
                'leave it out with SparsifyConfig(disabled_passes={"extensions"}): the operation then runs densely.'
            ) from error
        if reason is not None and not isinstance(reason, str):
            raise VerificationError(
                f"The rewrite rule {_name(rule)} returned {reason!r} for {place}. Return None after "
                "rewriter.replace(node, rows), or in words why the operation must stay dense."
            )
        if reason is None and any(other is node for other in rewriter.graph.nodes):
            raise VerificationError(
                f"The rewrite rule {_name(rule)} left {place} in the graph and gave no reason. Replace it with "
                "rewriter.replace(node, rows), or return why it must stay dense."
            )
        return reason


def _name(rule: RewriteRule) -> str:
    return f"{rule.__module__}.{getattr(rule, '__qualname__', rule)}"
