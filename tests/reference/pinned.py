"""The pinned interpreter: what a sparse edit must compute, written without any of the compiler's code.

The original ``nn.Module`` runs twice under a ``TorchFunctionMode``. The base run writes on a tape what every
boundary saw; the edit run computes the whole dense map, but at each boundary overwrites the inactive sites by
what the tape says. Nothing here may import ``fisedit_compiler``: it is the judge of it.

Boundaries are ``conv2d``, ``group_norm``, nearest ``interpolate``, ``scaled_dot_product_attention`` and the
functions the caller names in ``pin_inputs_of`` (the ones a compiler runs densely between scatter and gather).
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tests.reference.active_sites import (
    ActiveSites,
    OracleError,
    Resolution,
    check_masks,
    mask_of,
    resolution_of,
    token_mask,
)
from tests.reference.boundaries import is_pointwise_conv, normalised_as
from tests.reference.held import HeldOutput, TapeEntry

Norm = Literal["recorded", "incremental"]
Attention = Literal["cached", "active"]

BOUNDARIES = frozenset({"conv2d", "group_norm", "interpolate", "scaled_dot_product_attention"})


class PinnedRun:
    """One base run of ``module``, from which any number of edits are replayed.

    Args:
        module: the original model; it is called, never changed.
        base_inputs: keyword arguments of ``module.forward`` for the base run.
        pin_inputs_of: names of further torch functions whose spatial inputs (``[B, C, H, W]`` maps and
            ``[B, H*W, C]`` tokens) are pinned, such as ``"avg_pool2d"`` or ``"pad"``.

    Attributes:
        base_output: the base result, ``[B, C, H, W]``.
        resolutions: every ``(H, W)`` a boundary of the base run or the output had; each needs a mask.
    """

    def __init__(
        self, module: nn.Module, base_inputs: Mapping[str, Any], *, pin_inputs_of: Collection[str] = ()
    ) -> None:
        self.module = module
        self.pin_inputs_of = frozenset(pin_inputs_of)
        mode = _RecordMode(self.pin_inputs_of)
        self.base_output = _call(module, base_inputs, mode)
        self.tape = mode.tape
        self.resolutions = mode.resolutions | {resolution_of(self.base_output)}

    def replay(
        self,
        edit_inputs: Mapping[str, Any],
        active: ActiveSites,
        *,
        norm: Norm = "recorded",
        attention: Attention = "cached",
        held: HeldOutput | None = None,
    ) -> Tensor:
        """Run the edit with inactive sites pinned to this base run.

        Args:
            edit_inputs: keyword arguments of ``module.forward``, shaped as the base inputs were.
            active: for every resolution, a bool ``[H, W]`` tensor of the sites to compute again.
            norm: normalise by the base run's statistics, or by those of the map after pinning.
            attention: inactive keys and values are the base ones, or are left out.
            held: what earlier calls of the edit computed below; kept by this call, or given back to it.

        Returns:
            ``[B, C, H, W]``: the edit at active sites, the base output, bit for bit, elsewhere.

        Raises:
            OracleError: a resolution without a mask, a mask of the wrong type, or an edit run which does not
                take the same path through the model as the base run.
        """
        _check_choices(norm, attention)
        check_masks(active)
        if not any(bool(mask.any()) for mask in active.values()):
            return self.base_output.clone()
        return self._replay(edit_inputs, active, norm, attention, held)[0]

    def continued(
        self,
        edit_inputs: Mapping[str, Any],
        active: ActiveSites,
        *,
        norm: Norm = "recorded",
        held: HeldOutput | None = None,
    ) -> PinnedRun:
        """The edit as a base run, from which other edits are replayed; same arguments and errors as ``replay``.

        Its tape has what every boundary saw after pinning. With recorded statistics the norms keep the first run's.
        Of a call that was given held values, boundaries of coarser maps saw what they saw in the call that kept them.
        Only ``attention="cached"``, and no functions in ``pin_inputs_of``.
        """
        _check_choices(norm, "cached")
        check_masks(active)
        if self.pin_inputs_of:
            raise OracleError("continued() knows convolutions, norms, upsampling and attention only")
        run = copy.copy(self)
        run.base_output, run.tape = self._replay(edit_inputs, active, norm, "cached", held)
        if held is not None:
            run.tape = held.tape_of(run.tape, max(rows * columns for rows, columns in active))
        return run

    def _replay(
        self,
        edit_inputs: Mapping[str, Any],
        active: ActiveSites,
        norm: Norm,
        attention: Attention,
        held: HeldOutput | None,
    ) -> tuple[Tensor, list[TapeEntry]]:
        mode = _ReplayMode(self.tape, self.pin_inputs_of, active, norm, attention)
        with nullcontext() if held is None else held.around_a_call():
            output = _call(self.module, edit_inputs, mode)
        mode.check_finished()
        return torch.where(mask_of(output, active), output, self.base_output), mode.pinned_tape


def run_pinned(
    module: nn.Module,
    base_inputs: Mapping[str, Any],
    edit_inputs: Mapping[str, Any],
    active: ActiveSites,
    *,
    norm: Norm = "recorded",
    attention: Attention = "cached",
    pin_inputs_of: Collection[str] = (),
) -> tuple[Tensor, Tensor]:
    """Return ``(base output, pinned edit output)``; see :class:`PinnedRun` for one base and many edits."""
    run = PinnedRun(module, base_inputs, pin_inputs_of=pin_inputs_of)
    return run.base_output, run.replay(edit_inputs, active, norm=norm, attention=attention)


class _RecordMode(TorchFunctionMode):
    """Copies onto a tape what every boundary reads; computes nothing differently."""

    def __init__(self, pin_inputs_of: frozenset[str]) -> None:
        super().__init__()
        self.watched = BOUNDARIES | pin_inputs_of
        self.tape: list[TapeEntry] = []
        self.resolutions: set[Resolution] = set()
        self._islands = _Identities(pin_inputs_of)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in self.watched:
            tensors = tuple(_tensors(args, kwargs))
            # In-place activations may overwrite what a boundary read: the tape keeps copies.
            self.tape.append(TapeEntry(name, tuple(tensor.detach().clone() for tensor in tensors)))
            if tensors[0].ndim == 4 and name != "scaled_dot_product_attention":
                known = self._islands.holds(tensors[0]) or is_pointwise_conv(name, args, kwargs)
                self.resolutions |= set() if known else {resolution_of(tensors[0])}
        return self._islands.note(name, func(*args, **kwargs))


class _ReplayMode(TorchFunctionMode):
    """Overrides every boundary by the rules of the pinned program."""

    def __init__(
        self,
        tape: list[TapeEntry],
        pin_inputs_of: frozenset[str],
        active: ActiveSites,
        norm: Norm,
        attention: Attention,
    ) -> None:
        super().__init__()
        self.tape = tape
        self.pinned_tape: list[TapeEntry] = []
        self.position = 0
        self.active = active
        self.norm = norm
        self.attention = attention
        self.pin_inputs_of = pin_inputs_of
        self.handlers: dict[str, Callable[..., Any]] = {
            "conv2d": self._conv2d,
            "group_norm": self._group_norm,
            "interpolate": self._interpolate,
            "scaled_dot_product_attention": self._attention,
        }
        self._upsampled = _Identities(frozenset({"interpolate"}))
        self._islands = _Identities(pin_inputs_of)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in self.pin_inputs_of:
            result = self._pinned_inputs(func, self._next(name, args, kwargs), args, kwargs)
        elif name in self.handlers:
            result = self.handlers[name](self._next(name, args, kwargs).tensors, *args, **kwargs)
        else:
            result = func(*args, **kwargs)
        return self._islands.note(name, result)

    def check_finished(self) -> None:
        if self.position != len(self.tape):
            raise OracleError(f"the edit run met {self.position} boundaries, the base run {len(self.tape)}")

    def _next(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TapeEntry:
        here = (name, [tuple(tensor.shape) for tensor in _tensors(args, kwargs)])
        if self.position == len(self.tape):
            raise OracleError(f"the edit run meets {here} after the base run's last boundary")
        entry = self.tape[self.position]
        there = (entry.function, [tuple(tensor.shape) for tensor in entry.tensors])
        if here != there:
            raise OracleError(f"boundary {self.position}: the edit run calls {here}, the base run {there}")
        self.position += 1
        if not self.pin_inputs_of:  # continued() takes no others
            self.pinned_tape.append(self._pinned_entry(entry, tuple(_tensors(args, kwargs))))
        return entry

    def _pinned_entry(self, entry: TapeEntry, now: tuple[Tensor, ...]) -> TapeEntry:
        """What the boundary sees after pinning: a base of further edits."""
        if entry.function == "group_norm" and self.norm == "recorded":
            return entry
        if entry.function == "scaled_dot_product_attention":
            same = now[0].shape[-2] == now[1].shape[-2]
            mask = token_mask(now[1].shape[-2], self.active) if same else None
            masks = [None if mask is None else mask[:, None]] * 3
        else:
            masks = [self._first_mask(entry.function, now[0])]
        pinned = [
            tensor.detach().clone() if mask is None else torch.where(mask, tensor, base)
            for mask, tensor, base in zip(masks, now, entry.tensors, strict=False)
        ]
        return TapeEntry(entry.function, (*pinned, *now[len(pinned) :]))

    def _first_mask(self, function: str, input: Tensor) -> Tensor | None:
        if self._in_island(input) or (input.ndim == 4 and resolution_of(input) not in self.active):
            return None
        return mask_of(input, self.active) if function != "group_norm" else self._group_norm_mask(input)

    def _conv2d(self, base: tuple[Tensor, ...], input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        unpinned = (
            is_pointwise_conv("conv2d", (input, weight, *args), kwargs)
            or self._upsampled.holds(input)  # its coarse map was pinned already
            or self._in_island(input)
        )
        pinned = input if unpinned else self._pin_map(input, base[0])
        return F.conv2d(pinned, weight, *args, **kwargs)

    def _group_norm(
        self,
        base: tuple[Tensor, ...],
        input: Tensor,
        num_groups: int,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Tensor:
        mask = None if self._in_island(input) else self._group_norm_mask(input)
        if mask is None:
            return F.group_norm(input, num_groups, weight, bias, eps)
        if self.norm == "incremental":
            return F.group_norm(torch.where(mask, input, base[0]), num_groups, weight, bias, eps)
        return normalised_as(base[0], input, num_groups, weight, bias, eps)

    def _interpolate(
        self,
        base: tuple[Tensor, ...],
        input: Tensor,
        size: Any = None,
        scale_factor: Any = None,
        mode: str = "nearest",
        **kwargs: Any,
    ) -> Tensor:
        if mode not in ("nearest", "nearest-exact"):
            raise OracleError(f"interpolate(mode={mode!r}) mixes sites: name 'interpolate' in pin_inputs_of")
        pinned = input if self._in_island(input) else self._pin_map(input, base[0])
        result = F.interpolate(pinned, size, scale_factor, mode, **kwargs)
        return self._upsampled.note("interpolate", result)

    def _attention(
        self,
        base: tuple[Tensor, ...],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        mask = token_mask(key.shape[-2], self.active) if query.shape[-2] == key.shape[-2] else None
        if mask is not None and self.attention == "cached":
            key = torch.where(mask[:, None], key, base[1])
            value = torch.where(mask[:, None], value, base[2])
        elif mask is not None and mask.any():  # with no active token no query of this level matters either
            key, value = key[..., mask, :], value[..., mask, :]
            if attn_mask is not None and attn_mask.shape[-1] != 1:
                attn_mask = attn_mask[..., mask]
        return F.scaled_dot_product_attention(query, key, value, attn_mask, *args, **kwargs)

    def _pinned_inputs(
        self, func: Callable[..., Any], entry: TapeEntry, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        base = iter(entry.tensors)
        pinned_args = [self._pin_any(arg, base) for arg in args]
        return func(*pinned_args, **{name: self._pin_any(arg, base) for name, arg in kwargs.items()})

    def _pin_any(self, argument: Any, base: Iterator[Tensor]) -> Any:
        if isinstance(argument, list | tuple):
            return type(argument)(self._pin_any(item, base) for item in argument)
        if not isinstance(argument, Tensor):
            return argument
        recorded = next(base)
        if argument.ndim == 4 and not self._in_island(argument) and resolution_of(argument) in self.active:
            return self._pin_map(argument, recorded)
        tokens = token_mask(argument.shape[1], self.active) if argument.ndim == 3 else None
        return argument if tokens is None else torch.where(tokens[:, None], argument, recorded)

    def _pin_map(self, input: Tensor, base: Tensor) -> Tensor:
        return torch.where(mask_of(input, self.active), input, base)

    def _in_island(self, input: Tensor) -> bool:
        """True for what a dense function returned at a resolution that is no level, such as a padded map."""
        return self._islands.holds(input) and resolution_of(input) not in self.active

    def _group_norm_mask(self, input: Tensor) -> Tensor | None:
        if input.ndim == 4:
            return mask_of(input, self.active)
        return token_mask(input.shape[-1], self.active) if input.ndim == 3 else None


class _Identities:
    """Remembers which tensor objects the functions of one set of names returned."""

    def __init__(self, names: frozenset[str]) -> None:
        self.names = names
        self._held: list[Tensor] = []

    def note(self, name: str, result: Any) -> Any:
        if name in self.names and isinstance(result, Tensor):
            self._held.append(result)
        return result

    def holds(self, tensor: Tensor) -> bool:
        return any(tensor is held for held in self._held)


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    if any(child.training and isinstance(child, nn.Dropout | nn.BatchNorm2d) for child in module.modules()):
        raise OracleError("the module is in training mode: call module.eval() first")
    with torch.no_grad():
        yield


def _call(module: nn.Module, inputs: Mapping[str, Any], mode: TorchFunctionMode) -> Tensor:
    arguments = dict(inputs)
    if "return_dict" in inspect.signature(module.forward).parameters:
        arguments["return_dict"] = False
    with _evaluating(module), mode:
        output = module(**arguments)
    return output[0] if isinstance(output, tuple | list) else output


def _tensors(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    for argument in (*args, *kwargs.values()):
        if isinstance(argument, list | tuple):
            yield from _tensors(tuple(argument), {})
        elif isinstance(argument, Tensor):
            yield argument


def _check_choices(norm: str, attention: str) -> None:
    if norm not in ("recorded", "incremental") or attention not in ("cached", "active"):
        raise OracleError(f"norm={norm!r}, attention={attention!r}: no such semantics")
