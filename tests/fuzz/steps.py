"""The steps that generated programs are made of: which may come next, and what each computes.

A step is a name with arguments, so that a program is data that can be drawn, printed and shortened. Folding and
unfolding steps change the axes of the running value, all others keep them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fuzz.axes import COARSEST, Axes, canonical, constant_size, home, is_constant, measure, parts_of, text

TEXT_TOKENS, TEXT_CHANNELS = 5, 6
MAX_RANK = 6


class Step(NamedTuple):
    """One line of a program."""

    name: str
    args: tuple[Any, ...] = ()

    def __str__(self) -> str:
        shown = [text(item) if self.name in ("reshape", "view") else repr(item) for item in self.args]
        return f"{self.name}({', '.join(shown)})"


@dataclass(frozen=True)
class State:
    """The running value's axes, and the ``(channels, divisor)`` of every map that was kept."""

    axes: Axes
    kept: tuple[tuple[int, int], ...] = ()

    @property
    def rank(self) -> int:
        return len(self.axes)

    @property
    def map(self) -> tuple[int, int] | None:
        """``(channels, divisor)`` if the value is ``[batch, channels, height, width]``."""
        if self.rank != 4 or [[part.role for part in axis] for axis in self.axes] != [["b"], ["c"], ["h"], ["w"]]:
            return None
        return constant_size(self.axes[1]), self.axes[2][0].divisor


@dataclass
class Call:
    """What a running program has at hand."""

    sizes: dict[str, int]
    text: Tensor | None
    kept: list[Tensor] = field(default_factory=list)


Candidates = Callable[[State], Iterator[tuple[Any, ...]]]
Run = Callable[[Tensor, tuple[Any, ...], Any, Call], Tensor]
Build = Callable[[State, tuple[Any, ...]], nn.Module | None]


@dataclass(frozen=True)
class Kind:
    """How steps of one name are proposed, built and run, and what they make of the state."""

    candidates: Candidates
    run: Run
    build: Build = lambda state, args: None
    after: Callable[[State, tuple[Any, ...]], State] = lambda state, args: state
    reads_text: bool = False


def _always(*options: Any) -> Candidates:
    return lambda state: ((option,) for option in options)


def _any_axis(state: State) -> Iterator[tuple[Any, ...]]:
    return ((axis,) for axis in range(state.rank))


def _constant_axis(state: State) -> Iterator[tuple[Any, ...]]:
    return ((index,) for index, axis in enumerate(state.axes) if is_constant(axis) and constant_size(axis) > 1)


def _last_constant(state: State) -> Iterator[tuple[Any, ...]]:
    if state.axes and is_constant(state.axes[-1]) and constant_size(state.axes[-1]) > 1:
        yield ()


def _map(*options: tuple[Any, ...]) -> Candidates:
    return lambda state: iter(options if state.map else ())


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


# -- layers ----------------------------------------------------------------------------------------------------------


def _layer(x: Tensor, args: tuple[Any, ...], part: Any, call: Call) -> Tensor:
    return part(x)  # type: ignore[no-any-return]


def _residual(x: Tensor, args: tuple[Any, ...], part: Any, call: Call) -> Tensor:
    return x + part(x)  # type: ignore[no-any-return]


def _conv(state: State, args: tuple[Any, ...]) -> nn.Module:
    channels = constant_size(state.axes[1])
    kernel, dilation, groups, bias = args
    padding = tuple(dilation * (size - 1) // 2 for size in kernel)
    groups = channels if groups == "depthwise" else groups
    return nn.Conv2d(channels, channels, kernel, padding=padding, dilation=dilation, groups=groups, bias=bias)


def _convs(state: State) -> Iterator[tuple[Any, ...]]:
    if state.rank != 4 or not is_constant(state.axes[1]) or constant_size(state.axes[1]) % 2:
        return
    for kernel, dilation in (((3, 3), 1), ((3, 3), 2), ((1, 1), 1), ((1, 3), 1), ((5, 1), 1)):
        for groups in (1, 2, "depthwise"):
            yield kernel, dilation, groups, groups == 1


def _conv1ds(state: State) -> Iterator[tuple[Any, ...]]:
    if state.rank == 3 and is_constant(state.axes[1]):
        yield (1,)
        yield (3,)


def _norms(state: State) -> Iterator[tuple[Any, ...]]:
    if state.rank < 3 or not is_constant(state.axes[1]):
        return
    channels = constant_size(state.axes[1])
    for groups in {1, 2, channels}:
        if channels % groups == 0:
            yield ("group", groups)
    if state.rank in (3, 4):
        yield ("batch", state.rank)


def _norm(state: State, args: tuple[Any, ...]) -> nn.Module:
    channels = constant_size(state.axes[1])
    if args[0] == "group":
        return nn.GroupNorm(args[1], channels)
    return nn.BatchNorm2d(channels) if args[1] == 4 else nn.BatchNorm1d(channels)


def _width(state: State, axis: int = -1) -> int:
    return constant_size(state.axes[axis])


def _attentions(state: State) -> Iterator[tuple[Any, ...]]:
    if state.rank in (3, 4) and is_constant(state.axes[-1]):
        for how in ("fused", "products", "bmm"):
            if how != "bmm" or state.rank == 3:
                yield (how,)


def _attention(x: Tensor, args: tuple[Any, ...], part: Any, call: Call) -> Tensor:
    query, key, value = part(x), torch.tanh(x), x
    if args[0] == "fused":
        return x + F.scaled_dot_product_attention(query, key, value)
    product = torch.bmm if args[0] == "bmm" else torch.matmul
    return x + product(torch.softmax(product(query, key.transpose(-1, -2)) * 0.5, -1), value)


def _heads(x: Tensor, args: tuple[Any, ...], part: Any, call: Call) -> Tensor:
    """Self- or cross-attention of a map's tokens, its heads beside the batch or folded into it."""
    source, folded = args
    batch, channels, height, width = x.shape
    heads, size = 2, channels // 2
    query = part["query"](x.flatten(2).transpose(1, 2))
    memory = call.text if source == "text" else query
    key, value = part["key"](memory), part["value"](memory)
    if folded:

        def fold(y: Tensor) -> Tensor:
            return (
                y.reshape(batch, y.shape[1], heads, size).permute(0, 2, 1, 3).reshape(batch * heads, y.shape[1], size)
            )

        scores = torch.softmax(torch.bmm(fold(query), fold(key).transpose(1, 2)) * size**-0.5, -1)
        result = torch.bmm(scores, fold(value)).view(batch, heads, -1, size).transpose(1, 2)
    else:
        query, key, value = (y.view(batch, -1, heads, size).transpose(1, 2) for y in (query, key, value))
        result = F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
    return x + result.reshape(batch, height, width, channels).permute(0, 3, 1, 2)


def _build_heads(state: State, args: tuple[Any, ...]) -> nn.Module:
    channels = constant_size(state.axes[1])
    memory = TEXT_CHANNELS if args[0] == "text" else channels
    sizes = {"query": channels, "key": memory, "value": memory}
    return nn.ModuleDict({name: nn.Linear(size, channels) for name, size in sizes.items()})


def _condition(x: Tensor, args: tuple[Any, ...], part: Any, call: Call) -> Tensor:
    assert call.text is not None
    return x * (1 + torch.tanh(part(call.text.mean(1)))[:, :, None, None])


def _pad(x: Tensor, args: tuple[Any, ...], part: Any, call: Call) -> Tensor:
    mode, crop = args
    padded = F.pad(x, (1, 1, 1, 1), mode=mode)
    return padded[:, :, 2:, 1:-1] if crop else part(padded)


def _pool(x: Tensor, args: tuple[Any, ...], part: Any, call: Call) -> Tensor:
    how = args[0]
    if how == "global":
        return x + F.adaptive_avg_pool2d(x, 1)
    return getattr(F, how)(x, 3, 1, 1)  # type: ignore[no-any-return]


def _down(x: Tensor, args: tuple[Any, ...], part: Any, call: Call) -> Tensor:
    how = args[0]
    if how == "conv":
        return part(x)  # type: ignore[no-any-return]
    if how == "pad":
        return part(F.pad(x, (0, 1, 0, 1)))  # type: ignore[no-any-return]
    if how == "unshuffle":
        return part(F.pixel_unshuffle(x, 2))  # type: ignore[no-any-return]
    return x[:, :, ::2, ::2] if how == "slice" else F.avg_pool2d(x, 2)


def _up(x: Tensor, args: tuple[Any, ...], part: Any, call: Call) -> Tensor:
    how = args[0]
    if how in ("transposed", "shuffle"):
        x = part(x)
        return F.pixel_shuffle(x, 2) if how == "shuffle" else x
    return F.interpolate(x, scale_factor=2.0, mode=how)


def _build_down(state: State, args: tuple[Any, ...]) -> nn.Module | None:
    channels = constant_size(state.axes[1])
    if args[0] == "unshuffle":
        return nn.Conv2d(4 * channels, channels, 1)
    if args[0] in ("conv", "pad"):
        return nn.Conv2d(channels, channels, 3, stride=2, padding=int(args[0] == "conv"))
    return None


def _build_up(state: State, args: tuple[Any, ...]) -> nn.Module | None:
    channels = constant_size(state.axes[1])
    if args[0] == "transposed":
        return nn.ConvTranspose2d(channels, channels, 2, stride=2)
    return nn.Conv2d(channels, 4 * channels, 1) if args[0] == "shuffle" else None


def _scaled(by: float) -> Callable[[State, tuple[Any, ...]], State]:
    def after(state: State, args: tuple[Any, ...]) -> State:
        channels, divisor = state.map or (0, 0)
        return State(canonical(channels, int(divisor * by)), state.kept)

    return after


def _downs(state: State) -> Iterator[tuple[Any, ...]]:
    if state.map and state.map[1] < COARSEST:
        yield from (("conv",), ("pad",), ("pool",), ("slice",), ("unshuffle",))


def _ups(state: State) -> Iterator[tuple[Any, ...]]:
    if state.map and state.map[1] > 1:
        yield from (("nearest",), ("nearest",), ("bilinear",), ("transposed",), ("shuffle",))


def _keep(x: Tensor, args: tuple[Any, ...], part: Any, call: Call) -> Tensor:
    call.kept.append(x)
    return x


def _join(x: Tensor, args: tuple[Any, ...], part: Any, call: Call) -> Tensor:
    how, index = args
    other = call.kept[index]
    return x + other if how == "add" else part(torch.cat([x, other], 1))  # type: ignore[no-any-return]


def _joins(state: State) -> Iterator[tuple[Any, ...]]:
    return ((how, i) for i, kept in enumerate(state.kept) if kept == state.map for how in ("add", "cat"))


def _build_join(state: State, args: tuple[Any, ...]) -> nn.Module | None:
    channels = constant_size(state.axes[1])
    return nn.Conv2d(2 * channels, channels, 1) if args[0] == "cat" else None


POINTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "tanh": torch.tanh,
    "gate": lambda x: x * torch.sigmoid(x),
    "where": lambda x: torch.where(x > 0, x, 0.1 * x),
    "cast": lambda x: x.double().float(),
}


def _square(state: State, args: tuple[Any, ...]) -> nn.Module:
    return nn.Linear(_width(state), _width(state))


KINDS: dict[str, Kind] = {
    "pointwise": Kind(_always(*POINTWISE), lambda x, args, part, call: POINTWISE[args[0]](x)),
    "reshape": Kind(
        _regroupings, lambda x, a, p, call: x.reshape(_sizes(a[0], call)), after=lambda s, a: State(a[0], s.kept)
    ),
    "view": Kind(_regroupings, _view, after=lambda s, a: State(a[0], s.kept)),
    "permute": Kind(
        _orders, lambda x, a, p, call: x.permute(a[0]), after=lambda s, a: State(tuple(s.axes[i] for i in a[0]), s.kept)
    ),
    "home": Kind(_away, _home, after=_back_home),
    "reduce": Kind(_reductions, _reduce),
    "select": Kind(_any_axis, _select),
    "softmax": Kind(_any_axis, lambda x, args, part, call: x + torch.softmax(x, args[0])),
    "cumsum": Kind(_any_axis, lambda x, args, part, call: torch.tanh(x.cumsum(args[0]))),
    "flip": Kind(_any_axis, lambda x, args, part, call: x.flip(args[0])),
    "roll": Kind(_any_axis, lambda x, args, part, call: x.roll(1, args[0])),
    "rotate": Kind(_constant_axis, _rotate),
    "swap_halves": Kind(_even_axis, _swap_halves),
    "glu": Kind(_even_axis, lambda x, args, part, call: F.glu(torch.cat([x, x], args[0]), args[0])),
    "half": Kind(lambda s: ((axis, share) for axis in range(s.rank) for share in (2, 3)), _half_of),
    "third_of_tokens": Kind(_map(()), _third_of_tokens),
    "stack": Kind(_stacks, _stack),
    "linear": Kind(_last_constant, _layer, _square),
    "layer_norm": Kind(_last_constant, _layer, lambda state, args: nn.LayerNorm(_width(state))),
    "conv": Kind(_convs, _residual, _conv),
    "conv1d": Kind(_conv1ds, _residual, lambda s, a: nn.Conv1d(_width(s, 1), _width(s, 1), a[0], padding=a[0] // 2)),
    "norm": Kind(_norms, _layer, _norm),
    "attention": Kind(_attentions, _attention, _square),
    "heads": Kind(_map(("map", False), ("map", True)), _heads, _build_heads),
    "text": Kind(_map(("text", False), ("text", True)), _heads, _build_heads, reads_text=True),
    "condition": Kind(
        _map(()), _condition, lambda state, args: nn.Linear(TEXT_CHANNELS, _width(state, 1)), reads_text=True
    ),
    "pad": Kind(
        _map(*((mode, crop) for mode in ("constant", "reflect", "replicate", "circular") for crop in (False, True))),
        _pad,
        lambda state, args: None if args[1] else nn.Conv2d(_width(state, 1), _width(state, 1), 3),
    ),
    "pool": Kind(_map(("avg_pool2d",), ("max_pool2d",), ("global",)), _pool),
    "down": Kind(_downs, _down, _build_down, after=_scaled(2)),
    "up": Kind(_ups, _up, _build_up, after=_scaled(0.5)),
    "keep": Kind(_map(()), _keep, after=lambda s, a: State(s.axes, (*s.kept, s.map)) if s.map else s),
    "join": Kind(_joins, _join, _build_join),
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
