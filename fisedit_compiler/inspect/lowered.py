"""``compiled.check(mask, lowered=True)``: the step as Inductor and CUDA graphs run it, and the node they get wrong.

Outputs are compared first. If they differ, ever shorter beginnings of the step are compiled and compared with the same
beginnings interpreted, until the one that differs ends in the node at fault. Every trial is a compilation.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

from torch import fx

from fisedit_compiler.inspect.judge import Judge, origin_of
from fisedit_compiler.lowering.codegen.inductor import compile_step
from fisedit_compiler.lowering.cut_products import cut_products
from fisedit_compiler.lowering.errors import first_failing, frontier, prefix_of

logger = logging.getLogger(__name__)

NOT_COMPILATION = "compiled on its own no node differs, so staging or the CUDA graph is at fault"


def judge_lowered_nodes(step: fx.GraphModule, arguments: Sequence[Any], judge: Judge) -> bool:
    """Note the first node that compilation gets wrong; whether there is one.

    Args:
        step: the step as it is interpreted; it is copied, not changed.
        arguments: its arguments.
        judge: takes the difference, and knows the tolerance.
    """
    logger.info("the lowered step differs: compiling beginnings of it to find the node, which can take minutes")
    node = first_failing(step, lambda prefix: bool(_differing(prefix, arguments, judge)))
    if node is None:
        return False
    values = frontier(step.graph, node)
    wrong = {values[number]: sizes for *sizes, number in _differing(prefix_of(step, node), arguments, judge)}
    error, allowed = wrong.get(node) or max(wrong.values(), default=[math.inf, 0.0])
    judge.note(origin_of(node), f"{node.name} of the lowered step", error=error, allowed=allowed)
    return True


def _differing(prefix: fx.GraphModule, arguments: Sequence[Any], judge: Judge) -> list[tuple[float, float, int]]:
    """Error, what is allowed, and number of each value of a prefix that differs when it is compiled."""
    expected = prefix(*arguments)
    cut_products(prefix.graph)
    prefix.recompile()
    actual = compile_step(prefix)(*arguments)
    found = []
    for number, (value, right) in enumerate(zip(actual, expected, strict=True)):
        error, allowed = judge.measure(value, right)
        if not error <= allowed:
            found.append((error, allowed, number))
    return found
