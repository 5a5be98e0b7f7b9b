"""The rewrite passes, in order, and the loop that runs them.

A pass is one file; adding one means adding it to :data:`REWRITES`. Timing, verification and counting happen around
passes here, never inside them.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass

from torch import fx

from fisedit_compiler import ir
from fisedit_compiler.capture import CapturedGraph
from fisedit_compiler.config import SparsifyConfig
from fisedit_compiler.errors import ConfigError
from fisedit_compiler.layout import Layout, LayoutRules
from fisedit_compiler.passes.attention import CrossAttention, SelfAttention
from fisedit_compiler.passes.base import Pass, Program
from fisedit_compiler.passes.channels import ChannelAxis, Concatenation, Split
from fisedit_compiler.passes.convolution import Convolution
from fisedit_compiler.passes.group_norm import GroupNorm
from fisedit_compiler.passes.lower import lower
from fisedit_compiler.passes.merge_linears import MergeLinears
from fisedit_compiler.passes.outputs import Outputs
from fisedit_compiler.passes.pointwise import Pointwise
from fisedit_compiler.passes.rowwise import Rowwise
from fisedit_compiler.passes.upsample import Upsample
from fisedit_compiler.passes.verify import verify, verify_complete
from fisedit_compiler.passes.views import Permute, RankChange, View

REWRITES: tuple[type[Pass], ...] = (
    Convolution,
    Upsample,
    GroupNorm,
    SelfAttention,
    CrossAttention,
    Concatenation,
    Split,
    ChannelAxis,
    Rowwise,
    Pointwise,
    View,
    Permute,
    RankChange,
    MergeLinears,
    Outputs,
)
REQUIRED = frozenset({Outputs.name})


@dataclass(frozen=True)
class PassReport:
    """What one pass did: its duration and how many call nodes of each operation it removed and added."""

    name: str
    seconds: float
    removed: dict[str, int]
    added: dict[str, int]


def rewrite(captured: CapturedGraph, config: SparsifyConfig) -> tuple[Program, list[PassReport]]:
    """Rewrite a captured and simplified graph into a lowered sparse program.

    Raises:
        ConfigError: ``config.disabled_passes`` names an unknown or a required pass.
        LayoutError: an output has no sites to keep.
        VerificationError: a pass left a graph that breaks an invariant.
    """
    _check_disabled(config)
    reports: list[PassReport] = []
    LayoutRules(captured.multiple).annotate(captured.graph)
    mark_varying(captured)
    program = Program(captured, copy_graph(captured.graph), config)
    for rewrite_class in REWRITES:
        if rewrite_class.name in config.disabled_passes:
            continue
        before, start = _operations(program.graph), time.perf_counter()
        rewrite_class().run(program)
        after = _operations(program.graph)
        reports.append(
            PassReport(rewrite_class.name, time.perf_counter() - start, dict(before - after), dict(after - before))
        )
        verify(program, rewrite_class.name)
    record_refusals(program)
    verify_complete(program)
    lower(program)
    return program, reports


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy with equal node names and copied metadata."""
    copy = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    result = copy.graph_copy(graph, mapping)
    output = copy.output(result)
    output.meta = dict(next(node for node in graph.nodes if node.op == "output").meta)
    return copy


def mark_varying(captured: CapturedGraph) -> None:
    """Set ``meta["varies"]`` on every value that depends on what is inside a spatial input (not on its sizes)."""
    spatial = set(captured.signature.spatial_names)
    for node in captured.graph.nodes:
        if node.op == "placeholder":
            node.meta["varies"] = node.name in spatial
        elif "expr" in node.meta:
            node.meta["varies"] = False
        else:
            node.meta["varies"] = any(argument.meta.get("varies", False) for argument in node.all_input_nodes)


def record_refusals(program: Program) -> None:
    """Give every spatial operation that stays dense its reason."""
    for node in program.graph.nodes:
        if node.op != "call_function" or node.target in ir.MARKERS or not node.meta.get("varies"):
            continue
        if "layout" not in node.meta:
            continue  # already on rows
        if any(_is_spatial(value) for value in (node, *node.all_input_nodes)):
            disabled = [
                p.name for p in REWRITES if p.name in program.config.disabled_passes and node.target in p.targets
            ]
            default = f"pass {disabled[0]} is disabled" if disabled else f"no rule for {ir.target_name(node.target)}"
            layout = node.meta["layout"]
            if not disabled and isinstance(layout, Layout) and layout.reason:
                default = layout.reason
            program.refusals[node.name] = str(node.meta.get("refused", default))


def _is_spatial(node: fx.Node) -> bool:
    layout = node.meta.get("layout")
    layouts = layout if isinstance(layout, tuple) else (layout,)
    return any(isinstance(item, Layout) and item.kind != "plain" for item in layouts)


def _operations(graph: fx.Graph) -> Counter[str]:
    return Counter(ir.target_name(node.target) for node in graph.nodes if node.op == "call_function")


def _check_disabled(config: SparsifyConfig) -> None:
    names = [rewrite_class.name for rewrite_class in REWRITES]
    for name in config.disabled_passes:
        if name not in names:
            raise ConfigError(f"disabled_passes names {name!r}, which is no pass; the passes are {names}.")
        if name in REQUIRED:
            raise ConfigError(f"Pass {name!r} cannot be disabled: it pins the outputs outside the mask.")
