"""What a capture gives: a dense graph in the compiler's form."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fisedit_compiler.graph.signatures import CallSignature


@dataclass
class CapturedGraph:
    """A dense graph in the compiler's form.

    Attributes:
        graph: functional ATen; placeholders are the tensors of ``signature`` in order, parameters are ``get_attr``.
        signature: the call it was captured for.
        multiple: ``k``; spatial inputs have ``k*h`` by ``k*w`` sites.
        constants: tensors the graph closes over that the module does not own, by attribute name.
        treespec: how the flat outputs are put together (``torch.utils._pytree``).
    """

    graph: fx.Graph
    signature: CallSignature
    multiple: int
    constants: dict[str, torch.Tensor] = field(default_factory=dict)
    treespec: Any = None

    @property
    def spatial(self) -> fx.Node:
        """The placeholder whose sizes define ``b, h, w``."""
        name = self.signature.spatial.identifier()
        return next(node for node in self.graph.nodes if node.op == "placeholder" and node.name == name)


def is_size_node(node: fx.Node) -> bool:
    """Whether a node computes a size from shapes alone."""
    return node.op == "call_function" and (
        node.target is torch.ops.aten.sym_size.int
        or (getattr(node.target, "__module__", "") in ("_operator", "operator", "torch") and "expr" in node.meta)
    )
