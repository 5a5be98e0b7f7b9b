"""Steps that are layers, pools, and maps kept and joined: what they may be given, and what they compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fuzz.axes import COARSEST, canonical, constant_size, is_constant
from tests.fuzz.state import (
    TEXT_CHANNELS,
    Call,
    State,
    width,
)


def layer(x: Tensor, args: tuple[Any, ...], part: Any, call: Call) -> Tensor:
    return part(x)  # type: ignore[no-any-return]


def residual(x: Tensor, args: tuple[Any, ...], part: Any, call: Call) -> Tensor:
    return x + part(x)  # type: ignore[no-any-return]


def conv(state: State, args: tuple[Any, ...]) -> nn.Module:
    channels = constant_size(state.axes[1])
    kernel, dilation, groups, bias = args
    padding = tuple(dilation * (size - 1) // 2 for size in kernel)
    groups = channels if groups == "depthwise" else groups
    return nn.Conv2d(channels, channels, kernel, padding=padding, dilation=dilation, groups=groups, bias=bias)


def convs(state: State) -> Iterator[tuple[Any, ...]]:
    if state.rank != 4 or not is_constant(state.axes[1]) or constant_size(state.axes[1]) % 2:
        return
    for kernel, dilation in (((3, 3), 1), ((3, 3), 2), ((1, 1), 1), ((1, 3), 1), ((5, 1), 1)):
        for groups in (1, 2, "depthwise"):
            yield kernel, dilation, groups, groups == 1


def conv1ds(state: State) -> Iterator[tuple[Any, ...]]:
    if state.rank == 3 and is_constant(state.axes[1]):
        yield (1,)
        yield (3,)


def norms(state: State) -> Iterator[tuple[Any, ...]]:
    if state.rank < 3 or not is_constant(state.axes[1]):
        return
    channels = constant_size(state.axes[1])
    for groups in {1, 2, channels}:
        if channels % groups == 0:
            yield ("group", groups)
    if state.rank in (3, 4):
        yield ("batch", state.rank)


def norm(state: State, args: tuple[Any, ...]) -> nn.Module:
    channels = constant_size(state.axes[1])
    if args[0] == "group":
        return nn.GroupNorm(args[1], channels)
    return nn.BatchNorm2d(channels) if args[1] == 4 else nn.BatchNorm1d(channels)


def attentions(state: State) -> Iterator[tuple[Any, ...]]:
    if state.rank in (3, 4) and is_constant(state.axes[-1]):
        for how in ("fused", "products", "bmm"):
            if how != "bmm" or state.rank == 3:
                yield (how,)


def attention(x: Tensor, args: tuple[Any, ...], part: Any, call: Call) -> Tensor:
    query, key, value = part(x), torch.tanh(x), x
    if args[0] == "fused":
        return x + F.scaled_dot_product_attention(query, key, value)
    product = torch.bmm if args[0] == "bmm" else torch.matmul
    return x + product(torch.softmax(product(query, key.transpose(-1, -2)) * 0.5, -1), value)


def heads(x: Tensor, args: tuple[Any, ...], part: Any, call: Call) -> Tensor:
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


def build_heads(state: State, args: tuple[Any, ...]) -> nn.Module:
    channels = constant_size(state.axes[1])
    memory = TEXT_CHANNELS if args[0] == "text" else channels
    sizes = {"query": channels, "key": memory, "value": memory}
    return nn.ModuleDict({name: nn.Linear(size, channels) for name, size in sizes.items()})


def condition(x: Tensor, args: tuple[Any, ...], part: Any, call: Call) -> Tensor:
    assert call.text is not None
    return x * (1 + torch.tanh(part(call.text.mean(1)))[:, :, None, None])


def pad(x: Tensor, args: tuple[Any, ...], part: Any, call: Call) -> Tensor:
    mode, crop = args
    padded = F.pad(x, (1, 1, 1, 1), mode=mode)
    return padded[:, :, 2:, 1:-1] if crop else part(padded)


def pool(x: Tensor, args: tuple[Any, ...], part: Any, call: Call) -> Tensor:
    how = args[0]
    if how == "global":
        return x + F.adaptive_avg_pool2d(x, 1)
    return getattr(F, how)(x, 3, 1, 1)  # type: ignore[no-any-return]


def down(x: Tensor, args: tuple[Any, ...], part: Any, call: Call) -> Tensor:
    how = args[0]
    if how == "conv":
        return part(x)  # type: ignore[no-any-return]
    if how == "pad":
        return part(F.pad(x, (0, 1, 0, 1)))  # type: ignore[no-any-return]
    if how == "unshuffle":
        return part(F.pixel_unshuffle(x, 2))  # type: ignore[no-any-return]
    return x[:, :, ::2, ::2] if how == "slice" else F.avg_pool2d(x, 2)


def up(x: Tensor, args: tuple[Any, ...], part: Any, call: Call) -> Tensor:
    how = args[0]
    if how in ("transposed", "shuffle"):
        x = part(x)
        return F.pixel_shuffle(x, 2) if how == "shuffle" else x
    return F.interpolate(x, scale_factor=2.0, mode=how)


def build_down(state: State, args: tuple[Any, ...]) -> nn.Module | None:
    channels = constant_size(state.axes[1])
    if args[0] == "unshuffle":
        return nn.Conv2d(4 * channels, channels, 1)
    if args[0] in ("conv", "pad"):
        return nn.Conv2d(channels, channels, 3, stride=2, padding=int(args[0] == "conv"))
    return None


def build_up(state: State, args: tuple[Any, ...]) -> nn.Module | None:
    channels = constant_size(state.axes[1])
    if args[0] == "transposed":
        return nn.ConvTranspose2d(channels, channels, 2, stride=2)
    return nn.Conv2d(channels, 4 * channels, 1) if args[0] == "shuffle" else None


def scaled(by: float) -> Callable[[State, tuple[Any, ...]], State]:
    def after(state: State, args: tuple[Any, ...]) -> State:
        channels, divisor = state.map or (0, 0)
        return State(canonical(channels, int(divisor * by)), state.kept)

    return after


def downs(state: State) -> Iterator[tuple[Any, ...]]:
    if state.map and state.map[1] < COARSEST:
        yield from (("conv",), ("pad",), ("pool",), ("slice",), ("unshuffle",))


def ups(state: State) -> Iterator[tuple[Any, ...]]:
    if state.map and state.map[1] > 1:
        yield from (("nearest",), ("nearest",), ("bilinear",), ("transposed",), ("shuffle",))


def keep(x: Tensor, args: tuple[Any, ...], part: Any, call: Call) -> Tensor:
    call.kept.append(x)
    return x


def join(x: Tensor, args: tuple[Any, ...], part: Any, call: Call) -> Tensor:
    how, index = args
    other = call.kept[index]
    return x + other if how == "add" else part(torch.cat([x, other], 1))  # type: ignore[no-any-return]


def joins(state: State) -> Iterator[tuple[Any, ...]]:
    return ((how, i) for i, kept in enumerate(state.kept) if kept == state.map for how in ("add", "cat"))


def build_join(state: State, args: tuple[Any, ...]) -> nn.Module | None:
    channels = constant_size(state.axes[1])
    return nn.Conv2d(2 * channels, channels, 1) if args[0] == "cat" else None


POINTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "tanh": torch.tanh,
    "gate": lambda x: x * torch.sigmoid(x),
    "where": lambda x: torch.where(x > 0, x, 0.1 * x),
    "cast": lambda x: x.double().float(),
}


def square(state: State, args: tuple[Any, ...]) -> nn.Module:
    return nn.Linear(width(state), width(state))
