"""Zoo models compiled once per process, their base runs, and the masks that edits are tried with.

A capture is the slow part of every test here, so models, compilations, recordings and the oracle's base runs are
kept and shared; nothing in a test may change them. No test and no tolerance lives here.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any, Literal

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from fisedit_compiler import Recording, SparseModule, SparsifyConfig, sparsify
from fisedit_compiler.runtime.sessions.edit_session import EditSession
from tests.reference.pinned import PinnedRun
from tests.support.zoo import UNETS, ZOO, Inputs, ZooModel

# Tensors of a few kilobytes: a second thread costs more in waiting than it computes, several times over on a busy
# machine.
torch.set_num_threads(1)

Norm = Literal["recorded", "incremental"]
Attention = Literal["cached", "active"]
Size = tuple[int, int]

SEMANTICS: tuple[tuple[Norm, Attention], ...] = (
    ("recorded", "cached"),
    ("recorded", "active"),
    ("incremental", "cached"),
    ("incremental", "active"),
)
SIZES: tuple[Size, ...] = ((8, 24), (20, 12), (16, 28), (4, 8))
"""Latent sizes of the examples: not square, no powers of two, all multiples of every zoo model's divisor."""
LARGE: Size = (40, 56)
"""A size where rings, borders and active sites are all well apart."""


@cache
def zoo_model(name: str, dtype: torch.dtype = torch.float32) -> ZooModel:
    """A zoo model in a precision; the same object every time."""
    built = ZOO[name]()
    if dtype is torch.float32:
        return built
    return replace(built, module=copy.deepcopy(built.module).to(dtype))


@cache
def compiled_model(
    name: str,
    norm: Norm = "recorded",
    attention: Attention = "cached",
    *,
    dtype: torch.dtype = torch.float32,
    dilation: int = 0,
    disabled: frozenset[str] = frozenset(),
) -> SparseModule:
    """``sparsify`` of a zoo model; captures are shared through the cache directory of the tests.

    It never falls back to dense calls: the subject is the packed program, under every mask.
    """
    model = zoo_model(name, dtype)
    config = SparsifyConfig(
        norm=norm,
        attention=attention,
        dilation=dilation,
        dense_above=1.0,
        disabled_passes=disabled,
        multiple=None if name in UNETS else model.multiple,
    )
    example = None if name in UNETS else base_inputs(name, 2, (8, 16), dtype)
    compiled = sparsify(model.module, config, example_inputs=example)
    _SHARED.append(compiled)
    return compiled


_SHARED: list[SparseModule] = []


def check_shared_modules() -> None:
    """Every shared module still has one program: calls of another signature belong to a module of the test's own."""
    changed = [compiled for compiled in _SHARED if len(compiled.programs) > 1]
    for compiled in changed:
        _SHARED.remove(compiled)
    assert not changed, f"the test made calls of another signature with shared modules: {changed}"


def forget_cut_steps() -> None:
    """Let shared modules be as if no call of theirs had ever reused anything, for tests that list their graphs."""
    for program in (program for compiled in _SHARED for program in compiled.programs):
        program.__dict__.pop("reuse", None)


@lru_cache(maxsize=64)
def base_inputs(name: str, batch: int, size: Size, dtype: torch.dtype = torch.float32) -> Inputs:
    """Base inputs of a zoo model in a precision (the timestep stays an integer)."""
    return _cast(zoo_model(name).make_inputs(batch, *size, 0), dtype)


def edit_inputs(name: str, batch: int, size: Size, mask: Tensor, dtype: torch.dtype = torch.float32) -> Inputs:
    """Another text, and a sample changed inside the mask only."""
    return zoo_model(name, dtype).edit_inputs(base_inputs(name, batch, size, dtype), mask)


def output_of(result: Any) -> Tensor:
    """The one output map of a zoo model's result."""
    return result if isinstance(result, Tensor) else result[0]


@dataclass(frozen=True)
class BaseRun:
    """One recorded base call: its inputs, its output and the recording."""

    inputs: Inputs
    output: Tensor
    recording: Recording


def record_run(compiled: SparseModule, inputs: Inputs) -> BaseRun:
    """Record one call."""
    with compiled.record() as recording:
        output = output_of(compiled(**inputs))
    return BaseRun(inputs, output, recording)


@lru_cache(maxsize=48)
def base_run(
    name: str,
    norm: Norm,
    attention: Attention,
    batch: int,
    size: Size,
    dtype: torch.dtype = torch.float32,
) -> BaseRun:
    """The recorded base call of a compiled zoo model."""
    compiled = compiled_model(name, norm, attention, dtype=dtype)
    return record_run(compiled, base_inputs(name, batch, size, dtype))


@lru_cache(maxsize=48)
def oracle(
    name: str,
    batch: int,
    size: Size,
    dtype: torch.dtype = torch.float32,
    pin_inputs_of: frozenset[str] = frozenset(),
) -> PinnedRun:
    """The oracle's base run of a zoo model."""
    model = zoo_model(name, dtype)
    functions = model.dense_functions | pin_inputs_of
    return PinnedRun(model.module, base_inputs(name, batch, size, dtype), pin_inputs_of=functions)


def edited(compiled: SparseModule, base: BaseRun, inputs: Inputs, mask: Tensor) -> tuple[Tensor, EditSession]:
    """The result of one sparse call, and the session that made it."""
    with compiled.edit(base.recording, mask) as session:
        output = output_of(compiled(**inputs))
    return output, session


def active_sets(session: EditSession) -> dict[Size, Tensor]:
    """The site plan's active sites by resolution, as the oracle wants them."""
    plan = session.plan
    assert plan is not None
    return {plan.size(level): plan.active_mask(level) for level in plan.active}


MASKS = ("empty", "site", "row", "column", "checkerboard", "scattered", "block", "border", "full")


def examples(share: float) -> settings:
    """Hypothesis settings with a share of the profile's examples, for tests with many parameters."""
    return settings(max_examples=max(1, round(share * settings.default.max_examples)))  # type: ignore[union-attr]


def make_mask(kind: str, size: Size, seed: int = 0) -> Tensor:
    """A bool mask ``[H, W]`` of one of the kinds of :data:`MASKS`; ``seed`` says where it lies."""
    height, width = size
    generator = torch.Generator().manual_seed(seed)

    def below(limit: int) -> int:
        return int(torch.randint(limit, (), generator=generator))

    mask = torch.zeros(size, dtype=torch.bool)
    if kind == "site":
        mask[below(height), below(width)] = True
    elif kind == "row":
        mask[below(height)] = True
    elif kind == "column":
        mask[:, below(width)] = True
    elif kind == "checkerboard":
        mask[::2, seed % 2 :: 2] = True
        mask[1::2, 1 - seed % 2 :: 2] = True
    elif kind == "scattered":
        mask = torch.rand(size, generator=generator) < 0.1
        mask[below(height), below(width)] = True
    elif kind == "block":
        top, left = below(height), below(width)
        mask[top : top + 1 + height // 3, left : left + 1 + width // 3] = True
    elif kind == "border":
        mask[0] = mask[-1] = mask[:, 0] = mask[:, -1] = True
    elif kind == "full":
        mask[:] = True
    else:
        assert kind == "empty", kind
    return mask


@st.composite
def edits(draw: st.DrawFn, *, empty: bool = True) -> tuple[int, Size, Tensor]:
    """Batch, latent size and mask of one edit."""
    batch = draw(st.integers(1, 3), label="batch")
    size = draw(st.sampled_from(SIZES), label="size")
    kind = draw(st.sampled_from(MASKS if empty else MASKS[1:]), label="mask")
    return batch, size, make_mask(kind, size, draw(st.integers(0, 99), label="seed"))


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, dict):
        return {key: _cast(item, dtype) for key, item in value.items()}
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(dtype)
    return value
