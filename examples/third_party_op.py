"""Teach the compiler an operation that it has never seen, from outside the package.

``mylib::gate`` scales every token by a learned gate: an operation of some other package. Without a rule it runs densely
(right, but slow, and ``explain()`` says so); the rules below make it sparse. Its traits tell the compiler what it costs
and how it gets along with others, and a provider computes it where that is faster: ``explain()`` says where, and why
not elsewhere.

``mylib::centre`` subtracts the mean of all tokens, so an edit needs the recorded tokens beside its own rows. They are
recorded in a form of its own, in half the bytes. Run it with ``python examples/third_party_op.py``.
"""

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

import fisedit_compiler
from fisedit_compiler import SparsifyConfig
from fisedit_compiler.extend import (
    Canvas,
    Layout,
    LoadedNode,
    OpTraits,
    Provider,
    Rewriter,
    Slot,
    SlotNode,
    Update,
    ValueSpec,
    copy_on_rows,
    define_op,
    elements,
    layout_rule,
    no_products,
    opaque,
    register_slot_kind,
    rewrite_rule,
    slot_name,
)
from fisedit_compiler.masks import ellipse_mask


def gate(tokens: Tensor, weight: Tensor) -> Tensor:
    """``tokens [B, S, C] * sigmoid(tokens @ weight [C])``, one gate a token: what the operation means."""
    return tokens * torch.sigmoid(tokens @ weight)[..., None]


def empty_gate(tokens: Tensor, weight: Tensor) -> Tensor:
    """Shape, dtype and strides of the result."""
    return torch.empty_like(tokens)


def gate_costs(arguments: list[Any], result: ValueSpec) -> Any:
    """FLOPs: a product with the weight, and a multiplication by the gate, for every element."""
    return 3 * elements(result.shape)


def takes_one_matrix(tokens: Tensor, weight: Tensor) -> Literal[True] | str:
    """Asked before every call: whether the kernel below serves these operands, or why not."""
    return tokens.is_contiguous() or "the tokens are not contiguous, so they are not one matrix"


def gate_one_matrix(tokens: Tensor, weight: Tensor) -> Tensor:
    """All samples' tokens as one matrix, without a temporary of their size."""
    gates = torch.mv(tokens.view(-1, tokens.shape[-1]), weight).sigmoid_()
    return tokens * gates.view(*tokens.shape[:-1], 1)


define_op(
    "mylib::gate(Tensor tokens, Tensor weight) -> Tensor",
    gate,
    empty_gate,
    # Inductor may take the operation apart into its reference; a linear layer before it need not stay whole.
    traits=OpTraits(flops=gate_costs, inline=gate),
    providers=[Provider("one_matrix", "CPU", gate_one_matrix, supports=takes_one_matrix)],
)


@layout_rule(torch.ops.mylib.gate.default)
def gate_keeps_sites(node: torch.fx.Node, inferred: Layout) -> Layout:
    """What a shape cannot tell: the result's sites are the input's, unless the gate is given a map."""
    return inferred if inferred.kind == "tokens" else opaque(inferred.rank, "mylib::gate takes tokens [B, S, C]")


@rewrite_rule(torch.ops.mylib.gate.default)
def gate_rows(node: torch.fx.Node, rewriter: Rewriter) -> str | None:
    """Each token needs itself only: the same operation on the rows of the active sites."""
    tokens, weight = node.args
    if weight.meta["layout"].kind != "plain":
        return "the gate's weight differs from site to site"
    copy_on_rows(node, {tokens: rewriter.rows(tokens)}, rewriter)
    return None


def centre(tokens: Tensor) -> Tensor:
    """``tokens [B, S, C]`` less the mean of all of them."""
    return tokens - tokens.mean(dim=1, keepdim=True)


def centre_rows(rows: Tensor, recorded: Tensor, active: Tensor) -> Tensor:
    """The same of ``rows [B, N, C]``, whose sites are ``active [N]``; the others are ``recorded [B, S, C]``."""
    return rows - recorded.index_copy(1, active, rows).mean(dim=1, keepdim=True)


def empty_rows(rows: Tensor, *others: Tensor) -> Tensor:
    """Shape, dtype and strides of either result."""
    return torch.empty_like(rows)


define_op("mylib::centre(Tensor tokens) -> Tensor", centre, empty_rows, traits=OpTraits(flops=no_products))
define_op(
    "mylib::centre_rows(Tensor rows, Tensor recorded, Tensor active) -> Tensor",
    centre_rows,
    empty_rows,
    # An edit that is itself recorded writes the new rows over the recorded tokens.
    traits=OpTraits(flops=no_products, updates=(Update(recorded=1, new=0),)),
)


@register_slot_kind
class Halved(Canvas):
    """A canvas in bfloat16, whatever the model computes in."""

    name: ClassVar[str] = "mylib.halved"
    holds: ClassVar[Literal["value", "packed", "else"]] = "else"
    rounding: ClassVar[float] = 2**-8

    def store(self, graph: torch.fx.Graph, slot: Slot, value: torch.fx.Node, other: SlotNode) -> torch.fx.Node:
        return self.store_rows(graph, slot, super().store(graph, slot, value, other), other)

    def store_rows(self, graph: torch.fx.Graph, slot: Slot, rows: torch.fx.Node, other: SlotNode) -> torch.fx.Node:
        return graph.call_function(torch.ops.aten.to.dtype, (rows, torch.bfloat16))

    def stored_spec(self, slot: Slot, loaded: ValueSpec) -> ValueSpec:
        return ValueSpec(loaded.shape, torch.bfloat16)

    def load(
        self, graph: torch.fx.Graph, slot: Slot, stored: torch.fx.Node, loaded: ValueSpec, other: LoadedNode
    ) -> torch.fx.Node:
        return graph.call_function(torch.ops.aten.to.dtype, (stored, loaded.dtype))

    def recorded(self, slot: Slot, value: Tensor) -> Tensor:
        return super().recorded(slot, value).bfloat16()

    def pinned(self, slot: Slot, value: Tensor) -> Tensor:
        return value.bfloat16().to(value.dtype)


@rewrite_rule(torch.ops.mylib.centre.default)
def centre_on_rows(node: torch.fx.Node, rewriter: Rewriter) -> str | None:
    """The mean needs every token: those of the inactive sites are read from the recording."""
    (tokens,) = node.args
    level = tokens.meta["layout"].level
    if level is None:
        return "the tokens are no sites of the sample"
    recorded = rewriter.canvas(tokens, slot_name(node, "tokens"), node, kind=Halved())
    operands = (rewriter.rows(tokens), recorded, rewriter.active(level, node))
    rows = rewriter.call(torch.ops.mylib.centre_rows.default, operands, rewriter.row_spec(node), node)
    rewriter.replace(node, rows)
    return None


class GatedConv(nn.Module):
    """A convolution, then a gate on its tokens, less their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 16, 3, padding=1)
        self.weight = nn.Parameter(torch.randn(16))
        self.out = nn.Conv2d(16, 4, 3, padding=1)

    def forward(self, sample: Tensor) -> Tensor:
        height, width = sample.shape[2:]
        tokens = self.conv(sample).flatten(2).transpose(1, 2)
        tokens = torch.ops.mylib.centre(torch.ops.mylib.gate(tokens, self.weight))
        return self.out(tokens.transpose(1, 2).unflatten(2, (height, width)))


def main() -> None:
    torch.manual_seed(0)
    module = GatedConv().eval().requires_grad_(False)
    base = torch.randn(1, 4, 32, 32)
    mask = ellipse_mask(32, 32, (0.2, 0.2, 0.6, 0.6))
    edited = torch.where(mask, torch.randn(1, 4, 32, 32), base)

    compiled = fisedit_compiler.sparsify(module, SparsifyConfig(cache=False), example_inputs={"sample": base})
    print(compiled.explain())
    print(compiled.stages().changes("extensions"))
    with compiled.record() as recording:
        before = compiled(sample=base)
    with compiled.edit(recording, mask=mask, record=True) as session:
        after = compiled(sample=edited)
    slots = session.result.calls[0].slots
    print("recorded:", ", ".join(f"{name} as {slots[name].dtype}" for name in slots))
    print(compiled.check(mask))
    print("outside the mask the same bits:", torch.equal(after[..., ~mask], before[..., ~mask]))
    inside = (after - module(edited))[..., mask].abs().max()
    print(f"inside the mask, against the dense call: {inside:.1e} at most (its border reads the base, not the edit)")


if __name__ == "__main__":
    main()
