"""How a lowered step becomes GPU code: Inductor gets it, with the ``fisedit::`` ops taken apart that it can fuse.

It is given the graph as it is (``direct.py``), or by torch.compile where that is refused. An op says in its traits
whether it can be taken apart (``OpTraits.inline``); where a provider takes the operands, it stays whole after all.
Normalisation, gathers and scatters are pointwise operations or copies to Inductor. A convolution is taken apart into a
fused kernel that writes everything it reads side by side, and an op that chooses by its table between taps and patches
when it runs: so one compilation serves every block size. Attention stays whole. The kernels of what stays whole are
compiled meanwhile (``ahead.py``).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache, partial, wraps
from typing import Any

import torch
from torch import Tensor, fx

from fisedit_compiler.kernels.providers import choose
from fisedit_compiler.kernels.registry import Op, op_of
from fisedit_compiler.kernels.traits import inlined
from fisedit_compiler.lowering.codegen.ahead import kernels_ahead
from fisedit_compiler.lowering.codegen.direct import DirectStep
from fisedit_compiler.lowering.codegen.kept_code import by_digest, by_name
from fisedit_compiler.lowering.regions import allow_regions, whole

logger = logging.getLogger(__name__)

_READ_ONCE = 2048
"""Channels of a norm that one program holds at once."""


def compile_step(step: fx.GraphModule, besides: Callable[[], None] | None = None) -> Callable[..., Any]:
    """The step as Inductor's code: one compilation for every mask, row counts symbolic.

    Args:
        step: lowered.
        besides: launches the kernels that follow on the step, which are compiled meanwhile as well.
    """
    ways = [lambda: directly(step, besides), lambda: _compiled(step, besides)]
    if whole(step) is not step:
        allow_regions(step.graph)
        # Torch promises less of regions than of other graphs.
        ways.append(lambda: _compiled(whole(step), besides))
    return _FirstThatWorks(ways)


def compile_dense(recording: fx.GraphModule) -> Callable[..., Any]:
    """The recording graph as Inductor's code, for the sizes that it is called with first."""
    return _FirstThatWorks([lambda: directly(recording), lambda: _compiled(recording, dynamic=False)])


def directly(graph: fx.GraphModule, besides: Callable[[], None] | None = None) -> Callable[..., Any]:
    """A graph compiled without Dynamo and AOTAutograd, see ``direct.py``."""
    return DirectStep(graph, _decompositions, _choices, besides)


def _compiled(graph: fx.GraphModule, besides: Callable[[], None] | None = None, **options: Any) -> Callable[..., Any]:
    backend = _inductor if besides is None else partial(_inductor, besides=besides)
    return torch.compile(graph, fullgraph=True, backend=backend, **options)


class _FirstThatWorks:
    """A compiled graph, in the first of some ways by which a call succeeds.

    A way that made code for one form of arguments may refuse another. Then the next one makes all later calls.
    """

    def __init__(self, ways: Sequence[Callable[[], Callable[..., Any]]]) -> None:
        self._ways = ways
        self._made: dict[int, Callable[..., Any]] = {}
        self._first = 0

    def __call__(self, *arguments: Any) -> Any:
        while True:
            way = self._first
            if way not in self._made:
                self._made.setdefault(way, self._ways[way]())
            try:
                return self._made[way](*arguments)
            except (MemoryError, torch.OutOfMemoryError, torch.AcceleratorError):
                raise
            except Exception as error:
                if way + 1 == len(self._ways):
                    raise
                logger.info("compiled in another way, which takes longer (%s: %s)", type(error).__name__, error)
                self._first = max(self._first, way + 1)  # another thread may have been here


def _inductor(graph: fx.GraphModule, example_inputs: Any, besides: Callable[[], None] | None = None) -> Any:
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner
    from torch._inductor.virtualized import V

    with kernels_ahead(example_inputs, besides) as hand_over, by_digest(), V.set_choices_handler(_choices()):

        def compile_inner(traced: fx.GraphModule, inputs: Any, **options: Any) -> Any:
            hand_over(traced)
            return compile_fx_inner(traced, inputs, **by_name(options, _decompositions))

        return compile_fx(graph, example_inputs, inner_compile=compile_inner, decompositions=_decompositions())


def _decompositions() -> dict[Any, Callable[..., Any]]:
    from torch._inductor.decomposition import select_decomp_table

    return {**select_decomp_table(), **taken_apart()}


def taken_apart() -> dict[Any, Callable[..., Any]]:
    """What Inductor takes apart, with what it compiles instead; that says ``NotImplemented`` where a provider runs."""
    found = {target: (op_of(target), inline) for target, inline in inlined().items()}
    return {
        target: _unless_provided(op, inline) if op is not None and op.providers else inline
        for target, (op, inline) in found.items()
    }


def _unless_provided(op: Op, inline: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(inline)
    def decomposition(*args: Any, **kwargs: Any) -> Any:
        device = next(value.device for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        provided = choose(op.providers, device.type, args, kwargs).provider is not None
        return NotImplemented if provided else inline(*args, **kwargs)

    return decomposition


@cache
def _choices() -> Any:
    """Inductor's heuristics, except that a norm over up to 2048 channels reads them once.

    Its own limit is 1024; above it a norm is a loop over the channels that reads everything three times, and here what
    it reads are the parts of a product. With few rows there are programs enough either way.
    """
    from torch._inductor.choices import InductorChoices
    from torch._inductor.runtime.hints import ReductionHint
    from torch._inductor.virtualized import V

    class Choices(InductorChoices):
        @staticmethod
        def should_use_persistent_reduction(features: Any, cooperative_reduction: bool) -> bool:
            if not cooperative_reduction and features.get_reduction_hint() == ReductionHint.INNER:
                return bool(V.graph.sizevars.statically_known_leq(features.reduction_numel, _READ_ONCE))
            return bool(InductorChoices.should_use_persistent_reduction(features, cooperative_reduction))

    return Choices()
