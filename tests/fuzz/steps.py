"""The steps that generated programs are made of: which may come next, and what each computes.

A step is a name with arguments, so that a program is data that can be drawn, printed and shortened. Folding and
unfolding steps change the axes of the running value, all others keep them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fuzz import layers
from tests.fuzz.axes import Axes, canonical, constant_size, home, is_constant, measure, parts_of
from tests.fuzz.state import (
    MAX_RANK,
    TEXT_CHANNELS,
    Call,
    Kind,
    State,
    Step,
    always,
    any_axis,
    constant_axis,
    last_constant,
    of_maps,
    width,
)

# -- axes ------------------------------------------------------------------------------------------------------------


def _regroupings(state: State) -> Iterator[tuple[Any, ...]]:
    axes = state.axes
    for index, axis in enumerate(axes):
        before, behind = axes[:index], axes[index + 1 :]
        if behind:
            yield ((*before, (*axis, *behind[0]), *behind[1:]),)
        if len(axes) < MAX_RANK:
            for cut in range(1, len(axis)):
                yield ((*before, axis[:cut], axis[cut:], *behind),)
            if len(axis) == 1 and (halves := axis[0].halves()):
                yield ((*before, (halves[0],), (halves[1],), *behind),)
                if before:  # the slow half joins what is in front of it, as channels cut into the batch do
                    yield ((*before[:-1], (*before[-1], halves[0]), (halves[1],), *behind),)


def _orders(state: State) -> Iterator[tuple[Any, ...]]:
    axes = list(range(state.rank))
    for first in axes:
        for second in axes[first + 1 :]:
            swapped = list(axes)
            swapped[first], swapped[second] = second, first
            yield (tuple(swapped),)
    if state.rank > 2:
        yield ((*axes[1:], 0),)
        yield ((axes[-1], *axes[:-1]),)


def _sizes(axes: Axes, call: Call) -> list[int]:
    return [measure(axis, call.sizes) for axis in axes]


def _view(x: Tensor, args: tuple[Any, ...], part: Any, call: Call) -> Tensor:
    return x.contiguous().view(_sizes(args[0], call))


def _home(x: Tensor, args: tuple[Any, ...], part: Any, call: Call) -> Tensor:
    apart, order, axes = home(args[0])
    return x.reshape(_sizes(apart, call)).permute(order).reshape(_sizes(axes, call))


def _away(state: State) -> Iterator[tuple[Any, ...]]:
    if state.map is None:
        yield (state.axes,)


def _back_home(state: State, args: tuple[Any, ...]) -> State:
    return State(home(state.axes)[2], state.kept)


# -- along one axis --------------------------------------------------------------------------------------------------


def _reduce(x: Tensor, args: tuple[Any, ...], part: Any, call: Call) -> Tensor:
    how, axis, keep = args
    reduced = getattr(x, how)(axis, keepdim=keep)
    return x + torch.tanh(reduced if keep or axis == 0 else reduced.unsqueeze(axis))


def _reductions(state: State) -> Iterator[tuple[Any, ...]]:
    for how in ("mean", "sum", "amax"):
        for axis in range(state.rank):
            yield how, axis, False
            yield how, axis, True
    if state.rank > 2:
        yield "mean", (0, state.rank - 1), True
        yield "mean", (state.rank - 2, state.rank - 1), True
        yield "mean", (1, state.rank - 1), True


def _select(x: Tensor, args: tuple[Any, ...], part: Any, call: Call) -> Tensor:
    (axis,) = args
    chosen = x.select(axis, 0)
    return x + torch.tanh(chosen if axis == 0 else chosen.unsqueeze(axis))


def _rotate(x: Tensor, args: tuple[Any, ...], part: Any, call: Call) -> Tensor:
    (axis,) = args
    return torch.cat([x.narrow(axis, 1, x.shape[axis] - 1), x.narrow(axis, 0, 1)], axis)


def _swap_halves(x: Tensor, args: tuple[Any, ...], part: Any, call: Call) -> Tensor:
    (axis,) = args
    first, second = x.chunk(2, axis)
    return torch.cat([second, torch.tanh(first)], axis)


def _stack(x: Tensor, args: tuple[Any, ...], part: Any, call: Call) -> Tensor:
    axis, how = args
    stacked = torch.stack([x, torch.tanh(x)], axis)
    if how == "select":
        return stacked.select(axis, 1)
    return stacked.mean(axis) if how == "mean" else stacked.unbind(axis)[0] * stacked.unbind(axis)[1]


def _stacks(state: State) -> Iterator[tuple[Any, ...]]:
    return ((axis, how) for axis in range(state.rank + 1) for how in ("select", "mean", "unbind"))


def _even_axis(state: State) -> Iterator[tuple[Any, ...]]:
    return ((axis,) for axis, sizes in enumerate(state.axes) if is_constant(sizes) and constant_size(sizes) % 2 == 0)


def _half_of(x: Tensor, args: tuple[Any, ...], part: Any, call: Call) -> Tensor:
    """Cuts at half, or a third, of a size that may be odd."""
    axis, share = args
    cut = x.shape[axis] // share
    return torch.cat([x.narrow(axis, cut, x.shape[axis] - cut), x.narrow(axis, 0, cut)], axis)


def _third_of_tokens(x: Tensor, args: tuple[Any, ...], part: Any, call: Call) -> Tensor:
    tokens = x.flatten(2)
    return x + tokens[..., : tokens.shape[2] // 3].mean(2)[:, :, None, None]


KINDS: dict[str, Kind] = {
    "pointwise": Kind(always(*layers.POINTWISE), lambda x, args, part, call: layers.POINTWISE[args[0]](x)),
    "reshape": Kind(
        _regroupings, lambda x, a, p, call: x.reshape(_sizes(a[0], call)), after=lambda s, a: State(a[0], s.kept)
    ),
    "view": Kind(_regroupings, _view, after=lambda s, a: State(a[0], s.kept)),
    "permute": Kind(
        _orders, lambda x, a, p, call: x.permute(a[0]), after=lambda s, a: State(tuple(s.axes[i] for i in a[0]), s.kept)
    ),
    "home": Kind(_away, _home, after=_back_home),
    "reduce": Kind(_reductions, _reduce),
    "select": Kind(any_axis, _select),
    "softmax": Kind(any_axis, lambda x, args, part, call: x + torch.softmax(x, args[0])),
    "cumsum": Kind(any_axis, lambda x, args, part, call: torch.tanh(x.cumsum(args[0]))),
    "flip": Kind(any_axis, lambda x, args, part, call: x.flip(args[0])),
    "roll": Kind(any_axis, lambda x, args, part, call: x.roll(1, args[0])),
    "rotate": Kind(constant_axis, _rotate),
    "swap_halves": Kind(_even_axis, _swap_halves),
    "glu": Kind(_even_axis, lambda x, args, part, call: F.glu(torch.cat([x, x], args[0]), args[0])),
    "half": Kind(lambda s: ((axis, share) for axis in range(s.rank) for share in (2, 3)), _half_of),
    "third_of_tokens": Kind(of_maps(()), _third_of_tokens),
    "stack": Kind(_stacks, _stack),
    "linear": Kind(last_constant, layers.layer, layers.square),
    "layer_norm": Kind(last_constant, layers.layer, lambda state, args: nn.LayerNorm(width(state))),
    "conv": Kind(layers.convs, layers.residual, layers.conv),
    "conv1d": Kind(
        layers.conv1ds, layers.residual, lambda s, a: nn.Conv1d(width(s, 1), width(s, 1), a[0], padding=a[0] // 2)
    ),
    "norm": Kind(layers.norms, layers.layer, layers.norm),
    "attention": Kind(layers.attentions, layers.attention, layers.square),
    "heads": Kind(of_maps(("map", False), ("map", True)), layers.heads, layers.build_heads),
    "text": Kind(of_maps(("text", False), ("text", True)), layers.heads, layers.build_heads, reads_text=True),
    "condition": Kind(
        of_maps(()), layers.condition, lambda state, args: nn.Linear(TEXT_CHANNELS, width(state, 1)), reads_text=True
    ),
    "pad": Kind(
        of_maps(*((mode, crop) for mode in ("constant", "reflect", "replicate", "circular") for crop in (False, True))),
        layers.pad,
        lambda state, args: None if args[1] else nn.Conv2d(width(state, 1), width(state, 1), 3),
    ),
    "pool": Kind(of_maps(("avg_pool2d",), ("max_pool2d",), ("global",)), layers.pool),
    "down": Kind(layers.downs, layers.down, layers.build_down, after=layers.scaled(2)),
    "up": Kind(layers.ups, layers.up, layers.build_up, after=layers.scaled(0.5)),
    "keep": Kind(of_maps(()), layers.keep, after=lambda s, a: State(s.axes, (*s.kept, s.map)) if s.map else s),
    "join": Kind(layers.joins, layers.join, layers.build_join),
}


def following(state: State, step: Step) -> State | None:
    """The state after a step, ``None`` if it cannot come here."""
    kind = KINDS[step.name]
    return kind.after(state, step.args) if step.args in list(kind.candidates(state)) else None


def possible(state: State) -> dict[str, list[Step]]:
    """Every step that may come next, by name."""
    found = {name: [Step(name, args) for args in kind.candidates(state)] for name, kind in KINDS.items()}
    return {name: steps for name, steps in found.items() if steps}


def start(channels: int) -> State:
    return State(canonical(channels, 1))


__all__ = ["KINDS", "Call", "State", "Step", "following", "parts_of", "possible", "start"]
