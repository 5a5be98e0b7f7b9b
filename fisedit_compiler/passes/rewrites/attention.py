"""Attention over sites: two passes that share how a ``scaled_dot_product_attention`` node is read.

Self-attention, before: ``sdpa(q, k, v)`` with q, k, v spatial
  ``attention="cached"``: ``attention_sites(rows(q), rows(k), rows(v), load(key), load(value), active, scale, inverse)``
  ``attention="active"``: ``attention_rows(rows(q), rows(k), rows(v), active, scale)``, among themselves
Cross-attention, before: ``sdpa(q, k, v)`` with q spatial, k and v from the text
  after: ``cross_attention(rows(q), k, v, scale)``; k and v are hoisted. With a mask, or with heads that share keys, it
  stays ``sdpa(rows(q), k, v, ...)``
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from fisedit_compiler.graph import ir
from fisedit_compiler.graph.layout import Layout
from fisedit_compiler.graph.specs import has_spec, spec_of
from fisedit_compiler.passes.base import Pass, Rewriter, slot_name

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default


@dataclass(frozen=True)
class AttentionCall:
    """The arguments of one ``scaled_dot_product_attention`` node."""

    query: fx.Node
    key: fx.Node
    value: fx.Node
    mask: Any
    dropout: float
    causal: bool
    scale: float | None
    grouped: bool

    @classmethod
    def read(cls, node: fx.Node) -> AttentionCall:
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        values: list[Any] = [*node.args, None, 0.0, False][:6]
        read = dict(zip(names, values, strict=True)) | dict(node.kwargs)
        return cls(
            read["query"], read["key"], read["value"], read["attn_mask"], read["dropout_p"], read["is_causal"],
            read.get("scale"), bool(read.get("enable_gqa", False)),
        )  # fmt: skip

    def is_self(self) -> bool:
        """Whether keys and values are spatial too."""
        return _is_tokens(self.key) or _is_tokens(self.value)

    def is_plain(self) -> bool:
        """Whether queries, keys and values are ``[B, h, ., d]`` of the same batch and heads, without a mask."""
        shapes = [spec_of(operand).shape for operand in (self.query, self.key, self.value)]
        return self.mask is None and not self.grouped and all(len(s) == 4 and s[:2] == shapes[0][:2] for s in shapes)

    def problem(self) -> str | None:
        """Why the call has no sparse form."""
        if self.dropout:
            return "attention dropout is active; call .eval() on the model"
        if self.causal:
            return "causal attention over sites has no sparse form"
        if not _is_tokens(self.query) or self.query.meta["layout"].axes != (self.query.meta["layout"].rank - 2,):
            return f"queries are {self.query.meta['layout']}, not [..., tokens, channels]"
        return None


def _is_tokens(node: fx.Node) -> bool:
    return has_spec(node) and node.meta["layout"].is_rows


class SelfAttention(Pass):
    """Self-attention to ``attention_sites`` (cached) or to attention among active rows (active)."""

    name = "self_attention"
    targets: ClassVar = frozenset({SDPA})

    def wants(self, node: fx.Node) -> bool:
        return super().wants(node) and AttentionCall.read(node).is_self()

    def rewrite(self, node: fx.Node, rewriter: Rewriter) -> str | None:
        call = AttentionCall.read(node)
        if call.problem():
            return call.problem()
        layouts: list[Layout] = [value.meta["layout"] for value in (call.query, call.key, call.value)]
        if not all(layout.has_sites_of(layouts[0]) for layout in layouts) or layouts[0].rank != 4 or call.grouped:
            return "queries, keys and values are not [batch, heads, tokens, channels] of one level"
        if len({spec_of(operand).shape[:2] for operand in (call.query, call.key, call.value)}) > 1:
            return "queries, keys and values have not the same batch and heads"
        if call.mask is not None:
            return "an attention mask between sites has no sparse form"
        query, key, value = (rewriter.rows(item) for item in (call.query, call.key, call.value))
        spec = rewriter.row_spec(node)
        level = layouts[0].level
        assert level is not None
        if rewriter.program.config.attention == "active":
            args: tuple[Any, ...] = (query, key, value, rewriter.active(level, node), call.scale)
            rows = rewriter.call(torch.ops.fisedit.attention_rows.default, args, spec, node)
        else:
            key_canvas = rewriter.canvas(call.key, slot_name(node, "key"), node)
            value_canvas = rewriter.canvas(call.value, slot_name(node, "value"), node)
            active = rewriter.active(level, node)
            inverse = rewriter.inverse(level, node)
            args = (query, key, value, key_canvas, value_canvas, active, call.scale, inverse)
            rows = rewriter.call(torch.ops.fisedit.attention_sites.default, args, spec, node)
        rewriter.replace(node, rows)
        return None


class CrossAttention(Pass):
    """Attention from sites to values without sites: row-wise in the queries."""

    name = "cross_attention"
    targets: ClassVar = frozenset({SDPA})

    def wants(self, node: fx.Node) -> bool:
        return super().wants(node) and not AttentionCall.read(node).is_self()

    def rewrite(self, node: fx.Node, rewriter: Rewriter) -> str | None:
        call = AttentionCall.read(node)
        if call.problem():
            return call.problem()
        for name, operand in (("keys", call.key), ("values", call.value)):
            if operand.meta["layout"].kind != "plain":
                return f"{name} are {operand.meta['layout']}"
        if has_spec(call.mask) and call.mask.meta["layout"].kind != "plain":
            return "an attention mask that differs from site to site has no sparse form"
        if call.is_plain():
            args = (rewriter.rows(call.query), call.key, call.value, call.scale)
            rows = rewriter.call(torch.ops.fisedit.cross_attention.default, args, rewriter.row_spec(node), node)
        else:
            with rewriter.graph.inserting_before(node):
                rows = rewriter.graph.node_copy(node, lambda a: rewriter.rows(a) if a is call.query else a)
            rows.meta = {"spec": rewriter.row_spec(node), "varies": True}
            ir.inherit(rows, node)
        rewriter.replace(node, rows)
        return None
