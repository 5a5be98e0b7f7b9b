"""The loop that runs the rewrite passes.

A pass is one file; adding one means registering it in ``order.py``. Timing, logging, verification and counting happen
around passes here and in ``instruments.py``, never inside them.
"""

from __future__ import annotations

from torch import fx

from fisedit_compiler.capture.captured import CapturedGraph
from fisedit_compiler.config import SparsifyConfig
from fisedit_compiler.errors import FiseditError, VerificationError
from fisedit_compiler.graph import ir
from fisedit_compiler.graph.ir import copy_graph
from fisedit_compiler.graph.layout import Layout
from fisedit_compiler.graph.layout_rules import LayoutRules
from fisedit_compiler.passes.base import GraphPass, Pass, Program
from fisedit_compiler.passes.instruments import Instruments
from fisedit_compiler.passes.order import REWRITES, ordered
from fisedit_compiler.passes.programs.agreement import check_slots
from fisedit_compiler.passes.programs.lower import lower
from fisedit_compiler.passes.verify import remedy, verify, verify_complete
from fisedit_compiler.passes.written_calls import calls_of, verify_calls


def rewrite(captured: CapturedGraph, config: SparsifyConfig, instruments: Instruments | None = None) -> Program:
    """Rewrite a captured and simplified graph into a lowered sparse program.

    Args:
        captured: left as it is, except that layouts are written to its nodes' ``meta``.
        config: which passes run, and how.
        instruments: told about every pass.

    Raises:
        ConfigError: ``config`` names an unknown or a required pass, or passes that cannot be put in order.
        LayoutError: an output has no sites to keep.
        SlotKindError: a kind of slots contradicts itself.
        VerificationError: a pass left a graph that breaks an invariant.
    """
    instruments = instruments or Instruments()
    passes = ordered(config.extra_passes, config.disabled_passes)
    LayoutRules(captured.multiple).annotate(captured.graph)
    mark_varying(captured)
    program = Program(captured, copy_graph(captured.graph), config)
    for rewrite_class in passes:
        with instruments.watch(rewrite_class.name, program.graph):
            before = None if rewrite_class in REWRITES else calls_of(program.graph)
            run_pass(rewrite_class, program)
            verify(program, rewrite_class.name)
            if before is not None:
                verify_calls(program.graph, before, rewrite_class.name)
    record_refusals(program)
    verify_complete(program)
    with instruments.watch("lower", program.graph):
        lower(program)
    check_slots(program)
    return program


def run_pass(rewrite_class: type[GraphPass], program: Program) -> None:
    """Run one pass.

    Raises:
        VerificationError: it raised something that is no error of this package; names it.
    """
    try:
        rewrite_class().run(program)
    except FiseditError:
        raise
    except Exception as error:
        where = f"{rewrite_class.__module__}.{rewrite_class.__qualname__}"
        raise VerificationError(
            f"Pass {rewrite_class.name} ({where}) raised {type(error).__name__}: {error}. {remedy(rewrite_class.name)}"
        ) from error


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
    known = [p for p in (*REWRITES, *program.config.extra_passes) if issubclass(p, Pass)]
    disabled_passes = [p for p in known if p.name in program.config.disabled_passes]
    for node in program.graph.nodes:
        if node.op != "call_function" or node.target in ir.MARKERS or not node.meta.get("varies"):
            continue
        if "layout" not in node.meta:
            continue  # already on rows
        if any(_is_spatial(value) for value in (node, *node.all_input_nodes)):
            disabled = [p.name for p in disabled_passes if p.looks_for(node.target)]
            default = f"pass {disabled[0]} is disabled" if disabled else f"no rule for {ir.target_name(node.target)}"
            layout = node.meta["layout"]
            if not disabled and isinstance(layout, Layout) and layout.reason:
                default = layout.reason
            program.refusals[node.name] = str(node.meta.get("refused", default))


def _is_spatial(node: fx.Node) -> bool:
    layout = node.meta.get("layout")
    layouts = layout if isinstance(layout, tuple) else (layout,)
    return any(isinstance(item, Layout) and item.kind != "plain" for item in layouts)
