"""The staging kernel against ``index_select``: in the interpreter on the CPU, for real on a GPU.

The interpreter must be chosen before Triton is imported, so the CPU cases run in one subprocess.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

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
    stager = RingStager(targets, rings, [sites for sites, _, _ in JOBS])
    for seed in (0, 1):
        generator = torch.Generator().manual_seed(seed)
        canvases = [
            torch.randn(batch, sites, channels, generator=generator).to(device, dtype) for sites, _, channels in JOBS
        ]
        stager.run(canvases)
        for target, canvas, ring, memory in zip(targets, canvases, rings, guarded, strict=True):
            assert torch.equal(target, canvas.index_select(1, ring))
            assert memory[-1].isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_on_a_gpu(dtype: torch.dtype, batch: int) -> None:
    check(dtype, "cuda", batch)


@pytest.mark.gpu
def test_runs_queued_behind_each_other_keep_their_addresses() -> None:
    """A run must not overwrite the addresses that a run still waiting on the GPU will read."""
    from fisedit_compiler.kernels.triton.stage_rings import RingStager

    ring = torch.arange(0, 512, 2, device="cuda")
    target = torch.empty(2, 256, 64, device="cuda")
    stager = RingStager([target], [ring], [512])
    canvases = [torch.full((2, 512, 64), float(value), device="cuda") for value in range(20)]
    torch.cuda._sleep(20_000_000)  # keeps the GPU busy while everything below is queued
    seen = []
    for canvas in canvases:
        stager.run([canvas])
        seen.append(target.clone())
    for value, copied in enumerate(seen):
        assert copied.eq(value).all()


def test_in_the_interpreter() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run(
        [sys.executable, "-m", "tests.kernels.test_triton_stage_rings"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]


if __name__ == "__main__":
    for dtype in (torch.float16, torch.float32):
        check(dtype, "cpu", 2)
