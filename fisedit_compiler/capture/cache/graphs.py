"""Captured graphs as plain data (``None``, numbers, text, lists, dicts with text keys) and back.

:func:`decode` takes any JSON value whatever: every field is checked before it is used, because ``torch.fx`` writes
names and keywords of a graph into source code as they are.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Iterable
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils import _pytree as pytree

from fisedit_compiler.capture.cache.sizes import read_size, write_size
from fisedit_compiler.capture.cache.targets import VALUES, find_target, target_text
from fisedit_compiler.capture.captured import CapturedGraph
from fisedit_compiler.graph.signatures import CallSignature
from fisedit_compiler.graph.specs import ValueSpec

_META = ("path", "source", "origin")
_ATTRIBUTE = re.compile(r"(?!__)[\w-]+(\.(?!__)[\w-]+)*")
_LARGEST_MULTIPLE = 4096


class UnreadableError(ValueError):
    """An entry is not what :func:`encode` makes; never leaves the cache."""


def encode(captured: CapturedGraph) -> dict[str, Any]:
    """A captured graph as plain data, without its constants.

    Raises:
        NotImplementedError, ValueError: it holds something that plain data cannot.
    """
    return {
        "multiple": captured.multiple,
        "outputs": _encode_outputs(captured.treespec),
        "nodes": [_encode_node(node) for node in captured.graph.nodes],
    }


def decode(document: Any, signature: CallSignature, constants: Iterable[str]) -> CapturedGraph:
    """The captured graph of a document; its constants are left to the caller.

    Args:
        document: any JSON value.
        signature: the call it was captured for; the placeholders must be its tensors.
        constants: names of the tensors that lie beside the document.

    Raises:
        ValueError: the document is no captured graph. fx and sympy may raise other things for odd ones.
    """
    fields = _fields(document, {"multiple", "outputs", "nodes"})
    multiple = fields["multiple"]
    _demand(type(multiple) is int and 1 <= multiple <= _LARGEST_MULTIPLE, "its divisor is out of range")
    reader = _Reader(_list(fields["nodes"]))
    placeholders = [node.target for node in reader.graph.nodes if node.op == "placeholder"]
    _demand(placeholders == [spec.identifier() for spec in signature.tensors], "its inputs are others")
    attributes = {node.target for node in reader.graph.nodes if node.op == "get_attr"}
    _demand(set(constants) <= attributes, "it holds tensors that nothing reads")
    outputs = _decode_outputs(fields["outputs"])
    last = next(iter(reversed(reader.graph.nodes)))
    flat = last.args[0] if last.op == "output" else None
    _demand(isinstance(flat, (list, tuple)) and len(flat) == outputs.num_leaves, "its outputs are others")
    reader.graph.lint()
    return CapturedGraph(reader.graph, signature, multiple, {}, outputs)


def _demand(holds: bool, problem: str) -> None:
    if not holds:
        raise UnreadableError(problem)


def _fields(value: Any, required: set[str], optional: Iterable[str] = ()) -> dict[str, Any]:
    _demand(isinstance(value, dict) and required <= value.keys() <= required | set(optional), "its fields are others")
    return value  # type: ignore[no-any-return]


def _list(value: Any) -> list[Any]:
    _demand(isinstance(value, list), "a list is missing")
    return value  # type: ignore[no-any-return]


def _text(value: Any) -> str:
    _demand(isinstance(value, str), "a text is missing")
    return value  # type: ignore[no-any-return]


def _identifier(value: Any) -> str:
    """A name that is safe to stand in source code."""
    _demand(_text(value).isidentifier() and not keyword.iskeyword(value), f"{value!r} is no name")
    return value  # type: ignore[no-any-return]


# -- nodes ---------------------------------------------------------------------------------------


def _encode_node(node: fx.Node) -> dict[str, Any]:
    target = node.target if isinstance(node.target, str) else target_text(node.target)
    item: dict[str, Any] = {"op": node.op, "name": node.name, "target": target}
    item["args"] = [_encode_value(value) for value in node.args]
    item["kwargs"] = {name: _encode_value(value) for name, value in node.kwargs.items()}
    item.update({key: node.meta[key] for key in _META if node.meta.get(key) is not None})
    spec = node.meta.get("spec")
    if isinstance(spec, ValueSpec):
        item["spec"] = _encode_spec(spec)
    elif isinstance(spec, tuple):
        item["specs"] = [_encode_spec(part) for part in spec]
    if "expr" in node.meta:
        item["expr"] = write_size(node.meta["expr"])
    return item


class _Reader:
    """Reads nodes one after the other; arguments are nodes that were read before."""

    def __init__(self, items: list[Any]) -> None:
        self.graph = fx.Graph()
        self._nodes: dict[str, fx.Node] = {}
        self._sizes: dict[str, sympy.Expr] = {}
        for number, item in enumerate(items):
            node = self._node(item)
            _demand((node.op == "output") == (number == len(items) - 1), "its output is not its last node")

    def _node(self, item: Any) -> fx.Node:
        item = _fields(item, {"op", "name", "target", "args", "kwargs"}, {*_META, "spec", "specs", "expr"})
        name = _identifier(item["name"])
        _demand(name not in self._nodes, f"{name} is there twice")
        args = tuple(self._value(value) for value in _list(item["args"]))
        _demand(isinstance(item["kwargs"], dict), "keywords are missing")
        kwargs = {_identifier(key): self._value(value) for key, value in item["kwargs"].items()}
        if item["op"] == "output":
            _demand(len(args) == 1 and not kwargs, "its output has other arguments")
            node = self.graph.output(args[0])
        else:
            node = self.graph.create_node(item["op"], self._target(item, args, kwargs), args, kwargs, name=name)
            _demand(node.name == name, f"{name} is no name of a node")
        self._nodes[name] = node
        self._describe(node, item)
        return node

    def _target(self, item: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        target = _text(item["target"])
        if item["op"] == "call_function":
            found = find_target(target)
            if isinstance(found, torch._ops.OpOverload):
                _check_arguments(found, args, kwargs)
            return found
        _demand(not args and not kwargs, "an input has arguments")
        if item["op"] == "placeholder":
            return _identifier(target)
        _demand(item["op"] == "get_attr", f"{item['op']!r} is no kind of node")
        _demand(_ATTRIBUTE.fullmatch(target) is not None, f"{target!r} names no tensor of a module")
        return target

    def _describe(self, node: fx.Node, item: dict[str, Any]) -> None:
        node.meta["source"] = None
        for key in _META:
            if key in item:
                # Lines of source stand in comments of generated code.
                node.meta[key] = " ".join(_text(item[key]).splitlines())
        if "spec" in item:
            node.meta["spec"] = self._spec(item["spec"])
        elif "specs" in item:
            node.meta["spec"] = tuple(self._spec(part) for part in _list(item["specs"]))
        if "expr" in item:
            node.meta["expr"] = self._size(item["expr"])

    def _size(self, text: Any) -> sympy.Expr:
        if _text(text) not in self._sizes:
            self._sizes[text] = read_size(text)
        return self._sizes[text]

    def _spec(self, item: Any) -> ValueSpec:
        _demand(len(_list(item)) == 2, "a shape or a data type is missing")
        dtype = VALUES.get(_text(item[1]))
        _demand(isinstance(dtype, torch.dtype), f"{item[1]!r} is no data type")
        return ValueSpec(tuple(self._size(size) for size in _list(item[0])), dtype)  # type: ignore[arg-type]

    def _value(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._value(item) for item in value]
        if not isinstance(value, dict):
            return value
        _demand(len(value) == 1, "an argument is none of ours")
        ((kind, content),) = value.items()
        if kind == "node":
            _demand(_text(content) in self._nodes, f"{content} is read before it is computed")
            return self._nodes[content]
        if kind == "tuple":
            return tuple(self._value(item) for item in _list(content))
        if kind == "device":
            return torch.device(_text(content))
        _demand(kind == "torch" and _text(content) in VALUES, "an argument is none of ours")
        return VALUES[content]


def _check_arguments(operation: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """That a call has the arguments its schema asks for, by number and name."""
    known = operation._schema.arguments
    positional = [argument for argument in known if not argument.kwarg_only]
    given = {argument.name for argument in positional[: len(args)]} | kwargs.keys()
    needed = {argument.name for argument in known if not argument.has_default_value()}
    fits = len(args) <= len(positional) and len(given) == len(args) + len(kwargs)
    _demand(fits and needed <= given <= {argument.name for argument in known}, f"{operation} has other arguments")


def _encode_spec(spec: ValueSpec) -> list[Any]:
    return [[write_size(size) for size in spec.shape], str(spec.dtype)]


def _encode_value(value: Any) -> Any:
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, tuple):
        return {"tuple": [_encode_value(item) for item in value]}
    if isinstance(value, list):
        return [_encode_value(item) for item in value]
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)) and str(value) in VALUES:
        return {"torch": str(value)}
    raise NotImplementedError(f"argument {value!r} of type {type(value).__name__}")


# -- how the flat outputs are put together ---------------------------------------------------------


def _encode_outputs(treespec: Any) -> Any:
    return _encode_container(pytree.tree_unflatten([_LEAF] * treespec.num_leaves, treespec))


_LEAF = object()


def _encode_container(value: Any) -> Any:
    if value is _LEAF:
        return None
    if type(value) is tuple:
        return {"tuple": [_encode_container(item) for item in value]}
    if type(value) is list:
        return [_encode_container(item) for item in value]
    if type(value) is dict and all(type(key) in (str, int) for key in value):
        return {"dict": [[key, _encode_container(item)] for key, item in value.items()]}
    raise NotImplementedError(f"outputs in a {type(value).__name__}")


def _decode_outputs(value: Any) -> pytree.TreeSpec:
    return pytree.tree_flatten(_decode_container(value))[1]


def _decode_container(value: Any) -> Any:
    if value is None:
        return _LEAF
    if isinstance(value, list):
        return [_decode_container(item) for item in value]
    _demand(isinstance(value, dict) and len(value) == 1, "its outputs are in no container of ours")
    ((kind, content),) = value.items()
    if kind == "tuple":
        return tuple(_decode_container(item) for item in _list(content))
    pairs = [_list(pair) for pair in _list(content)]
    plain = all(len(pair) == 2 and type(pair[0]) in (str, int) for pair in pairs)
    _demand(kind == "dict" and plain, "its outputs are in no container of ours")
    return {key: _decode_container(item) for key, item in pairs}
