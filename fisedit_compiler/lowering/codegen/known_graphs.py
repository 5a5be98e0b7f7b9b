"""Code that an earlier process made of the same lowered graph: found without tracing the graph.

Inductor looks code up by the graph that it is handed, which has to be traced for that. Tracing a step takes longer than
all that follows once its code is on disk. So a small file beside Inductor's own says which of its entries a lowered
graph led to. Its name is a digest of all that decides on what is traced: the graph as text, the forms of its arguments,
what operations are taken apart into, the package's own sources, switches of torch, and whatever Inductor names its
entries by besides a graph. Where anything takes part whose source is not known here, or a file leads nowhere, the graph
is traced.

Tracing may go one way or another by lengths that are symbols, and Inductor's entry knows only of those conditions under
which its own code was made, maybe of another graph. So the file says as well for which lengths it holds.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
import operator
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import fx

from fisedit_compiler.capture.keys.code import home
from fisedit_compiler.kernels.traits import inlined
from fisedit_compiler.lowering.codegen.kept_code import is_in_digest
from fisedit_compiler.lowering.regions import region_of

logger = logging.getLogger(__name__)

_FOLDER = "fisedit"
"""In Inductor's cache, so that both are emptied together."""
_NAMESPACES = frozenset(("aten", "fisedit", "prims"))
"""Of ops whose sources are torch's or this package's."""
_WAYS = 8
"""Of tracing a graph, by conditions on its lengths, that a file knows at most."""


class KnownGraph:
    """A lowered graph with arguments of one form, and the code that there may be of it.

    Attributes:
        name: of the graph; ``None`` if it cannot be named.
    """

    def __init__(self, graph: fx.GraphModule, layouts: Sequence[Any], decompositions: Mapping[Any, Any]) -> None:
        """``layouts`` describe the arguments, each by its ``repr``; ``decompositions`` are those of tracing."""
        self.name: str | None = None
        try:
            text, table = _text(graph), _table(decompositions)
            if text is not None and table is not None:
                parts = [text, table, *map(repr, layouts), repr(_switches(layouts)), _surroundings()]
                self.name = hashlib.sha256("\0".join(parts).encode()).hexdigest()
        except Exception:
            logger.debug("a lowered graph has no name", exc_info=True)

    def load(self, inputs: Sequence[Any]) -> Callable[[list[Any]], Any] | None:
        """The code on disk, if there is any for these inputs; it takes a list.

        To be called where the graph would be traced: what the code relies on becomes guards of that environment.
        """
        if self.name is None:
            return None
        try:
            for entry, guards in _ways(self._file()):
                if _hold(guards, inputs) and (found := _load(entry, guards, inputs)) is not None:
                    return found
        except Exception:
            logger.debug("code that is on disk cannot be loaded", exc_info=True)
        return None

    def keep(self, compiled: Any, inputs: Sequence[Any]) -> None:
        """Note which code was made, and under which conditions on the lengths; in the environment of :meth:`load`."""
        entry = getattr(compiled, "_fx_graph_cache_key", None)
        if self.name is None or not isinstance(entry, str):
            return
        with suppress(OSError):
            from torch._inductor.codecache import write_atomic

            file, way = self._file(), (entry, _guards(inputs))
            known = _ways(file)
            if way not in known:
                file.parent.mkdir(parents=True, exist_ok=True)
                ways = [*known, way][-_WAYS:]
                write_atomic(str(file), "".join(f"{entry} {guards}\n" for entry, guards in ways))

    def _file(self) -> Path:
        from torch._inductor.runtime.cache_dir_utils import cache_dir

        assert self.name is not None
        return Path(cache_dir()) / _FOLDER / self.name


def _ways(file: Path) -> list[tuple[str, str]]:
    """Inductor's entries that a graph led to, each with the conditions that hold there."""
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeError):
        return []
    return [(entry, guards) for entry, _, guards in (line.partition(" ") for line in lines)]


def _guards(inputs: Sequence[Any]) -> str:
    environment, symbols = _environment(inputs)
    return environment.produce_guards_expression(placeholders=symbols) or ""


def _hold(guards: str, inputs: Sequence[Any]) -> bool:
    """Whether conditions hold for the lengths of a call; says nothing to the environment."""
    environment, symbols = _environment(inputs)
    return not guards or bool(environment.evaluate_guards_expression(guards, [each.node.hint for each in symbols]))


def _environment(inputs: Sequence[Any]) -> tuple[Any, list[torch.SymInt]]:
    """What knows of conditions on lengths where a graph is traced, and the lengths that are symbols."""
    mode = torch._guards.TracingContext.get().fake_mode
    assert mode is not None
    return mode.shape_env, [value for value in inputs if isinstance(value, torch.SymInt)]


def _load(entry: str, guards: str, inputs: Sequence[Any]) -> Callable[[list[Any]], Any] | None:
    from torch._inductor import config
    from torch._inductor.async_compile import CompiledTritonKernels
    from torch._inductor.codecache import FxGraphCache
    from torch._inductor.output_code import CompiledFxGraphConstants
    from torch._inductor.utils import BoxedBool

    if config.force_disable_caches or not config.fx_graph_cache:
        return None
    constants = CompiledFxGraphConstants()
    CompiledTritonKernels.cache_clear()
    found, _ = FxGraphCache.load_with_key(
        entry, [], inputs, local=True, remote_cache=None, is_backward=False, constants=constants
    )
    if found is None:
        return None
    if guards:
        environment, symbols = _environment(inputs)
        bool(environment.evaluate_guards_expression(guards, symbols))  # makes them conditions of this environment
    options: Any = {
        "cudagraphs": BoxedBool(config.triton.cudagraphs),
        "is_backward": False,
        "is_inference": True,
        "static_input_idxs": (),
    }
    found.post_compile(inputs, constants, options)
    return found


def _text(graph: fx.GraphModule) -> str | None:
    """A graph in words that say all of it; ``None`` if it calls what has no source here."""
    written: list[str] = []
    waiting, known = [("", graph.graph)], set[str]()
    while waiting:
        name, each = waiting.pop()
        written.append(f"{name}\n{each.python_code('self').src}")
        for node in each.nodes:
            if node.op in ("call_module", "call_method", "get_attr"):
                return None
            if (region := region_of(node)) is not None:
                if region.name not in known:
                    known.add(region.name)
                    waiting.append((region.name, region.graph))
            elif node.op == "call_function" and not _is_known(node.target):
                return None
    return "\n".join(written)


def _is_known(target: Any) -> bool:
    if isinstance(target, torch._ops.OpOverload):
        return target.namespace in _NAMESPACES
    return target is operator.getitem or getattr(operator, target.__name__, None) is target or is_in_digest(target)


def _table(decompositions: Mapping[Any, Any]) -> str | None:
    """By what operations are taken apart; ``None`` if a function takes part that has no source here."""
    others = set(inlined().values())
    written = []
    for target, function in decompositions.items():
        if isinstance(target, torch._ops.OpOverload) and target.namespace not in _NAMESPACES:
            continue  # no graph that has a name calls it
        while isinstance(function, partial):
            function = function.func
        own = inspect.unwrap(function)
        where = home(own) if isinstance(own, FunctionType) else type(own).__module__
        if where.partition(".")[0] != "torch" and not is_in_digest(own) and own not in others:
            return None
        written.append(f"{target} {where} {getattr(own, '__qualname__', own)}")
    return "\n".join(sorted(written))


def _switches(layouts: Sequence[Any]) -> list[Any]:
    """What tracing goes by that Inductor does not name its entries by."""
    cuda = torch.backends.cuda
    kinds = sorted({layout.device.type for layout in layouts})
    return [
        torch.get_default_dtype(), torch.get_default_device(),
        torch.get_num_threads(),  # Inductor names entries by it where graphs compute on a CPU, and no graph does not
        cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled(), cuda.cudnn_sdp_enabled(),
        cuda.fp16_bf16_reduction_math_sdp_allowed(), torch._C._get_sdp_priority_order(),
        *((kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds),
    ]  # fmt: skip


def _surroundings() -> str:
    """Inductor's own name for no graph at all: of torch, Triton, the device, its settings, and the package's tag."""
    from torch._inductor.codecache import compiled_fx_graph_hash

    nothing = fx.Graph()
    nothing.output(())
    options: Any = {}
    name, _ = compiled_fx_graph_hash(fx.GraphModule({}, nothing), [], options, [])
    return name
