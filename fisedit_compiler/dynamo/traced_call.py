"""Which call of a module a graph of Dynamo's is: its flat inputs as arguments, a result as its flat outputs.

Everything here that asks Dynamo asks it while it traces, from inside a backend. There is no public way to ask what it
traces, so that names of Dynamo's own are used (``wrap_inline``, ``get_local_source_name``, ``current_tx``,
``compile_subgraph_reason``, ``meta["grapharg"]``). They are the same in the sources of torch 2.11, 2.12 and 2.13; the
tests of the backend are what notices if another release has others. What the call is used for is written
in ``fisedit_compiler/dynamo/backend.py``.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.external_utils import wrap_inline
from torch._dynamo.source import get_local_source_name
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch.utils._pytree import TreeSpec, keystr, tree_flatten_with_path, tree_leaves, tree_unflatten

from fisedit_compiler.errors import CaptureError

REMEDY = "or use fisedit_compiler.sparsify(module), which captures with torch.export and needs no torch.compile."


@dataclass(frozen=True)
class TracedCall:
    """How a Dynamo graph's flat inputs and outputs stand for a call of its module.

    Attributes:
        module: refers to the module weakly, as Dynamo keeps graphs longer than users keep modules.
        positional, varargs, keywords, varkw: names of the forward's parameters by kind.
        spec: the tree of the arguments by parameter name.
        leaves: its leaves as Dynamo saw them; what is not an input of the graph is guarded, or never read.
        inputs: positions among the flat inputs, with the leaves that each is.
        num_outputs: tensors that the graph returns.
    """

    module: Callable[[], nn.Module | None]
    positional: tuple[str, ...]
    varargs: str | None
    keywords: tuple[str, ...]
    varkw: str | None
    spec: TreeSpec
    leaves: tuple[Any, ...]
    inputs: tuple[tuple[int, tuple[int, ...]], ...]
    num_outputs: int

    @classmethod
    def of_current_frame(cls, graph_module: fx.GraphModule) -> TracedCall:
        """Describe the frame that Dynamo is tracing.

        Raises:
            CaptureError: the graph is not the whole forward of a module, or reads a tensor inside an argument that is
                no dict, list or tuple.
        """
        module, skipped = _traced_module()
        translator = InstructionTranslator.current_tx()
        code, local = translator.f_code, translator.f_locals
        names, varargs, varkw = inspect.getargs(code)
        positional, keywords = tuple(names[skipped : code.co_argcount]), tuple(names[code.co_argcount :])
        arguments = {name: local[name] for name in (*positional, varargs, *keywords, varkw) if name is not None}
        with_paths, spec = tree_flatten_with_path(arguments)
        leaves = {f"L{keystr(path)}": leaf for path, leaf in with_paths}
        inputs = _inputs(graph_module, arguments, leaves)
        read = {index for _, indices in inputs for index in indices}
        kept = tuple(
            # Tensors are not kept: a graph's inputs come with every call, and of the others nothing is read.
            torch.zeros((), dtype=leaf.dtype, device=leaf.device).expand(leaf.shape)
            if isinstance(leaf, Tensor) and index not in read
            else None
            if isinstance(leaf, Tensor)
            else leaf
            for index, leaf in enumerate(leaves.values())
        )
        outputs: Any = graph_module.graph.output_node().args[0]
        return cls(weakref.ref(module), positional, varargs, keywords, varkw, spec, kept, inputs, len(outputs))

    def arguments(self, inputs: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of the module for the graph's flat inputs."""
        leaves = list(self.leaves)
        for position, indices in self.inputs:
            for index in indices:
                value = inputs[position]
                # Dynamo hands a number that varies over as a tensor.
                was_number = isinstance(self.leaves[index], (int, float)) and isinstance(value, Tensor)
                leaves[index] = value.item() if was_number else value
        named = tree_unflatten(leaves, self.spec)
        args = [named[name] for name in self.positional] + list(named[self.varargs] if self.varargs else ())
        kwargs = {name: named[name] for name in self.keywords} | dict(named[self.varkw] if self.varkw else {})
        return tuple(args), kwargs

    def outputs(self, result: Any) -> tuple[Tensor, ...]:
        """What the graph would return, from what the module returned: every tensor once, in order.

        Raises:
            CaptureError: the graph returns another number of values.
        """
        tensors = {id(leaf): leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)}
        if len(tensors) != self.num_outputs:
            raise CaptureError(
                f"{type(self.module()).__name__} returns {len(tensors)} tensors, its graph {self.num_outputs} values: "
                "it hands an input on, or returns numbers. Return new tensors only, " + REMEDY
            )
        return tuple(tensors.values())


def _traced_module() -> tuple[nn.Module, int]:
    """The module whose whole forward Dynamo is tracing, and how many of the frame's parameters are the module.

    Raises:
        CaptureError: it is tracing something else.
    """
    translator = InstructionTranslator.current_tx()
    code = translator.f_code
    reason = translator.output.compile_subgraph_reason
    remedy = "and a sparse program is made of a whole module. Take the cause away (fullgraph=True shows it), " + REMEDY
    if reason is not None and reason.graph_break:
        what = reason.reason.strip().splitlines()[0]
        lines = [f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno}: {frame.line}" for frame in reason.user_stack]
        raise CaptureError(
            f"torch.compile broke the graph of {code.co_name}() ({lines[-1] if lines else what}), {remedy}\n"
            f"The break: {what}"
        )
    if code is wrap_inline(nn.Identity()).__code__:
        # Forwards that torch itself defines, such as nn.Sequential's, are traced inside a frame of Dynamo's own.
        inlined: Any = translator.f_locals["fn"]
        if isinstance(inlined, nn.Module):
            return inlined, 0
    module = translator.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
    if isinstance(module, nn.Module) and getattr(module.forward, "__code__", None) is code:
        return module, 1
    file = code.co_filename.rsplit("/", 1)[-1]
    raise CaptureError(
        f"torch.compile traced {code.co_name}() ({file}:{code.co_firstlineno}), which is not the forward of a module, "
        f'{remedy}\nCompile the module itself: torch.compile(unet, backend="fisedit").'
    )


def _inputs(
    graph_module: fx.GraphModule, arguments: Mapping[str, Any], leaves: Mapping[str, Any]
) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """Which leaves of the arguments each placeholder is; parameters, buffers and sizes are none."""
    order = {name: index for index, name in enumerate(leaves)}
    found: list[tuple[int, tuple[int, ...]]] = []
    others: list[tuple[str, int | None]] = []  # what is read besides: of which argument, and of which leaf's size
    for position, node in enumerate(graph_module.graph.find_nodes(op="placeholder")):
        source = node.meta["grapharg"].source
        name = source.name() if callable(source.name) else source.name  # a property in 2.11 to 2.13, once a method
        if name in leaves:
            # Dynamo makes one input of a tensor that is passed twice, and guards that it is.
            same = [other for other, leaf in leaves.items() if leaf is leaves[name] and isinstance(leaf, Tensor)]
            found.append((position, tuple(order[other] for other in same or [name])))
        elif (argument := get_local_source_name(source)) in arguments:
            others.append((str(argument), next((order[leaf] for leaf in order if name.startswith(f"{leaf}.")), None)))
    placed = {index for _, indices in found for index in indices}
    if lost := [argument for argument, index in others if index not in placed]:
        raise CaptureError(
            f"The module reads its argument {lost[0]!r} in a way that cannot be put back into an argument: a tensor "
            "inside an object, or the size of a tensor that is not read otherwise. Pass tensors themselves, in dicts, "
            "lists or tuples, " + REMEDY
        )
    return tuple(found)
