"""The Triton attention against its reference: in the interpreter on the CPU, for real on a GPU."""

from __future__ import annotations

import pytest
import torch

from fisedit_compiler.kernels.addresses import address_table
from fisedit_compiler.kernels.attention_sites import attention_sites, inverse_table
from fisedit_compiler.kernels.tolerances import assert_close
from tests.kernels.triton_tools import poisoned, run_in_the_interpreter

# batch, heads, active, sites, size of a head, splits
SHAPES = (
    (1, 2, 5, 70, 16, 1),
    (2, 1, 33, 200, 40, 3),
    (1, 3, 1, 130, 64, 2),
    (2, 2, 64, 64, 32, 1),
    (1, 1, 0, 9, 16, 1),
)


def check(shape: tuple[int, ...], dtype: torch.dtype, device: str, padding: int = 0) -> None:
    from fisedit_compiler.kernels.triton.attention_sites import attention_sites as kernel

    batch, heads, count, sites, size, splits = shape
    generator = torch.Generator().manual_seed(sum(shape))

    def tokens(length: int) -> torch.Tensor:  # [B, h, length, d] as a projection leaves it
        values = torch.randn(batch, length, heads, size, generator=generator)
        return values.to(device, dtype).transpose(1, 2)

    rows = [tokens(count) for _ in range(3)]
    canvases = [tokens(sites) for _ in range(2)]
    active = torch.randperm(sites, generator=generator)[:count].sort().values
    expected = attention_sites(*(t.cpu().float() for t in (*rows, *canvases)), active)
    if padding and count:  # repeated rows must not count twice
        active = torch.cat([active, active[-1:].expand(padding)])
        rows = [torch.cat([t, t[:, :, -1:].expand(-1, -1, padding, -1)], dim=2) for t in rows]
    inverse = inverse_table(active, sites).to(device)
    # Found through a table, what is passed as canvases only says how they are laid out.
    others = [torch.full_like(canvas, float("nan")) for canvas in canvases]
    table = address_table([canvases[1], others[0], canvases[0]], torch.device(device))
    for merged in (False, True):
        for passed, options in ((canvases, {}), (others, {"addresses": table, "entries": (2, 0)})):
            with poisoned():
                actual = kernel(
                    *rows, *passed, active.to(device), inverse, splits=splits, merged=merged, **options
                )  # fmt: skip
            assert actual.transpose(1, 2).is_contiguous()
            assert_close(actual[:, :, :count].cpu().float(), expected, dtype)


def test_the_choice_follows_the_measured_times() -> None:
    """Sides of the break-even that a sweep on an H200 showed: queries, sites, batch times heads."""
    pytest.importorskip("triton")
    from fisedit_compiler.kernels.triton.attention_sites import prefers_merged

    for queries, sites, groups, merged in (
        (464, 9216, 10, False), (1408, 9216, 10, True), (2816, 9216, 10, True),
        (144, 2304, 20, False), (704, 2304, 20, True), (48, 576, 40, False), (16, 144, 40, False),
    ):  # fmt: skip
        assert prefers_merged(queries, sites, groups, 64, 132) == merged


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_on_a_gpu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(shape, dtype, "cuda")
    check(shape, dtype, "cuda", padding=3)


def test_in_the_interpreter() -> None:
    run_in_the_interpreter("tests.kernels.triton.test_triton_attention_sites")


if __name__ == "__main__":
    for shape in SHAPES:
        for padding in (0, 3):
            check(shape, torch.float32, "cpu", padding)
