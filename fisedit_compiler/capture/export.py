"""Capture: one graph of the unmodified module, with symbolic batch, height and width.

``torch.export`` does the work. What comes out is translated once into the compiler's own form: an ``fx.Graph`` whose
placeholders are the call's tensors, whose parameters are ``get_attr`` nodes named as in the user's model (shared with
it, never copied), and whose nodes carry sympy shapes, module path and source line. Rewriting lives in ``passes/``.
"""

from __future__ import annotations

import contextlib
import math
import time
from typing import Any

import sympy
import torch
from torch import fx, nn
from torch._dynamo.exc import TorchDynamoException, UserError, UserErrorType
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from fisedit_compiler.capture.blame import place_in_traceback, watch_guards
from fisedit_compiler.capture.captured import CapturedGraph
from fisedit_compiler.capture.downsampling import own_downsampling
from fisedit_compiler.capture.examples import EXAMPLE_SIZES, map_children, named_examples, scale_of
from fisedit_compiler.capture.keys.snapshot import Snapshot
from fisedit_compiler.capture.translate import translate
from fisedit_compiler.compiling import alone
from fisedit_compiler.errors import CaptureError
from fisedit_compiler.graph.ir import describe
from fisedit_compiler.graph.signatures import CallSignature
from fisedit_compiler.graph.sizes import HEIGHT, WIDTH
from fisedit_compiler.graph.specs import ValueSpec

MAX_BATCH = 63  # diffusers' upsampler branches at a batch of 64
MAX_SIZE = 1024  # of h and w, in units of the model's total downsampling
MAX_TEXT = 4096
MOST_DOWNSAMPLING = 64
SEARCH_SECONDS = 30
"""No further divisor is tried after that."""


def capture(
    module: nn.Module, arguments: dict[str, Any], signature: CallSignature, multiple: int | None
) -> CapturedGraph:
    """Capture ``module`` called with ``arguments`` (named, nested tensors allowed).

    Args:
        multiple: total downsampling ``k``; ``None`` finds out the module's own, and tries multiples of it until every
            shape is a whole expression.

    Raises:
        CaptureError: torch.export refused the module; the message carries its reason and what to try.
    """
    if multiple is not None:
        try:
            return translate(module, _export(module, arguments, signature, multiple), signature, multiple)
        except _ExportError as error:
            raise _refused(error, module, arguments, signature, multiple) from error.cause
    own = own_downsampling(module, lambda *sizes: named_examples(arguments, signature, *sizes))
    own = math.lcm(own, *(spec.level.numerator for spec in signature.tensors if spec.is_spatial))
    return _captured_for_some_divisor(module, arguments, signature, own)


def _captured_for_some_divisor(
    module: nn.Module, arguments: dict[str, Any], signature: CallSignature, own: int
) -> CapturedGraph:
    """Capture for the module's own downsampling, or for a larger divisor where only that makes every size whole.

    What is reported is what is wrong with the module's own, and no other is tried where that has nothing to do with
    sizes: every capture of a large module takes half a minute.
    """
    began = time.perf_counter()
    problem: CaptureError | None = None
    tried: list[int] = []
    for candidate in (own, *(own << shift for shift in range(1, 7) if own << shift <= MOST_DOWNSAMPLING)):
        if tried and time.perf_counter() - began > SEARCH_SECONDS:
            break
        tried.append(candidate)
        try:
            captured = translate(module, _export(module, arguments, signature, candidate), signature, candidate)
        except CaptureError as error:
            problem = problem or error
            if isinstance(error, _ExportError) and error.is_about_sizes:
                continue
            break
        rounded = _rounded_size(captured.graph)
        if rounded is None:
            return captured
        problem = problem or _Rounds(rounded)
    if isinstance(problem, _Rounds):
        raise CaptureError(
            f"{type(module).__name__} rounds its sizes for every divisor of height and width that was tried "
            f"({', '.join(map(str, tried))}): {problem}. Pass SparsifyConfig(multiple=k) with the model's total "
            "downsampling."
        )
    if isinstance(problem, _ExportError):
        raise _refused(problem, module, arguments, signature, own) from problem.cause
    assert problem is not None
    raise problem


class _Rounds(CaptureError):
    """A size of the graph rounds height or width."""

    def __init__(self, node: fx.Node) -> None:
        super().__init__(f"{describe(node)} has shape [{', '.join(map(str, node.meta['spec'].shape))}]")


class _ExportError(CaptureError):
    """torch.export refused; the message is written by :func:`_refused`, once no other divisor is left to try."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause

    @property
    def is_about_sizes(self) -> bool:
        """Whether a larger divisor may help: sizes were specialised, do not fit each other or are too small."""
        if isinstance(self.cause, UserError):
            return self.cause.error_type is UserErrorType.CONSTRAINT_VIOLATION
        others = (GuardOnDataDependentSymNode, NotImplementedError, TorchDynamoException)
        return isinstance(self.cause, RuntimeError | ValueError) and not isinstance(self.cause, others)


def _refused(
    error: _ExportError, module: nn.Module, arguments: dict[str, Any], signature: CallSignature, multiple: int
) -> CaptureError:
    place = place_in_traceback(error.cause, module)
    if not place:
        # Constraints on sizes are judged when the export is over; which line made them is only seen while it runs.
        with watch_guards(module) as guards, contextlib.suppress(CaptureError):
            _export(module, arguments, signature, multiple)
        place = guards.place_of_violation(_units(signature, multiple))
    return CaptureError(
        f"torch.export could not capture {type(module).__name__} with symbolic batch, height and width "
        f"(divisor {multiple}){place}: {_first_lines(error.cause)}\n"
        "Remedy: make the forward free of data-dependent Python control flow, or sparsify the submodule that is; "
        "pass SparsifyConfig(multiple=k) if sizes must be divisible by k."
    )


def _units(signature: CallSignature, multiple: int) -> dict[int, int]:
    """What sizes are multiples of, by the example sizes that :func:`_export` uses."""
    units = {EXAMPLE_SIZES["b"]: 1, EXAMPLE_SIZES["t"]: 1}
    for spec in signature.tensors:
        scale = scale_of(multiple, spec)
        units.update({scale * EXAMPLE_SIZES["h"]: scale, scale * EXAMPLE_SIZES["w"]: scale})
    return units


def _export(module: nn.Module, arguments: dict[str, Any], signature: CallSignature, multiple: int) -> ExportedProgram:
    batch, height, width, text = (
        Dim("b", min=1, max=MAX_BATCH),
        Dim("h", min=1, max=MAX_SIZE),
        Dim("w", min=1, max=MAX_SIZE),
        Dim("t", min=1, max=MAX_TEXT),
    )
    specs = {spec.name: spec for spec in signature.tensors}

    symbols = {"b": batch, "t": text}

    def dynamic(name: str, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            scale = scale_of(multiple, specs[name])
            known = {**symbols, "h": scale * height, "w": scale * width}
            return {index: known[axis] for index, axis in enumerate(specs[name].axes) if isinstance(axis, str)} or None
        mapped = map_children(name, value, dynamic)
        return mapped if isinstance(mapped, (dict, list, tuple)) else None

    kwargs = named_examples(arguments, signature, multiple, EXAMPLE_SIZES["h"], EXAMPLE_SIZES["w"])
    shapes = {name: dynamic(name, value) for name, value in arguments.items()}
    with alone():  # it disturbs whoever computes, see compiling.py
        return _traced(module, kwargs, shapes, torch.device(signature.device).type)


def _traced(module: nn.Module, kwargs: dict[str, Any], shapes: dict[str, Any], device_type: str) -> ExportedProgram:
    before = Snapshot(module)
    try:
        with torch.no_grad():
            exported = torch.export.export(module, (), kwargs, dynamic_shapes=shapes, strict=False)
            casts = torch.is_autocast_enabled(device_type)
            if casts or any(_is_mutable(node) or _is_of_a_transform(node) for node in exported.graph.nodes):
                # Functionalize, and make nodes of what autocast, vmap and regions of other grad modes do to their
                # operations; skipped otherwise because it costs as much as the capture itself.
                exported = exported.run_decompositions({})
                _reshape_views(exported.graph)
    except Exception as error:
        raise _ExportError(error) from error
    finally:
        before.restore()  # a forward that notes a shape would keep a symbolic one
    return exported


def _first_lines(error: Exception) -> str:
    """What torch says, up to where it starts to tell how to debug torch."""
    lines = str(error).strip().splitlines()
    lines = [line for line in lines if line and "TORCH_LOGS=" not in line and "docs.google.com" not in line]
    return "\n".join(lines[:8])


def _is_mutable(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _is_of_a_transform(node: fx.Node) -> bool:
    """Whether a node begins, ends or holds a region in which operations mean something else."""
    name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
    home = str(getattr(node.target, "__module__", ""))
    return home.startswith("torch._functorch") or (home == "torch.ops.higher_order" and name.startswith("wrap_with"))


def _reshape_views(graph: fx.Graph) -> None:
    """Functionalization writes a reshape as a view, which only serves inputs that lie in memory as the example's."""
    for node in graph.nodes:
        if node.target is torch.ops.aten.view.default:
            node.target = torch.ops.aten.reshape.default


def _rounded_size(graph: fx.Graph) -> fx.Node | None:
    """The first node with a size that rounds height or width, so that another divisor may make it whole."""
    whole = (sympy.Add, sympy.Mul, sympy.Pow, sympy.Symbol, sympy.Number)
    for node in graph.nodes:
        if isinstance(spec := node.meta.get("spec"), ValueSpec) and any(
            part.free_symbols & {HEIGHT, WIDTH} and not isinstance(part, whole)
            for size in spec.shape
            for part in sympy.preorder_traversal(size)
        ):
            return node  # type: ignore[no-any-return]
    return None
