"""From an exported program to the compiler's own form.

Placeholders are the call's tensors, parameters are ``get_attr`` nodes named as in the user's model (shared with it,
never copied), and nodes carry sympy shapes, module path and source line.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from fisedit_compiler.capture.blame import TORCH_DIRECTORY
from fisedit_compiler.capture.captured import CapturedGraph
from fisedit_compiler.errors import CaptureError
from fisedit_compiler.graph.ir import describe
from fisedit_compiler.graph.signatures import CallSignature, TensorSpec
from fisedit_compiler.graph.sizes import BATCH, HEIGHT, TEXT, WIDTH
from fisedit_compiler.graph.specs import ValueSpec


def translate(module: nn.Module, exported: ExportedProgram, signature: CallSignature, multiple: int) -> CapturedGraph:
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


def _refuse_writes_to_buffers(exported: ExportedProgram, module: nn.Module) -> None:
    written = sorted({str(name) for name in exported.graph_signature.buffers_to_mutate.values()})
    if written:
        raise CaptureError(
            f"The forward of {type(module).__name__} writes to its buffers: {', '.join(written)}. Its next call would "
            "read what this one wrote, and a recording could not be repeated. Write to them outside of the forward, or "
            "only in training."
        )


ASSERTIONS = frozenset(
    {
        torch.ops.aten._assert_tensor_metadata.default,
        torch.ops.aten._assert_scalar.default,
        torch.ops.aten.sym_constrain_range_for_size.default,
    }
)
