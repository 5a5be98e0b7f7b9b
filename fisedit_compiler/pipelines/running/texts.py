"""Texts that were encoded already: a run asks a text encoder only for those that no run before it had.

A base, its edits and their negative prompts mostly repeat texts. What an encoder made of some tokens is kept, for the
texts that were used last. It is given out only in runs of the Editor, and only while the encoder is what it was: the
same weights, read at the start of every run, the same structure, the same scale of its adapters.

A new text is encoded by a CUDA graph of the encoder where there can be one (``encoder_graphs.py``).
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fisedit_compiler.capture.ambient import Ambient
from fisedit_compiler.capture.keys import ModelState
from fisedit_compiler.compiling import computing
from fisedit_compiler.pipelines.running.encoder_graphs import EncoderGraphs, copied, spelled

ENCODERS = ("text_encoder", "text_encoder_2")
"""Attributes of pipelines that hold one."""
KEPT = 16
"""Texts, or batches of them, that are kept of an encoder."""
_COLLECTING = "transformers.utils."
"""Where the hooks are from that transformers leaves on an encoder whose hidden states somebody asked for."""

_run: ContextVar[object] = ContextVar("fisedit_texts", default=None)
"""The run that this context is in: calls made elsewhere are the encoder's own."""
_in_use: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_using = threading.Lock()


class Texts:
    """What the text encoders of one pipeline made of the texts that were used last."""

    def __init__(self) -> None:
        self._known: dict[str, EncodedTexts] = {}

    def clear(self) -> None:
        """Forget all texts, and let go of the memory that encoding them takes. No run is going on."""
        self._known.clear()

    @contextmanager
    def encoded_once(self, pipe: Any) -> Iterator[None]:
        """Inside the block, texts that an earlier block had are not encoded again.

        Afterwards the encoders are as they were. One that another run uses at the moment computes everything, and so
        does one whose calls may do more than they return (hooks, offloading, training, a class that is not known).
        """
        run = object()
        with ExitStack() as stack:
            for name in ENCODERS:
                encoder = getattr(pipe, name, None)
                if isinstance(encoder, nn.Module) and _only_computes(encoder) and stack.enter_context(_alone(encoder)):
                    known = self._known.get(name)
                    if known is None or known.encoder is not encoder:
                        known = self._known[name] = EncodedTexts(encoder)
                    stack.enter_context(known.given_out(run))
            token = _run.set(run)
            try:
                yield
            finally:
                _run.reset(token)


class EncodedTexts:
    """What one encoder made of the texts that were used last.

    Attributes:
        encoder: a text encoder of transformers.
        computed: calls that it computed.
    """

    def __init__(self, encoder: nn.Module) -> None:
        self.encoder, self.computed = encoder, 0
        self._state = ModelState(encoder)
        self._model: Hashable = None
        self._kept: OrderedDict[Hashable, Any] = OrderedDict()
        self._graphs = EncoderGraphs(type(encoder).__name__)
        self._tensors: Mapping[str, Tensor] | None = None
        self._scaled: list[nn.Module] = []

    @contextmanager
    def given_out(self, run: object) -> Iterator[None]:
        """Inside the block, calls of the encoder that ``run`` makes are answered from what is kept."""
        with computing():
            model = self._state.read()
        if model != self._model:
            self._model = model
            self._kept.clear()
        # Weights that moved and are equal leave the key as it is, but are read again, as another mapping.
        if self._tensors is not self._state.tensors:
            self._tensors = self._state.tensors
            self._scaled = [part for part in self.encoder.modules() if hasattr(part, "scaling")]
            self._graphs.drop()
        own = self.encoder.forward
        replaced = vars(self.encoder).get("forward")
        self.encoder.forward = partial(self._encode, run, own)  # type: ignore[method-assign]
        try:
            yield
        finally:
            del self.encoder.forward
            if replaced is not None:
                self.encoder.forward = replaced  # type: ignore[method-assign]

    def _encode(self, run: object, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if _run.get() is not run or torch.is_grad_enabled():
            return own(*args, **kwargs)
        asked = _contents((args, kwargs))
        if asked is None:
            return own(*args, **kwargs)
        state = _scales(self._scaled), Ambient.now(), arithmetic()
        key = asked, state
        found = self._kept.get(key)
        if found is None:
            self.computed += 1
            found = self._kept[key] = self._computed(own, args, kwargs, state)
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return copied(found)  # a pipeline may write to what it gets

    def _computed(self, own: Callable[..., Any], args: Any, kwargs: Any, state: Hashable) -> Any:
        # Graphs read weights where they were when the run began; somebody's torch.compile makes its own of the forward.
        if self._state.moved() or self.encoder._compiled_call_impl is not None:
            return copied(own(*args, **kwargs))
        return self._graphs.run(own, args, kwargs, state)


@contextmanager
def _alone(encoder: nn.Module) -> Iterator[bool]:
    """Whether no other run gives out what this encoder made; none does inside the block, then."""
    with _using:
        free = encoder not in _in_use
        if free:
            _in_use.add(encoder)
    try:
        yield free
    finally:
        if free:
            with _using:
                _in_use.discard(encoder)


def _only_computes(encoder: nn.Module) -> bool:
    """Whether a call of the encoder does nothing but to return what follows from its inputs."""
    known = type(encoder).__module__.startswith("transformers.models.")
    return known and not encoder.training and all(map(_only_returns, encoder.modules()))


def _only_returns(part: nn.Module) -> bool:
    """Whether weights are there and nothing is called beside the forward that does more than to collect outputs."""
    if part._forward_pre_hooks or "_hf_hook" in vars(part):
        return False
    if not all(map(_only_collects, part._forward_hooks.values())):
        return False
    return not any(value is not None and value.is_meta for value in part._parameters.values())


def _only_collects(hook: Any) -> bool:
    """Whether a hook is one of those by which transformers gathers hidden states, for what a call returns."""
    return (getattr(hook, "__module__", None) or "").startswith(_COLLECTING)


def _scales(scaled: list[nn.Module]) -> Hashable:
    """Scales of adapters, which a pipeline sets for one call."""
    found = [getattr(part, "scaling", None) for part in scaled]
    return tuple(str(scaling) for scaling in found if scaling is not None)


def arithmetic() -> Hashable:
    """Switches of the process by which the last bits of a product are others."""
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    flags: list[bool] = [
        cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled(), cuda.cudnn_sdp_enabled(),
        cuda.matmul.allow_fp16_reduced_precision_reduction, cuda.matmul.allow_bf16_reduced_precision_reduction,
    ]  # fmt: skip
    with suppress(RuntimeError):  # torch answers no such question where old and new settings are mixed
        flags += [cudnn.enabled, cudnn.allow_tf32, cuda.matmul.allow_tf32]
    return torch.get_num_threads(), tuple(flags)


def _contents(value: Any) -> Hashable:
    """A key for arguments: contents of tensors, and plain values; ``None`` for anything else.

    Reads token ids from the device. That is at the start of a run, when there is nothing to wait for.
    """
    return spelled(value, _bytes)


def _bytes(value: Tensor) -> Hashable:
    host = value.detach().cpu().contiguous()
    return str(value.device), value.dtype, tuple(value.shape), host.reshape(-1).view(torch.uint8).numpy().tobytes()
