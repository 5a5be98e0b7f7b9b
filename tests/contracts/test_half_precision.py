"""Half precision costs a sparse edit no more than it costs the dense model: against fp32, at most twice the error.

The fp32 references are the pinned program (for the sparse edit) and the dense edit (for the dense one); both halves
round the same weights and inputs. On a GPU the edit runs compiled, in CUDA graphs; the reference stays on the CPU.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fisedit_compiler import SparsifyConfig, sparsify
from fisedit_compiler.models import load_pipeline
from tests.reference.pinned import PinnedRun
from tests.support.compiled_zoo import active_sets, make_mask, output_of
from tests.support.zoo import ZOO

SIZE = (16, 24)
PLACES = [("cpu", "eager"), pytest.param(("cuda", "inductor"), marks=pytest.mark.gpu)]


def cast(value: Any, device: str, dtype: torch.dtype) -> Any:
    if isinstance(value, dict):
        return {key: cast(item, device, dtype) for key, item in value.items()}
    if isinstance(value, Tensor):
        return value.to(device, dtype if value.is_floating_point() else None)
    return value


def error(actual: Tensor, expected: Tensor, mask: Tensor) -> float:
    """Root mean square over the active sites, relative to the values there."""
    difference = (actual.cpu().float() - expected)[..., mask]
    return float(difference.norm() / expected[..., mask].norm())


def errors(
    module: nn.Module, base: dict[str, Any], edit: dict[str, Any], mask: Tensor, place: tuple[str, str],
    dtype: torch.dtype,
) -> tuple[float, float]:  # fmt: skip
    """Errors of the sparse and of the dense edit in half precision, each against its fp32 reference."""
    device, backend = place
    half = copy.deepcopy(module).to(device, dtype)
    compiled = sparsify(half, SparsifyConfig(backend=backend, dense_above=1.0))
    with torch.no_grad():
        with compiled.record() as recording:
            compiled(**cast(base, device, dtype))
        with compiled.edit(recording, mask) as session:
            sparse = output_of(compiled(**cast(edit, device, dtype)))
        dense = output_of(half(**cast(edit, device, dtype)))
        expected = PinnedRun(module, base).replay(edit, {size: at.cpu() for size, at in active_sets(session).items()})
        expected_dense = output_of(module(**edit))
    return error(sparse, expected, mask), error(dense, expected_dense, mask)


@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize(
    ("name", "dtype"), [("sd15", torch.float16), ("sd15", torch.bfloat16), ("sdxl", torch.float16)]
)
def test_a_tiny_unet(name: str, place: tuple[str, str], dtype: torch.dtype) -> None:
    model = ZOO[name]()
    base = model.make_inputs(2, *SIZE, 0)
    for kind in ("block", "scattered"):
        mask = make_mask(kind, SIZE, seed=3)
        sparse, dense = errors(model.module, base, model.edit_inputs(base, mask), mask, place, dtype)
        assert 0 < sparse <= 2 * dense, f"{kind}: sparse {sparse:.2e}, dense {dense:.2e}"


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_the_trained_model(place: tuple[str, str], dtype: torch.dtype = torch.float16) -> None:
    """Trained weights have the outliers that random ones have not."""
    unet = load_pipeline(None).unet.eval()
    generator = torch.Generator().manual_seed(0)
    size, channels = (32, 32), unet.config["cross_attention_dim"]
    base = {
        "sample": torch.randn(2, unet.config["in_channels"], *size, generator=generator),
        "timestep": torch.tensor(400.0),
        "encoder_hidden_states": torch.randn(2, 32, channels, generator=generator),
    }
    mask = make_mask("block", size, seed=3)
    noise = torch.randn(base["sample"].shape, generator=generator)
    edit = base | {
        "sample": torch.where(mask, base["sample"] + noise, base["sample"]),
        "encoder_hidden_states": torch.randn(2, 32, channels, generator=generator),
    }
    sparse, dense = errors(unet, base, edit, mask, place, dtype)
    assert 0 < sparse <= 2 * dense, f"sparse {sparse:.2e}, dense {dense:.2e}"
