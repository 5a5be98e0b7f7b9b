"""A lowered graph handed to Inductor as it is, without Dynamo and AOTAutograd, which take as long as Inductor itself.

Dynamo reads Python code, gives every length of every input a symbol of its own and finds out by guards which are equal.
AOTAutograd traces everything twice, to part what is written from what is returned. A lowered graph is a graph already,
writes nothing, and knows which lengths are equal (``lengths.py``). So it is traced once, with a symbol for each number.
With fewer symbols Inductor is twice as fast, too. It makes the same code in the end.

What does not fit is refused by :class:`NotDirect`; ``inductor.py`` hands it to torch.compile.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn

from fisedit_compiler.errors import FiseditError
from fisedit_compiler.lowering.codegen.ahead import kernels_ahead
from fisedit_compiler.lowering.codegen.kept_code import by_digest
from fisedit_compiler.lowering.codegen.known_graphs import KnownGraph
from fisedit_compiler.lowering.codegen.lengths import lengths

ALIGNMENT = 16
"""Elements, at least as many as the bytes that Inductor's kernels expect addresses to be a multiple of."""
SMALLEST = 2
"""Of a length that is a symbol: Inductor takes 1 for a constant."""

Decompositions = Mapping[Any, Callable[..., Any]]


class NotDirect(FiseditError, RuntimeError):
    """A graph, or its arguments, cannot be compiled this way."""


class DirectStep:
    """A lowered graph, and Inductor's code of it for every form of arguments that it was called with.

    What a mask decides is a symbol, so one code serves every mask. Other sizes are numbers, until a call differs in
    them. Then those become symbols as well, equal ones the same, so that a third size finds code.
    """

    def __init__(
        self,
        step: fx.GraphModule,
        decompositions: Callable[[], Decompositions],
        choices: Callable[[], Any],
        besides: Callable[[], None] | None = None,
    ) -> None:
        """``decompositions`` gives what Inductor compiles in the place of operations, ``choices`` its heuristics;
        ``besides`` is that of :func:`kernels_ahead`."""
        self._step, self._decompositions, self._choices, self._besides = step, decompositions, choices, besides
        self._weights = tuple(dict.fromkeys(str(node.target) for node in step.graph.find_nodes(op="get_attr")))
        self._names: dict[tuple[int, int], Hashable] = {
            (position, axis): name
            for position, node in enumerate(step.graph.find_nodes(op="placeholder"))
            for axis, name in lengths(node).items()
        }
        self._changing: set[tuple[int, int]] = set()
        self._made: list[_Code] = []

    def __call__(self, *arguments: Any) -> Any:
        """What the graph returns; compiled first, if there is no code for such arguments.

        Raises:
            NotDirect: it cannot be compiled this way.
        """
        values = [*arguments, *(attrgetter(path)(self._step) for path in self._weights)]
        for code in reversed(self._made):
            found = code.lengths_of(values)
            if found is not None:
                return code.run(found, values)
        code, found = self._compiled(values)
        results = code.run(found, values)
        self._made.append(code)
        return results

    def _compiled(self, values: Sequence[Any]) -> tuple[_Code, list[int]]:
        if not all(map(_is_plain, values)):
            raise NotDirect("an argument is no plain tensor")
        if torch.is_grad_enabled() and any(value.requires_grad for value in values):
            raise NotDirect("gradients are wanted")
        if not isinstance(self._step.graph.output_node().args[0], (tuple, list)):
            raise NotDirect("it returns no row of results")
        if self._made:
            self._changing |= _other_sizes(self._made[-1].layouts, values)
        code = _Code(self._layouts(values))
        graph = _with_weights_as_inputs(self._step, self._weights)
        code.make(graph, values, self._decompositions(), self._choices(), self._besides)
        found = code.lengths_of(values)
        if found is None:
            raise NotDirect("its own arguments do not fit the code")
        return code, found

    def _layouts(self, values: Sequence[Tensor]) -> list[_Layout]:
        known: dict[Hashable, tuple[str, int]] = {}
        layouts = []
        for position, value in enumerate(values):
            sizes: list[int | str] = list(value.shape)
            for axis, size in enumerate(value.shape):
                name = self._names.get((position, axis), size if (position, axis) in self._changing else None)
                if name is None or size < SMALLEST:
                    continue
                symbol, expected = known.setdefault(name, (f"length_{len(known)}", size))
                if size != expected:
                    raise NotDirect(f"{name} is {expected} in one argument and {size} in another")
                sizes[axis] = symbol
            layouts.append(_Layout.of(value, sizes))
        return layouts


@dataclass(frozen=True)
class _Layout:
    """An argument of one form.

    Attributes:
        sizes: numbers, and names of those that are symbols.
        strides: ``None`` if a size is a symbol.
        order: then its axes, the outermost first; elements follow each other in this order.
        offset: elements by which its memory begins behind an aligned address.
    """

    dtype: torch.dtype
    device: torch.device
    sizes: tuple[int | str, ...]
    strides: tuple[int, ...] | None
    order: tuple[int, ...] = ()
    offset: int = 0

    @classmethod
    def of(cls, value: Tensor, sizes: Sequence[int | str]) -> _Layout:
        strides = value.stride()
        if all(isinstance(size, int) for size in sizes):
            return cls(value.dtype, value.device, tuple(sizes), strides, offset=_offset(value))
        axes = range(value.dim())
        order = axes if value.is_contiguous() else sorted(axes, key=lambda axis: -strides[axis])
        layout = cls(value.dtype, value.device, tuple(sizes), None, tuple(order))
        if not layout.describes(value):
            raise NotDirect("an argument whose size differs between calls has gaps between its elements")
        return layout

    def strides_of(self, shape: Sequence[Any]) -> tuple[Any, ...]:
        if self.strides is not None:
            return self.strides
        strides: list[Any] = [1] * len(shape)
        step: Any = 1
        for axis in reversed(self.order):
            strides[axis] = step
            step = step * (shape[axis] or 1)  # as torch does it, where there are no elements
        return tuple(strides)

    def describes(self, value: Tensor) -> bool:
        """Whether a tensor is of this form, whatever its symbols are."""
        if (value.dtype, value.device, value.dim()) != (self.dtype, self.device, len(self.sizes)):
            return False
        shape, strides = value.shape, value.stride()
        if self.strides is not None:
            return shape == self.sizes and strides == self.strides and _offset(value) == self.offset
        expected = self.strides_of(shape)
        return all(
            found == size or (isinstance(size, str) and found >= SMALLEST)
            for found, size in zip(shape, self.sizes, strict=True)
        ) and (
            not value.numel()  # then it has its strides for nothing
            or all(size == 1 or found == due for size, found, due in zip(shape, strides, expected, strict=True))
        )


@dataclass
class _Code:
    """Inductor's code for arguments of one form; it takes the lengths that are symbols first."""

    layouts: list[_Layout]
    _compiled: Callable[[list[Any]], Any] = field(init=False)
    _symbols: list[sympy.Symbol] = field(init=False)
    _conditions: list[sympy.Basic] = field(init=False)

    def lengths_of(self, values: Sequence[Tensor]) -> list[int] | None:
        """The lengths of such arguments, in order of their symbols; ``None`` if the code is not for them."""
        found: dict[str, int] = {}
        for layout, value in zip(self.layouts, values, strict=True):
            if not layout.describes(value):
                return None
            for size, name in zip(value.shape, layout.sizes, strict=True):
                if isinstance(name, str) and found.setdefault(name, size) != size:
                    return None
        numbers = dict(zip(self._symbols, map(sympy.Integer, found.values()), strict=True))
        holds = all(condition.xreplace(numbers) == sympy.true for condition in self._conditions)
        return list(found.values()) if holds else None

    @torch.no_grad()
    def run(self, found: Sequence[int], values: Sequence[Tensor]) -> Any:
        return self._compiled([*found, *values])

    @torch.no_grad()
    def make(
        self,
        graph: fx.GraphModule,
        values: Sequence[Tensor],
        decompositions: Decompositions,
        choices: Any,
        besides: Callable[[], None] | None,
    ) -> None:
        """Make the code from a graph without weights of its own.

        Raises:
            NotDirect: the graph writes to something, or a symbol became a number.
        """
        from torch._dispatch.python import enable_python_dispatcher
        from torch._dynamo.convert_frame import compile_lock
        from torch._guards import TracingContext, tracing
        from torch._inductor.async_compile import AsyncCompile
        from torch._inductor.virtualized import V
        from torch._subclasses import FakeTensorMode
        from torch.fx.experimental.proxy_tensor import make_fx
        from torch.fx.experimental.symbolic_shapes import ShapeEnv

        if any(value.is_cuda for value in values):
            AsyncCompile.wakeup()  # the processes that Triton runs in take a while to start
        environment = ShapeEnv()
        # With symbols, results cost more to keep and to make again than to compute.
        with torch._dynamo.config.patch(fake_tensor_cache_enabled=False):
            mode = FakeTensorMode(shape_env=environment)
        symbols = _symbols(environment, self.layouts, values)
        with mode:
            fakes = [_fake(layout, symbols) for layout in self.layouts]
        inputs = [*symbols.values(), *fakes]

        def run(*inputs: Any) -> Any:
            return tuple(graph(*inputs[len(symbols) :]))

        def made() -> Any:
            with mode:
                traced = make_fx(run, decomposition_table=dict(decompositions))(*inputs)
            _check(traced)
            traced.graph.eliminate_dead_code()
            traced.recompile()
            with kernels_ahead(values, besides) as hand_over, V.set_choices_handler(choices):
                hand_over(traced)
                return _compile_traced(traced, inputs)

        # Whoever calls torch.compile in another thread holds the lock meanwhile.
        with (
            compile_lock,
            _compiling(),
            tracing(TracingContext(mode)),
            V.set_fake_mode(mode),
            enable_python_dispatcher(),
            by_digest(),
        ):
            known = KnownGraph(graph, self.layouts, decompositions)
            self._compiled = known.load(inputs) or made()
            known.keep(self._compiled, inputs)
        self._symbols = [symbol.node.expr for symbol in symbols.values()]
        self._conditions = [guard.expr for guard in environment.guards]
        if any(environment.replace(symbol).is_number for symbol in self._symbols):
            raise NotDirect("a length that differs between calls became a number")


@contextmanager
def _compiling() -> Iterator[None]:
    """Say that something is compiled, as torch.compile does: else torch takes the functions that it compiled, and that
    other threads call meanwhile, for traced ones, which it refuses."""
    state: Any = torch.compiler
    before, state._is_compiling_flag = state._is_compiling_flag, True
    try:
        yield
    finally:
        state._is_compiling_flag = before


def _is_plain(value: Any) -> bool:
    return (
        type(value) in (Tensor, nn.Parameter, nn.Buffer)
        and value.layout is torch.strided
        and not (value.is_quantized or value.is_conj() or value.is_neg())
    )


def _offset(value: Tensor) -> int:
    """Inductor relies on aligned addresses where an argument's offset in its memory says that it may."""
    return int(value.storage_offset()) % ALIGNMENT if value.numel() else 0


def _other_sizes(layouts: Sequence[_Layout], values: Sequence[Tensor]) -> set[tuple[int, int]]:
    """The axes in whose sizes arguments differ from others."""
    return {
        (position, axis)
        for position, (layout, value) in enumerate(zip(layouts, values, strict=True))
        if len(layout.sizes) == value.dim()
        for axis, (size, found) in enumerate(zip(layout.sizes, value.shape, strict=True))
        if isinstance(size, int) and size != found
    }


def _with_weights_as_inputs(step: fx.GraphModule, weights: Sequence[str]) -> fx.GraphModule:
    """A copy whose weights are inputs, behind the others."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in step.graph.find_nodes(op="placeholder"):
        copies[node] = graph.node_copy(node)
    inputs = {path: graph.placeholder(f"weight_{number}") for number, path in enumerate(weights)}
    for node in step.graph.nodes:
        if node.op == "get_attr":
            copies[node] = inputs[str(node.target)]
        elif node.op != "placeholder":
            copies[node] = graph.node_copy(node, copies.__getitem__)
    return fx.GraphModule({}, graph)


def _symbols(environment: Any, layouts: Sequence[_Layout], values: Sequence[Tensor]) -> dict[str, Any]:
    """A symbolic integer by the name of each length."""
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic

    made: dict[str, Any] = {}
    for layout, value in zip(layouts, values, strict=True):
        for name, size in zip(layout.sizes, value.shape, strict=True):
            if isinstance(name, str) and name not in made:
                source = ConstantSource(name)
                symbol = environment.create_symbol(size, source, DimDynamic.DYNAMIC, None)
                made[name] = environment.create_symintnode(symbol, hint=size, source=source)
    return made


def _fake(layout: _Layout, symbols: Mapping[str, Any]) -> Tensor:
    shape = [symbols[size] if isinstance(size, str) else size for size in layout.sizes]
    value = torch.empty_strided(shape, layout.strides_of(shape), dtype=layout.dtype, device=layout.device)
    if not layout.offset:
        return value
    size = 1 + layout.offset + sum((size - 1) * stride for size, stride in zip(shape, value.stride(), strict=True))
    memory = torch.empty(size, dtype=layout.dtype, device=layout.device)
    return memory.as_strided(shape, value.stride(), layout.offset)


def _check(traced: fx.GraphModule) -> None:
    """Refuse a graph that AOTAutograd would have to change."""
    from torch._higher_order_ops.invoke_subgraph import invoke_subgraph

    for module in traced.modules():
        if not isinstance(module, fx.GraphModule):
            continue
        for node in module.graph.nodes:
            if isinstance(node.target, torch._ops.OpOverload):
                if node.target._schema.is_mutable:
                    raise NotDirect(f"{node.target} writes to an argument")
            elif isinstance(node.target, torch._ops.HigherOrderOperator) and node.target is not invoke_subgraph:
                raise NotDirect(f"{node.target} calls functions")
    if not all(isinstance(value, fx.Node) for value in _results(traced)):
        raise NotDirect("a result is no tensor")


def _results(traced: fx.GraphModule) -> Sequence[Any]:
    results: Any = traced.graph.output_node().args[0]
    return tuple(results)


def _compile_traced(traced: fx.GraphModule, inputs: Sequence[Any]) -> Callable[[list[Any]], Any]:
    """What ``compile_fx`` does behind AOTAutograd."""
    from torch._inductor import compile_fx, config

    make_extra = compile_fx.create_compiler_config_extra
    # torch 2.11 asks for the configuration, torch 2.13 for the graph.
    asked: Any = config if "config" in inspect.signature(make_extra).parameters else traced
    return compile_fx.compile_fx_forward(
        traced,
        inputs,
        num_orig_model_outputs=len(_results(traced)),
        num_example_inputs=len(inputs),
        compiler_config_extra=make_extra(asked),
        is_inference=True,
    )
