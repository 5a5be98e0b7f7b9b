"""The ring stager against ``index_select``: in the interpreter on the CPU, for real on a GPU."""

from __future__ import annotations

import pytest
import torch

from fisedit_compiler.kernels.addresses import address_table
from tests.kernels.triton_tools import run_in_the_interpreter

# Per job: canvas sites, ring, channels. Rings are short, long, repeated, out of order and of one site.
JOBS = (
    (30, (1, 4, 29, 29), 20),
    (9, (8, 0, 3) * 9, 300),
    (5, (2,), 1),
    (64, tuple(range(63, -1, -1)), 256),
    (700, tuple(range(0, 700, 7)), 257),
)


def check(dtype: torch.dtype, device: str, batch: int) -> None:
    """Every job's ring rows arrive, whatever its shape; a second run brings another recording's."""
    from fisedit_compiler.kernels.triton.stage_rings import RingStager

    rings = [torch.tensor(ring, device=device) for _, ring, _ in JOBS]
    # Poisoned, and with a row of guard behind each target that nobody may write.
    guarded = [
        torch.full((batch * len(ring) + 1, channels), float("nan"), dtype=dtype, device=device)
        for _, ring, channels in JOBS
    ]
    targets = [
        memory[:-1].view(batch, len(ring), channels) for memory, (_, ring, channels) in zip(guarded, JOBS, strict=True)
    ]
    entries = list(range(len(JOBS), 0, -1))
    stager = RingStager(targets, entries, rings, [sites for sites, _, _ in JOBS])
    for seed in (0, 1):
        generator = torch.Generator().manual_seed(seed)
        canvases = [
            torch.randn(batch, sites, channels, generator=generator).to(device, dtype) for sites, _, channels in JOBS
        ]
        # In another order than the jobs, behind one that nobody asks for.
        stager.run(address_table([canvases[0], *reversed(canvases)], torch.device(device)))
        for target, canvas, ring, memory in zip(targets, canvases, rings, guarded, strict=True):
            assert torch.equal(target, canvas.index_select(1, ring))
            assert memory[-1].isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_on_a_gpu(dtype: torch.dtype, batch: int) -> None:
    check(dtype, "cuda", batch)


def test_in_the_interpreter() -> None:
    run_in_the_interpreter("tests.kernels.triton.test_triton_stage_rings")


if __name__ == "__main__":
    for dtype in (torch.float16, torch.float32):
        check(dtype, "cpu", 2)
