"""Captured graphs on disk, so that the next process does not capture the same model again.

Capture is the slow part (ten to thirty seconds; rewriting takes one), so what is kept is the captured and simplified
graph as JSON inside a safetensors file, with the few constant tensors it closes over. No code and no pickles: loading
an entry runs nothing. The key covers model structure, call signature, library versions and the compiler's own source.
An entry that cannot be read is ignored.

``FISEDIT_CACHE_DIR`` selects the folder; the default is ``fisedit_compiler`` in the user's cache directory.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import json
import logging
import os
import platform
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import sympy
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import fx
from torch.utils import _pytree as pytree

from fisedit_compiler.capture import CapturedGraph
from fisedit_compiler.inputs import CallSignature
from fisedit_compiler.ir import BATCH, HEIGHT, TEXT, WIDTH, ValueSpec

logger = logging.getLogger(__name__)
KEPT_ENTRIES = 64
_SYMBOLS = {str(symbol): symbol for symbol in (BATCH, HEIGHT, WIDTH, TEXT)}
_MODULES = ("_operator", "operator", "math", "torch")


def directory() -> Path:
    """The folder of cache entries (not created here)."""
    chosen = os.environ.get("FISEDIT_CACHE_DIR")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fisedit_compiler"


def entry_path(structure: str, signature: CallSignature, multiple: int | None) -> Path:
    """Where the capture of a module structure and call signature is kept."""
    versions = (torch.__version__, _version("diffusers"), platform.python_version(), _source_digest())
    text = repr((structure, signature, multiple, versions))
    return directory() / f"{hashlib.sha256(text.encode()).hexdigest()}.safetensors"


def load(path: Path, signature: CallSignature) -> CapturedGraph | None:
    """A captured graph from disk, or ``None`` if there is none or it cannot be read."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as entry:
            document = json.loads(entry.metadata()["graph"])
            constants = {name: entry.get_tensor(name) for name in entry.keys()}  # noqa: SIM118
        captured = _decode(document, signature)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        logger.warning("ignoring unreadable cache entry %s: %s", path.name, error)
        return None
    captured.constants = {name: tensor.to(signature.device) for name, tensor in constants.items()}
    return captured


def save(path: Path, captured: CapturedGraph) -> None:
    """Keep a captured graph; a graph or a disk that does not allow it is logged and left alone."""
    try:
        document = json.dumps(_encode(captured))
    except (TypeError, ValueError, NotImplementedError) as error:
        logger.info("capture is not kept on disk: %s", error)
        return
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in captured.constants.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        os.close(handle)
        save_file(tensors, temporary, metadata={"graph": document})
        os.replace(temporary, path)  # whole or not at all, also with several processes
        _prune(path.parent)
    except OSError as error:
        logger.warning("capture could not be kept on disk: %s", error)


def _prune(folder: Path) -> None:
    entries = sorted(folder.glob("*.safetensors"), key=lambda entry: entry.stat().st_mtime, reverse=True)
    for entry in entries[KEPT_ENTRIES:]:
        entry.unlink(missing_ok=True)


# What an entry depends on; the passes run again at every start.
_SOURCES = ("cache.py", "capture.py", "inputs.py", "ir.py", "passes/simplify.py")


@cache
def _source_digest() -> str:
    root = Path(__file__).parent
    return hashlib.sha256(b"".join((root / file).read_bytes() for file in _SOURCES)).hexdigest()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


# -- graphs as plain data ------------------------------------------------------------------------


def _encode(captured: CapturedGraph) -> dict[str, Any]:
    return {
        "multiple": captured.multiple,
        "treespec": pytree.treespec_dumps(captured.treespec),
        "nodes": [_encode_node(node) for node in captured.graph.nodes],
    }


def _decode(document: dict[str, Any], signature: CallSignature) -> CapturedGraph:
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    expressions: dict[str, sympy.Expr] = {}

    def expression(text: str) -> sympy.Expr:
        if text not in expressions:
            expressions[text] = sympy.parse_expr(text, local_dict=dict(_SYMBOLS))
        return expressions[text]

    def spec(item: list[Any]) -> ValueSpec:
        shape, dtype = item
        return ValueSpec(tuple(expression(size) for size in shape), getattr(torch, dtype))

    for item in document["nodes"]:
        args, kwargs = _decode_value(item["args"], nodes), _decode_value(item["kwargs"], nodes)
        if item["op"] == "output":
            node = graph.output(args[0])
        else:
            target = item["target"] if item["op"] in ("placeholder", "get_attr") else _resolve(item["target"])
            node = graph.create_node(item["op"], target, args, kwargs, name=item["name"])
        nodes[item["name"]] = node
        for key in ("path", "source", "origin"):
            if key in item:
                node.meta[key] = item[key]
        if "spec" in item:
            node.meta["spec"] = spec(item["spec"])
        elif "specs" in item:
            node.meta["spec"] = tuple(spec(part) for part in item["specs"])
        if "expr" in item:
            node.meta["expr"] = expression(item["expr"])
    graph.lint()
    treespec = pytree.treespec_loads(document["treespec"])
    return CapturedGraph(graph, signature, document["multiple"], {}, treespec)


def _encode_node(node: fx.Node) -> dict[str, Any]:
    target = node.target if isinstance(node.target, str) else _target_text(node.target)
    item: dict[str, Any] = {"op": node.op, "name": node.name, "target": target}
    item["args"], item["kwargs"] = _encode_value(node.args), _encode_value(dict(node.kwargs))
    item.update({key: node.meta[key] for key in ("path", "source", "origin") if key in node.meta})
    spec = node.meta.get("spec")
    if isinstance(spec, ValueSpec):
        item["spec"] = _encode_spec(spec)
    elif isinstance(spec, tuple):
        item["specs"] = [_encode_spec(part) for part in spec]
    if "expr" in node.meta:
        item["expr"] = str(node.meta["expr"])
    return item


def _encode_spec(spec: ValueSpec) -> list[Any]:
    return [[str(size) for size in spec.shape], str(spec.dtype).removeprefix("torch.")]


def _encode_value(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, tuple):
        return {"tuple": [_encode_value(item) for item in value]}
    if isinstance(value, list):
        return [_encode_value(item) for item in value]
    if isinstance(value, dict):
        return {"dict": [[key, _encode_value(item)] for key, item in value.items()]}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
        return {"torch": str(value).removeprefix("torch.")}
    raise NotImplementedError(f"argument {value!r} of type {type(value).__name__}")


def _decode_value(value: Any, nodes: dict[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_decode_value(item, nodes) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "node":
        return nodes[content]
    if kind == "tuple":
        return tuple(_decode_value(item, nodes) for item in content)
    if kind == "dict":
        return {key: _decode_value(item, nodes) for key, item in content}
    if kind == "device":
        return torch.device(content)
    return getattr(torch, content)


def _target_text(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return f"op:{target.namespace}.{target._opname}.{target._overloadname}"
    module = getattr(target, "__module__", None)
    if module in _MODULES:
        return f"fn:{module}.{target.__name__}"
    raise NotImplementedError(f"call of {target!r}")


def _resolve(text: str) -> Any:
    kind, _, name = text.partition(":")
    if kind == "op":
        namespace, operation, overload = name.split(".")
        return getattr(getattr(getattr(torch.ops, namespace), operation), overload)
    module, _, function = name.rpartition(".")
    if module not in _MODULES:
        raise ValueError(f"function {name} in a cache entry")
    return getattr(importlib.import_module(module), function)
