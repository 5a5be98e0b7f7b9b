"""Copies out of fixed places in one launch against plain copies: in the interpreter on the CPU, for real on a GPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fisedit_compiler.kernels.addresses import runs_of
from tests.kernels.triton_tools import run_in_the_interpreter


def views(device: str, rows: int, channels: int) -> list[Tensor]:
    """Rows without those that padding repeats: in several orders of axes, of several dtypes; and values without any."""
    padded = torch.empty(2, rows + 3, 4, channels, dtype=torch.float16, device=device)
    return [
        padded.flatten(2)[:, :rows],
        padded.transpose(1, 2)[:, :, :rows],
        torch.empty(2, channels, rows + 5, device=device)[:, :, :rows],
        torch.empty(1, rows + 1, 8, 2, device=device)[:, :rows],
        torch.empty(2, 8, 2, device=device),
        torch.empty(5000, dtype=torch.bfloat16, device=device),
        torch.empty(3, dtype=torch.int64, device=device),
    ]


def check(device: str, rows: int = 5, channels: int = 16) -> None:
    from fisedit_compiler.kernels.triton.copy_out import CopyOut

    sources = views(device, rows, channels)
    found = [runs_of(view) for view in sources]
    runs = [each for each in found if each is not None]
    assert len(runs) == len(found)
    # The first two of half precision share a piece of memory, behind something that is not written.
    shared, places = 64, []
    for source in sources[:2]:
        places.append((0, shared))
        shared += source.nbytes
    places += [(number, 0) for number in range(1, len(sources) - 1)]
    copier = CopyOut(sources, runs, places)
    for seed in (0, 1):
        for source in sources:
            source.copy_(torch.randn(source.shape, generator=torch.Generator().manual_seed(seed)) * 9)
        memory = torch.zeros(shared // 2, dtype=torch.float16, device=device)
        targets = [
            memory.as_strided(source.shape, each.strides, first // 2)
            if number == 0
            else torch.empty_strided(source.shape, each.strides, dtype=source.dtype, device=device)
            for source, each, (number, first) in zip(sources, runs, places, strict=True)
        ]
        copier.run([memory, *targets[2:]])
        assert all(map(torch.equal, targets, sources)) and not memory[:32].any()


def test_runs_are_what_lies_side_by_side() -> None:
    canvas = torch.arange(2 * 5 * 6).view(2, 5, 6)
    whole, some, heads = runs_of(canvas), runs_of(canvas[:, :3]), runs_of(canvas.transpose(1, 2)[:, :, :3])
    assert whole is not None and some is not None and heads is not None
    assert (whole.starts, whole.length, whole.strides) == ((0,), 60, (30, 6, 1))
    assert (some.starts, some.length, some.strides) == ((0, 30), 18, (18, 6, 1))
    assert (heads.starts, heads.length, heads.strides) == ((0, 30), 18, (18, 1, 6)), "in the order of memory"
    for nothing in (canvas[:, :0], canvas[:1].expand(2, 5, 6)):
        assert runs_of(nothing) is None
    assert runs_of(canvas[..., ::2], most=29) is None and runs_of(canvas[..., ::2], most=30) is not None


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(1, 4), st.integers(0, 3), st.data())
def test_runs_have_every_element_once(sizes: list[int], kept: int, axis: int, data: st.DataObject) -> None:
    permutation = data.draw(st.permutations(range(len(sizes))))
    base = torch.arange(torch.Size(sizes).numel()).view(sizes).permute(permutation)
    axis %= len(sizes)
    view = base.narrow(axis, 0, min(kept, base.shape[axis]))
    runs = runs_of(view)
    assert runs is not None
    flat = torch.arange(base.numel())
    copied = torch.cat([flat[start : start + runs.length] for start in runs.starts])
    assert torch.equal(copied.as_strided(view.shape, runs.strides), view)
    if len(runs.starts) == 1:
        assert runs.strides == view.stride(), "also of axes of one element"
    assert not view.is_contiguous() or len(runs.starts) == 1


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "channels"), [(5, 16), (480, 320), (7, 3)])
def test_on_a_gpu(rows: int, channels: int) -> None:
    check("cuda", rows, channels)


def test_in_the_interpreter() -> None:
    run_in_the_interpreter("tests.kernels.triton.test_triton_copy_out")


if __name__ == "__main__":
    check("cpu")
    check("cpu", 7, 3)
