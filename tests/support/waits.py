"""Finds on a CPU where the host would wait for a device.

What a GPU would hold is marked and followed: memory that something was computed into from marked memory is marked too.
Where a marked value is read on the host (a number, a truth value, the places of true elements, a copy on the host),
that is a wait. Copies from the host to the device are not seen: on a CPU they are none.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fisedit_compiler.capture import ambient
from fisedit_compiler.capture.keys import weights
from fisedit_compiler.pipelines.running import host_timesteps
from fisedit_compiler.runtime.sessions import agreement
from fisedit_compiler.tensors import contents, deferred

_aten = torch.ops.aten
_READS = {
    _aten._local_scalar_dense.default, _aten.nonzero.default, _aten.equal.default, _aten.is_nonzero.default,
    _aten.masked_select.default, _aten._unique2.default, _aten.unique_dim.default, _aten.bincount.default,
    _aten.repeat_interleave.Tensor,
}  # fmt: skip
"""Operations whose result, or its size, the host has to know."""
_TO_HOST = {Tensor.cpu, Tensor.numpy, Tensor.tolist, Tensor.__array__}
_HERE = Path(__file__)


@dataclass(frozen=True)
class Wait:
    """The host read something of the device.

    Attributes:
        operation: how.
        place: innermost line of this package, diffusers or a test.
        function: the function that it is in.
        step: steps of the run that were over.
    """

    operation: str
    place: str
    function: str
    step: int


@dataclass
class Waits:
    """What was found so far.

    Attributes:
        found: waits, in order.
        step: set by whoever counts steps.
        paused: whether nothing is noted; marks go on.
    """

    found: list[Wait] = field(default_factory=list)
    step: int = 0
    paused: bool = False
    _marked: dict[int, Any] = field(default_factory=dict)

    def mark(self, value: Any) -> Any:
        """Take the tensors inside for the device's; returns the value."""
        for tensor in tree_leaves(value):
            if isinstance(tensor, Tensor) and tensor.layout is torch.strided:
                storage = tensor.untyped_storage()
                if storage._cdata not in self._marked:
                    # A weak reference keeps the address from being used again.
                    self._marked[storage._cdata] = torch.multiprocessing.reductions.StorageWeakRef(storage)
        return value

    def unmark(self, tensor: Tensor) -> None:
        self._marked.pop(tensor.untyped_storage()._cdata, None)

    def is_marked(self, value: Any) -> bool:
        if not isinstance(value, Tensor) or value.layout is not torch.strided:
            return False
        return value.untyped_storage()._cdata in self._marked

    def note(self, operation: str) -> None:
        """The host reads something now."""
        if self.paused:
            return
        frames = [frame for frame in traceback.extract_stack() if Path(frame.filename) != _HERE]
        known = [frame for frame in frames if any(name in frame.filename for name in ("fisedit", "diffusers", "tests"))]
        frame = (known or frames)[-1]
        self.found.append(Wait(operation, f"{frame.filename}:{frame.lineno}", frame.name, self.step))

    @contextmanager
    def pause(self) -> Iterator[None]:
        before, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = before


class _Operations(TorchDispatchMode):
    """Follows marks through operations, and notes those that read."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waits, given = self._waits, tree_leaves((args, kwargs or {}))
        is_from_device = any(map(waits.is_marked, given))
        if is_from_device and (function in _READS or _has_mask(function, args)):
            waits.note(str(function))
        result = function(*args, **(kwargs or {}))
        if is_from_device:
            waits.mark(result)
        return result


class _Methods(TorchFunctionMode):
    """Notes methods that copy to the host, which are nothing on a CPU."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waits, kwargs = self._waits, kwargs or {}
        to_host = function in _TO_HOST or (
            # A device that was read off a tensor is the same here, and would be another there.
            function is Tensor.to and any(type(place) is str for place in (*args[1:2], kwargs.get("device")))
        )
        if not to_host or not waits.is_marked(args[0]):
            return function(*args, **kwargs)
        waits.note(f"Tensor.{function.__name__}")
        with waits.pause():
            result = function(*args, **kwargs)
            if isinstance(result, Tensor):
                result = result.clone() if result is args[0] else result
                waits.unmark(result)
        return result


def _has_mask(function: Any, args: Any) -> bool:
    """Whether a tensor is indexed by truth values, whose number the host has to know."""
    if function not in (_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default):
        return False
    return any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1])


@contextmanager
def watched(*owned: Any) -> Iterator[Waits]:
    """Notes waits for what is ``owned`` by the device, and for all that is computed from it."""
    waits = Waits()
    waits.mark(owned)
    with _Operations(waits), _Methods(waits):
        yield waits


@contextmanager
def device_of(pipe: Any, monkeypatch: pytest.MonkeyPatch, *owned: Any) -> Iterator[Waits]:
    """Runs of a pipeline inside the block behave as on a CUDA device, as far as the host decides, and are watched.

    The device has the models' weights, the timesteps and the latents that a run starts from. What a device need not be
    waited for is judged as there: when the run ends.
    """
    models = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    with watched(owned, list(map(_own, models))) as waits, ExitStack() as stack:
        patches = stack.enter_context(monkeypatch.context())
        kind = type(pipe.scheduler)
        patches.setattr(kind, "set_timesteps", _marking_timesteps(kind.set_timesteps, waits))
        patches.setattr(type(pipe), "prepare_latents", _marking(type(pipe).prepare_latents, waits))
        patches.setattr(ambient, "refuse_foreign_modes", lambda: None)  # the two that watch are meant to be there
        patches.setattr(host_timesteps, "is_away", waits.is_marked)
        patches.setattr(agreement, "_is_checked_at_once", lambda call, number: number < agreement.CHECKED_AT_ONCE)
        patches.setattr(deferred.DeferredChecks, "add", _keep)
        patches.setattr(deferred.DeferredChecks, "poll", lambda checks: None)
        # Behind the launch on a CUDA device; here there is no other way to tell contents.
        patches.setattr(contents, "is_equal", _unwatched(contents.is_equal, waits))
        # One checksum of all weights is read there, not a number of each.
        patches.setattr(weights.Weights, "key", _unwatched(weights.Weights.key, waits, "Weights.key"))
        yield waits


def _own(module: torch.nn.Module) -> Iterable[Tensor]:
    return (*module.parameters(), *module.buffers())


def _keep(checks: deferred.DeferredChecks, wrong: Tensor, error: Callable[[], Exception]) -> None:
    checks._pending.append(deferred._Pending(wrong, None, [error]))


def _marking(function: Callable[..., Any], waits: Waits) -> Callable[..., Any]:
    def marking(*args: Any, **kwargs: Any) -> Any:
        return waits.mark(function(*args, **kwargs))

    return marking


def _marking_timesteps(set_timesteps: Callable[..., Any], waits: Waits) -> Callable[..., Any]:
    def marking(scheduler: Any, num_inference_steps: Any = None, device: Any = None, **kwargs: Any) -> Any:
        set_timesteps(scheduler, num_inference_steps, device=device, **kwargs)
        waits.mark(scheduler.timesteps)

    return marking


def _unwatched(function: Callable[..., Any], waits: Waits, operation: str = "") -> Callable[..., Any]:
    """The function without its own reads; it counts as one if it has a name."""

    def unwatched(*args: Any) -> Any:
        if operation and any(map(waits.is_marked, tree_leaves(args[1:]))):
            waits.found.append(Wait(operation, operation, function.__name__, waits.step))
        with waits.pause():
            return function(*args)

    return unwatched
