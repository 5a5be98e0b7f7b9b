"""Pin what leaves the graph: outside the mask every spatial output is the recorded one, bit for bit.

Before: ``return y``
After:  ``return unpack(rows(y), load(y))``

Outputs of rewritten operations already have this form; this pass gives it to outputs of dense islands.
"""

from __future__ import annotations

from torch import fx

from fisedit_compiler.errors import LayoutError
from fisedit_compiler.graph import ir
from fisedit_compiler.graph.layout import Layout
from fisedit_compiler.graph.specs import has_spec, spec_of
from fisedit_compiler.passes.base import EVERY_OTHER, GraphPass, Program, Rewriter
from fisedit_compiler.slots.dense import Dense


class Outputs(GraphPass):
    """Every spatial output is an ``unpack``."""

    name = "outputs"
    after = (EVERY_OTHER,)  # what is still dense then stays so

    def run(self, program: Program) -> None:
        rewriter = Rewriter(program)
        output = next(node for node in program.graph.nodes if node.op == "output")
        for value in list(output.all_input_nodes):
            if has_spec(value) and value.meta.get("varies") and value.target is not ir.unpack:
                _pin(value, rewriter)
        program.graph.eliminate_dead_code()


def _pin(node: fx.Node, rewriter: Rewriter) -> None:
    layout: Layout = node.meta["layout"]
    if layout.kind == "plain":
        return
    if not layout.is_rows:
        raise LayoutError(
            f"Output {ir.describe(node)} is {layout}: its sites cannot be told apart, so nothing outside the mask "
            "could be kept. Sparsify the submodule whose output is a map [batch, channels, height, width]."
        )
    output = next(reader for reader in node.users if reader.op == "output")
    rows = rewriter.rows(node)
    base = rewriter.load(rewriter.slot("output", node, Dense()), spec_of(node), output)
    pinned = rewriter.call(ir.unpack, (rows, base), spec_of(node), output)
    pinned.meta.update(layout=layout, origin=node.meta["origin"], varies=True)
    output.args = fx.map_arg(output.args, lambda argument: pinned if argument is node else argument)
