"""Code that an earlier process made of the same lowered graph: found without tracing the graph.

Inductor looks code up by the graph that it is handed, which has to be traced for that. Tracing a step takes longer than
all that follows once its code is on disk. So a small file beside Inductor's own says which of its entries a lowered
graph led to. A name stands for all that decides on what is traced: the graph as text, the forms of its arguments, the
package's own sources, switches of torch, and whatever Inductor names its entries by besides a graph. Where anything
takes part whose source is not known here, or a file leads nowhere, the graph is traced.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
import operator
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import fx

from fisedit_compiler.lowering.regions import region_of

logger = logging.getLogger(__name__)

_FOLDER = "fisedit"
"""In Inductor's cache, so that both are emptied together."""
_NAMESPACES = frozenset(("aten", "fisedit", "prims"))
"""Of ops whose sources are torch's or this package's."""
_PACKAGE = __name__.partition(".")[0]


class KnownGraph:
    """A lowered graph with arguments of one form, and the code that there may be of it.

    Attributes:
        name: of the graph; ``None`` if it cannot be named.
    """

    def __init__(self, graph: fx.GraphModule, layouts: Sequence[Any]) -> None:
        """``layouts`` describe the arguments, each by its ``repr``."""
        self.name: str | None = None
        try:
            if (text := _text(graph)) is not None:
                parts = [text, *map(repr, layouts), repr(_switches(layouts)), _surroundings()]
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
            return _load(self._file().read_text(), inputs)
        except FileNotFoundError:
            return None
        except Exception:
            logger.debug("code that is on disk cannot be loaded", exc_info=True)
            return None

    def keep(self, compiled: Any) -> None:
        """Note which code was made."""
        entry = getattr(compiled, "_fx_graph_cache_key", None)
        if self.name is None or not isinstance(entry, str):
            return
        with suppress(OSError):
            from torch._inductor.codecache import write_atomic

            file = self._file()
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(str(file), entry)

    def _file(self) -> Path:
        from torch._inductor.runtime.cache_dir_utils import cache_dir

        assert self.name is not None
        return Path(cache_dir()) / _FOLDER / self.name


def _load(entry: str, inputs: Sequence[Any]) -> Callable[[list[Any]], Any] | None:
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
    return target is operator.getitem or getattr(operator, target.__name__, None) is target or _is_own(target)


def _is_own(function: Any) -> bool:
    """Whether a function is the package's, so that its sources tell what it does."""
    return (inspect.getmodule(inspect.unwrap(function)) or torch).__name__.partition(".")[0] == _PACKAGE


def _switches(layouts: Sequence[Any]) -> list[Any]:
    """What tracing goes by that Inductor does not name its entries by."""
    cuda = torch.backends.cuda
    kinds = sorted({layout.device.type for layout in layouts})
    return [
        torch.get_default_dtype(),
        cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled(), cuda.cudnn_sdp_enabled(),
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
