"""Text encoders on a GPU: the encoder's own forward as a CUDA graph, one for each form of its arguments.

A text encoder is some hundred small kernels in a row, so that the host, which launches them, takes longer than the
device. A graph replays the very kernels that the encoder launches by itself: the results are the same bits, and nothing
is compiled. The first call of a form runs as ever, the second is captured, which takes as long as some calls. A base
run has two texts of one form, prompt and negative prompt, so it ends with a graph; a form that never comes again costs
nothing, and what libraries do at their first call is over before a capture begins.

A graph does again what the device did, never what the host decided. So an encoder whose forward reads a tensor on the
host gets none (transformers looks whether an attention mask is all ones, and not while it is captured), and the first
replay is compared with the encoder itself, bit for bit. A form whose bits are others gets none.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fisedit_compiler.capture.ambient import Ambient
from fisedit_compiler.compiling import one_at_a_time
from fisedit_compiler.runtime.execution.graph_capture import capturing
from fisedit_compiler.runtime.execution.in_order import InOrder
from fisedit_compiler.tensors.contents import is_equal

logger = logging.getLogger(__name__)

KEPT = 4
"""Forms of arguments that are known of an encoder; their graphs share one pool of memory."""
PATIENCE = 16
"""Calls that a form is encoded without a graph at most, where graphs were made in vain."""

_NOTICE = "%s runs without CUDA graphs from now on, which takes some milliseconds a text and gives the same results: %s"
DIFFERENT = 3
"""Forms whose replays gave other bits, from which on no other is captured."""
_HERE = "%s encodes texts of one form without a CUDA graph, which takes some milliseconds more: %s"
_NEVER = -(10**9)
"""Calls of a form that gets no graph, so to speak."""
_PLAIN = (bool, int, float, str, type(None), torch.dtype)

_in_order = InOrder()
"""For all encoders: graphs that were captured on one stream share the workspaces of libraries."""


class OtherBits(ValueError):
    """A replay gave other bits: a library chose another kernel while it was captured, for these sizes."""


class EncoderGraphs:
    """The CUDA graphs of one text encoder, which read its weights where they are.

    Its owner drops them when weights moved or the encoder's structure changed, and lets one run at a time in.

    Attributes:
        refused: why the encoder runs without graphs; ``None`` while nothing failed.
    """

    def __init__(self, name: str) -> None:
        """``name`` is what the log calls the encoder."""
        self.name = name
        self.refused: str | None = None
        self._known: OrderedDict[Hashable, _EncoderGraph | int] = OrderedDict()
        self._before, self._differed = 1, 0

    def run(self, forward: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], state: Hashable) -> Any:
        """What ``forward`` returns, in tensors of the caller's own. Made without gradients.

        Args:
            forward: the encoder's.
            args: of the call.
            kwargs: likewise.
            state: everything besides arguments and weights that decides what is computed.
        """
        key = self._key((args, kwargs), state)
        if key is None:
            return copied(forward(*args, **kwargs))
        known = self._known.get(key, 0)
        if isinstance(known, int) and known >= self._before:
            known = self._capture(forward, args, kwargs)
        if isinstance(known, int):
            result = copied(forward(*args, **kwargs))
            known += 1
        else:
            result = known.run((args, kwargs))
        self._keep(key, known)
        return result

    def drop(self) -> None:
        """Let go of the graphs and their memory; whoever exchanges weights time and again waits for few of them."""
        if self._graphs():
            self._before = min(2 * self._before, PATIENCE)
        self._known.clear()

    def _key(self, arguments: Any, state: Hashable) -> Hashable:
        leaves = pytree.tree_leaves(arguments)
        if self.refused is not None or not all(isinstance(leaf, (Tensor, *_PLAIN)) for leaf in leaves):
            return None
        if not self._capturable([leaf for leaf in leaves if isinstance(leaf, Tensor)]):
            return None
        form = spelled(arguments, _form)
        return None if form is None else (form, state)

    def _capturable(self, tensors: Sequence[Tensor]) -> bool:
        return len({tensor.device for tensor in tensors}) == 1 and tensors[0].is_cuda

    def _keep(self, key: Hashable, known: _EncoderGraph | int) -> None:
        if self.refused is None:
            self._known[key] = known
            self._known.move_to_end(key)
            while len(self._known) > KEPT:
                self._known.popitem(last=False)

    def _graphs(self) -> list[_EncoderGraph]:
        return [known for known in self._known.values() if not isinstance(known, int)]

    @one_at_a_time
    def _capture(
        self, forward: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> _EncoderGraph | int:
        """The graph of a form, or 0 if there can be none."""
        memory = next((other.graph.pool() for other in self._graphs()), None)
        try:
            return _EncoderGraph(forward, args, kwargs, memory)
        except Exception as error:
            why = f"{type(error).__name__}: {error}".splitlines()[0]
            self._differed += isinstance(error, OtherBits)
            only_here = isinstance(error, OtherBits) and self._differed < DIFFERENT
        # Outside of the handler: the error's frames hold what the attempt had allocated.
        if only_here:
            logger.info(_HERE, self.name, why)
            return _NEVER
        self.refused = why
        self._known.clear()
        logger.info(_NOTICE, self.name, why)
        return 0


class _EncoderGraph:
    """A captured call: its inputs are copied to where they were then, its results copied from there."""

    def __init__(
        self, forward: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], memory: Any
    ) -> None:
        """``memory`` is a pool of another graph to share.

        Raises:
            Exception: of any kind, if the call cannot be captured or its replay is not what the encoder computes.
        """
        leaves, structure = pytree.tree_flatten((args, kwargs))
        self.device = next(leaf.device for leaf in leaves if isinstance(leaf, Tensor))
        self.graph = torch.cuda.CUDAGraph()
        # Buffers are written to outside inference mode, too. Autocast keeps no casts: their memory is nobody's later.
        ambient = Ambient.now()
        with _current(self.device), _in_order.on(self.device), ambient.neutral(), ambient.capturing():
            self.inputs = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]

            def body() -> Any:
                given, named = pytree.tree_unflatten(self.inputs, structure)
                return forward(*given, **named)

            stream = _stream(self.device)
            stream.wait_stream(torch.cuda.current_stream())
            # On the capture's stream, so that libraries allocate its workspaces outside of the graphs' memory.
            with torch.cuda.stream(stream):
                expected = body()
                with _NothingRead():
                    body()
            torch.cuda.current_stream().wait_stream(stream)
            with capturing(self.graph, memory, stream):
                self.outputs = body()
            self.graph.replay()
            _compare(expected, self.outputs)

    def run(self, arguments: Any) -> Any:
        """The results for arguments of the same form."""
        with _current(self.device), _in_order.on(self.device):
            for buffer, value in zip(self.inputs, pytree.tree_leaves(arguments), strict=True):
                if isinstance(value, Tensor):
                    buffer.copy_(value)
            self.graph.replay()
            return copied(self.outputs)


class _NothingRead(TorchDispatchMode):
    """Refuses what the host reads of the device, or brings to it: a graph would keep to what it was then."""

    _READS = frozenset({torch.ops.aten.equal.default})
    _COPIES = frozenset({torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self._READS or torch.Tag.data_dependent_output in func.tags or _has_unknown_size(func, args):
            raise ValueError(f"its forward reads a tensor on the host ({func})")
        result = func(*args, **(kwargs or {}))
        if func in self._COPIES:
            tensors = (leaf for leaf in pytree.tree_leaves((args, result)) if isinstance(leaf, Tensor))
            if len({tensor.device.type for tensor in tensors}) > 1:
                raise ValueError(f"its forward copies between host and device ({func})")
        return result


def _has_unknown_size(func: Any, args: Any) -> bool:
    """Whether the host has to know the contents of a tensor to know the size of the result."""
    if func is torch.ops.aten.index.Tensor:  # by truth values; otherwise the indices' shape tells
        return any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return torch.Tag.dynamic_output_shape in func.tags


def _compare(expected: Any, found: Any) -> None:
    """Refuse a graph that computes something else.

    Raises:
        OtherBits: a result is not the encoder's own bit for bit.
        ValueError: a result is no tensor, number or text.
    """
    (right, structure), (given, other) = pytree.tree_flatten(expected), pytree.tree_flatten(found)
    if structure != other:
        raise ValueError("its forward returns something else while it is captured")
    for number, (leaf, value) in enumerate(zip(right, given, strict=True)):
        if isinstance(leaf, Tensor) and isinstance(value, Tensor):
            if not is_equal(leaf, value):
                raise OtherBits(f"result {number} of the first replay is another one than the encoder's own")
        elif not isinstance(leaf, _PLAIN) or leaf != value:
            raise ValueError(f"result {number} is a {type(value).__name__}, which no replay makes anew")


def spelled(value: Any, of: Callable[[Tensor], Hashable]) -> Hashable | None:
    """A key for arguments: what ``of`` says of tensors, and plain values; ``None`` for anything else."""
    if isinstance(value, Tensor):
        return of(value)
    if isinstance(value, _PLAIN):
        return type(value).__name__, value
    if not isinstance(value, (dict, list, tuple)):
        return None
    inside = [part for item in value.items() for part in item] if isinstance(value, dict) else value
    parts = tuple(spelled(part, of) for part in inside)
    return None if None in parts else (type(value).__name__, *parts)


def copied(value: Any) -> Any:
    """The same with every tensor cloned."""
    return pytree.tree_map_only(Tensor, torch.clone, value)


def _form(value: Tensor) -> Hashable:
    return str(value.device), value.dtype, tuple(value.shape), value.stride()


def _current(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """What encoders are captured on; nothing else is, so that they share no workspace with graphs of other rooms."""
    with _current(device):
        return torch.cuda.Stream(priority=-1)  # torch gives the others to any thread, also while this one captures
