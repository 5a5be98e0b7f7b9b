"""Capture: one graph of the unmodified module, with symbolic batch, height and width.

``torch.export`` does the work. What comes out is translated once into the compiler's own form: an ``fx.Graph`` whose
placeholders are the call's tensors, whose parameters are ``get_attr`` nodes named as in the user's model (shared with
it, never copied), and whose nodes carry sympy shapes, module path and source line. Rewriting lives in ``passes/``.
"""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx, nn
from torch._dynamo.exc import TorchDynamoException, UserError, UserErrorType
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from fisedit_compiler.capture.blame import TORCH_DIRECTORY, place_in_traceback, watch_guards
from fisedit_compiler.capture.downsampling import own_downsampling
from fisedit_compiler.capture.keys.snapshot import Snapshot
from fisedit_compiler.errors import CaptureError
from fisedit_compiler.graph.ir import describe
from fisedit_compiler.graph.signatures import CallSignature, TensorSpec
from fisedit_compiler.graph.sizes import BATCH, HEIGHT, TEXT, WIDTH
from fisedit_compiler.graph.specs import ValueSpec

MAX_BATCH = 63  # diffusers' upsampler branches at a batch of 64
MAX_SIZE = 1024  # of h and w, in units of the model's total downsampling
MAX_TEXT = 4096
MOST_DOWNSAMPLING = 64
SEARCH_SECONDS = 30
"""No further divisor is tried after that."""
_EXAMPLE = {"b": 2, "h": 3, "w": 5, "t": 7}
"""Sizes that are exported with, in units of what they are multiples of; distinct, so that sizes can be told apart."""


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
            return _translate(module, _export(module, arguments, signature, multiple), signature, multiple)
        except _ExportError as error:
            raise _refused(error, module, arguments, signature, multiple) from error.cause
    own = own_downsampling(module, lambda *sizes: _named_examples(arguments, signature, *sizes))
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
            captured = _translate(module, _export(module, arguments, signature, candidate), signature, candidate)
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
    units = {_EXAMPLE["b"]: 1, _EXAMPLE["t"]: 1}
    for spec in signature.tensors:
        scale = _scale(multiple, spec)
        units.update({scale * _EXAMPLE["h"]: scale, scale * _EXAMPLE["w"]: scale})
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
            scale = _scale(multiple, specs[name])
            known = {**symbols, "h": scale * height, "w": scale * width}
            return {index: known[axis] for index, axis in enumerate(specs[name].axes) if isinstance(axis, str)} or None
        mapped = _map_children(name, value, dynamic)
        return mapped if isinstance(mapped, (dict, list, tuple)) else None

    kwargs = _named_examples(arguments, signature, multiple, _EXAMPLE["h"], _EXAMPLE["w"])
    shapes = {name: dynamic(name, value) for name, value in arguments.items()}
    before = Snapshot(module)
    try:
        with torch.no_grad():
            exported = torch.export.export(module, (), kwargs, dynamic_shapes=shapes, strict=False)
            casts = torch.is_autocast_enabled(torch.device(signature.device).type)
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


def _named_examples(
    arguments: dict[str, Any], signature: CallSignature, multiple: int, height: int, width: int
) -> dict[str, Any]:
    """Arguments of ``multiple * height`` by ``multiple * width``, other sizes than the caller's and all distinct.

    So nothing is specialised by coincidence.
    """
    specs = {spec.name: spec for spec in signature.tensors}

    def example(name: str, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            scale = _scale(multiple, specs[name])
            known = {"b": _EXAMPLE["b"], "t": _EXAMPLE["t"], "h": scale * height, "w": scale * width}
            axes = zip(specs[name].axes, value.shape, strict=True)
            shape = [known[axis] if isinstance(axis, str) else size for axis, size in axes]
            return torch.zeros(shape, dtype=value.dtype, device=value.device)
        return _map_children(name, value, example)

    return {name: example(name, value) for name, value in arguments.items()}


def _scale(multiple: int, spec: TensorSpec) -> int:
    """Height of a spatial input in units of ``h`` (1 for all other inputs)."""
    if not spec.is_spatial:
        return 1
    scale = multiple / spec.level
    if scale.denominator != 1:
        raise CaptureError(
            f"Spatial input {spec.name} is {spec.level} times smaller than the first one, which is more than the "
            f"divisor {multiple} of its sizes; pass SparsifyConfig(multiple=k) with a multiple of {spec.level}."
        )
    return int(scale)


def _map_children(name: str, value: Any, function: Any) -> Any:
    if isinstance(value, dict):
        return {key: function(f"{name}.{key}", item) for key, item in value.items()}
    if isinstance(value, (list, tuple)) and any(isinstance(item, (torch.Tensor, list, dict)) for item in value):
        return type(value)(function(f"{name}.{index}", item) for index, item in enumerate(value))
    return value


def _first_lines(error: Exception) -> str:
    """What torch says, up to where it starts to tell how to debug torch."""
    lines = str(error).strip().splitlines()
    lines = [line for line in lines if line and "TORCH_LOGS=" not in line and "docs.google.com" not in line]
    return "\n".join(lines[:8])


def _refuse_writes_to_buffers(exported: ExportedProgram, module: nn.Module) -> None:
    written = sorted({str(name) for name in exported.graph_signature.buffers_to_mutate.values()})
    if written:
        raise CaptureError(
            f"The forward of {type(module).__name__} writes to its buffers: {', '.join(written)}. Its next call would "
            "read what this one wrote, and a recording could not be repeated. Write to them outside of the forward, or "
            "only in training."
        )


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


def _translate(module: nn.Module, exported: ExportedProgram, signature: CallSignature, multiple: int) -> CapturedGraph:
    _refuse_writes_to_buffers(exported, module)
    names = {spec.name: spec for spec in signature.tensors}
    symbols = _symbols(exported, signature, multiple)
    result = CapturedGraph(fx.Graph(), signature, multiple)
    result.treespec = exported.call_spec.out_spec
    inputs = {spec.arg.name: spec for spec in exported.graph_signature.input_specs}
    leaves = iter(_leaf_names(exported, names))
    replaced: dict[fx.Node, Any] = {}
    placeholders: dict[str, fx.Node] = {}
    for spec in signature.tensors:
        placeholders[spec.name] = result.graph.create_node("placeholder", spec.identifier(), name=spec.identifier())
    for node in exported.graph.nodes:
        if node.op == "placeholder":
            spec = inputs[node.name]
            if spec.kind is InputKind.USER_INPUT:
                leaf = next(leaves)
                if leaf is None:
                    replaced[node] = getattr(spec.arg, "value", None)
                    continue
                copied = placeholders[leaf]
            else:
                copied = _attribute(result, exported, spec, node)
            replaced[node] = copied
        elif node.op == "output":
            flat = node.args[0]
            copied = result.graph.output(fx.map_arg(flat, lambda argument: replaced[argument]))
        elif node.op == "get_attr":
            value = getattr(exported.graph_module, str(node.target), None)
            if not isinstance(value, torch.Tensor):
                reader = next(iter(node.users), node)
                _describe(reader, reader, symbols)
                raise CaptureError(
                    f"{type(module).__name__} contains control flow captured as a subgraph: {describe(reader)}. "
                    "Sparsify the submodule without it."
                )
            result.constants[str(node.target)] = value
            copied = replaced[node] = result.graph.get_attr(str(node.target))
        else:
            copied = result.graph.node_copy(node, lambda argument: replaced[argument])
            copied.meta = {}
            replaced[node] = copied
        _describe(copied, node, symbols)
    result.graph.lint()
    return result


def _symbols(exported: ExportedProgram, signature: CallSignature, multiple: int) -> dict[sympy.Symbol, sympy.Expr]:
    """Map from export's own symbols to ``b, h, w``, read off the spatial inputs."""
    found: dict[sympy.Symbol, sympy.Expr] = {}
    ours = {"b": BATCH, "h": HEIGHT, "w": WIDTH, "t": TEXT}
    leaves = _leaf_names(exported, {spec.name: spec for spec in signature.tensors})
    user = [spec.arg.name for spec in exported.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT]
    nodes = {node.name: node for node in exported.graph.nodes if node.op == "placeholder"}
    specs = {spec.name: spec for spec in signature.tensors}
    for name, leaf in zip(user, leaves, strict=True):
        if leaf is None:
            continue
        for axis, size in zip(specs[leaf].axes, nodes[name].meta["val"].shape, strict=True):
            if isinstance(axis, str) and isinstance(size, torch.SymInt):
                for symbol in size.node.expr.free_symbols:
                    found.setdefault(symbol, ours[axis])
    return found


def _leaf_names(exported: ExportedProgram, names: dict[str, TensorSpec]) -> list[str | None]:
    """Dotted argument name of each flat user input of the exported program; ``None`` for constants."""
    in_spec = exported.call_spec.in_spec
    user = [spec for spec in exported.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT]
    structure = torch.utils._pytree.tree_unflatten(list(range(len(user))), in_spec)
    result: list[str | None] = [None] * len(user)
    _args, kwargs = structure
    for path, index in torch.utils._pytree.tree_flatten_with_path(kwargs)[0]:
        name = ".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path)
        result[index] = name if name in names else None
    return result


def _attribute(result: CapturedGraph, exported: ExportedProgram, spec: Any, node: fx.Node) -> fx.Node:
    """A ``get_attr`` node for a parameter or buffer of the user's module, or for a lifted constant."""
    if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
        return result.graph.create_node("get_attr", spec.target, name=node.name)
    if spec.kind is InputKind.CONSTANT_TENSOR:
        name = "constant_" + re.sub(r"\W", "_", spec.target)
        result.constants[name] = exported.constants[spec.target]
        return result.graph.create_node("get_attr", name, name=node.name)
    raise CaptureError(f"Input {spec.target} of kind {spec.kind} cannot be part of a sparse program.")


def _describe(copied: fx.Node, node: fx.Node, symbols: dict[sympy.Symbol, sympy.Expr]) -> None:
    """Translate export's metadata into ours: spec, expression, module path, source line, origin."""
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        copied.meta["spec"] = _spec(value, symbols)
    elif isinstance(value, (list, tuple)) and value and all(isinstance(item, torch.Tensor) for item in value):
        copied.meta["spec"] = tuple(_spec(item, symbols) for item in value)
    elif isinstance(value, (torch.SymInt, int)) and not isinstance(value, bool):
        copied.meta["expr"] = _expression(value, symbols)
    stack = node.meta.get("nn_module_stack")
    if stack:
        path = list(stack.values())[-1][0]
        copied.meta["path"] = "" if path.startswith("_empty") else re.sub(r"^L\['self'\]\.?|@\d+$", "", path)
    copied.meta["source"] = _source_line(node.meta.get("stack_trace"))
    copied.meta["origin"] = copied.name


def _spec(value: torch.Tensor, symbols: dict[sympy.Symbol, sympy.Expr]) -> ValueSpec:
    return ValueSpec(tuple(_expression(size, symbols) for size in value.shape), value.dtype)


def _expression(size: int | torch.SymInt, symbols: dict[sympy.Symbol, sympy.Expr]) -> sympy.Expr:
    if isinstance(size, torch.SymInt):
        return _plain(size.node.expr).xreplace(symbols)
    return sympy.Integer(size)


def _plain(expression: sympy.Expr) -> sympy.Expr:
    """The same size in sympy's own functions, in place of torch's, which know less of each other."""
    if expression.is_Atom:
        return expression
    return expression.replace(
        lambda part: part.is_Function and type(part).__name__ in _TORCH_FUNCTIONS,
        lambda part: _TORCH_FUNCTIONS[type(part).__name__](*part.args),
    )


_TORCH_FUNCTIONS: dict[str, Callable[..., sympy.Expr]] = {
    "FloorDiv": lambda left, right: sympy.floor(left / right),
    "CleanDiv": lambda left, right: sympy.floor(left / right),
    "CeilDiv": lambda left, right: sympy.floor((left + right - 1) / right),
    "Mod": sympy.Mod,
    "PythonMod": sympy.Mod,
    "Max": sympy.Max,
    "Min": sympy.Min,
}


def _source_line(stack_trace: str | None) -> str | None:
    """``file.py:123: code`` of the innermost frame of the user's model, without the directory."""
    if not stack_trace:
        return None
    frames = re.findall(r'File "([^"]+)", line (\d+), in [^\n]*\n\s*([^\n]*)', stack_trace)
    if not frames:
        return None
    # A line of torch says less than the line of the model that called it.
    file, line, code = next(
        (frame for frame in reversed(frames) if not frame[0].startswith((TORCH_DIRECTORY, "<"))), frames[-1]
    )
    return f"{file.rsplit('/', 1)[-1]}:{line}: {code.strip()}"


ASSERTIONS = frozenset(
    {
        torch.ops.aten._assert_tensor_metadata.default,
        torch.ops.aten._assert_scalar.default,
        torch.ops.aten.sym_constrain_range_for_size.default,
    }
)


def is_size_node(node: fx.Node) -> bool:
    """Whether a node computes a size from shapes alone."""
    return node.op == "call_function" and (
        node.target is torch.ops.aten.sym_size.int
        or (getattr(node.target, "__module__", "") in ("_operator", "operator", "torch") and "expr" in node.meta)
    )
