"""Outside the mask nothing changes, bit for bit, whatever is edited and in whatever precision."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from torch import Tensor

from fisedit_compiler.errors import RecordingError
from fisedit_compiler.runtime.sessions.edit_session import EditSession
from tests.support.compiled_zoo import (
    SEMANTICS,
    Attention,
    Norm,
    Size,
    base_inputs,
    base_run,
    compiled_model,
    edit_inputs,
    edited,
    edits,
    examples,
    make_mask,
    record_run,
    zoo_model,
)
from tests.support.zoo import UNETS, ZOO, Inputs

Edit = Callable[[Inputs, Inputs], Inputs]
KINDS: dict[str, Edit] = {
    "sample": lambda base, edit: {**base, "sample": edit["sample"]},
    "text": lambda base, edit: {**edit, "sample": base["sample"]},
    "both": lambda base, edit: edit,
}


def outside(session: EditSession, output: Tensor) -> Tensor:
    """Bool ``[H, W]`` of the output's inactive sites; the output may be finer than the input."""
    plan = session.plan
    assert plan is not None
    level = Fraction(plan.height, output.shape[-2])
    return ~plan.active_mask(level)


def check(
    name: str, batch: int, size: Size, mask: Tensor, norm: Norm, attention: Attention, dtype: torch.dtype
) -> None:
    compiled = compiled_model(name, norm, attention, dtype=dtype)
    base = base_run(name, norm, attention, batch, size, dtype)
    wanted = edit_inputs(name, batch, size, mask, dtype)
    for kind, change in KINDS.items():
        output, session = edited(compiled, base, change(base.inputs, wanted), mask)
        if not mask.any():
            assert torch.equal(output, base.output)
            continue
        kept = outside(session, output)
        assert torch.equal(output[..., kept], base.output[..., kept]), kind
        if kind != "text" or "encoder_hidden_states" in base.inputs:
            assert not torch.equal(output, base.output), f"{kind}: the edit did nothing inside the mask"


@pytest.mark.parametrize(("norm", "attention"), [SEMANTICS[0], SEMANTICS[3]])
@pytest.mark.parametrize("name", ZOO)
def test_float32(name: str, norm: Norm, attention: Attention) -> None:
    @examples(0.24)
    @given(edits())
    def nothing_changes_outside(edit: tuple[int, Size, Tensor]) -> None:
        check(name, *edit, norm, attention, torch.float32)

    nothing_changes_outside()


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("sd15", torch.bfloat16),
        ("sdxl", torch.bfloat16),
        ("vae_decoder", torch.bfloat16),
        ("sd21", torch.float16),
        ("vae_decoder", torch.float16),
    ],
)
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    @examples(0.20)
    @given(edits())
    def nothing_changes_outside(edit: tuple[int, Size, Tensor]) -> None:
        check(name, *edit, "incremental", "cached", dtype)

    nothing_changes_outside()


@pytest.mark.parametrize("name", ["sd21", "vae_decoder"])
def test_outside_the_dilated_mask(name: str) -> None:
    batch, size, mask = 2, (20, 12), make_mask("site", (20, 12), seed=11)
    compiled = compiled_model(name, dilation=2)
    base = record_run(compiled, base_inputs(name, batch, size))
    output, session = edited(compiled, base, edit_inputs(name, batch, size, mask), mask)
    kept = outside(session, output)
    assert kept.sum() < (~mask).sum() * (output.shape[-1] // size[1]) ** 2
    assert torch.equal(output[..., kept], base.output[..., kept])


@pytest.mark.parametrize("name", ["sd15", "pooled"])
def test_an_edit_of_an_edit_keeps_what_the_first_one_made(name: str) -> None:
    """With two masks apart, the second edit leaves the first one's sites as they are, bit for bit."""
    batch, size = 2, (20, 12)
    compiled, base = compiled_model(name), base_run(name, "recorded", "cached", batch, size)
    first, second = torch.zeros(2, *size, dtype=torch.bool)
    first[2:8, 2:8] = True
    second[16:20, 8:14] = True
    once = edit_inputs(name, batch, size, first)
    with compiled.edit(base.recording, first, record=True) as session:
        compiled(**once)
    assert session.result is not None
    output_once = session.result.calls[0].slots[str(compiled.programs[0].outputs[0].slot)]
    twice = zoo_model(name).edit_inputs(once, second, seed=5)
    output, last = edited(compiled, type(base)(once, output_once, session.result), twice, second)
    kept = outside(last, output)
    assert torch.equal(output[..., kept], output_once[..., kept])
    assert torch.equal(output[..., ~(first | second)], base.output[..., ~(first | second)])
    assert not torch.equal(output[..., first], base.output[..., first])


@pytest.mark.parametrize("name", UNETS)
def test_another_input_outside_the_mask_is_refused(name: str) -> None:
    size = (8, 24)
    base, mask = base_run(name, "recorded", "cached", 2, size), make_mask("block", size)
    inputs = dict(base.inputs)
    inputs["sample"] = torch.where(mask, inputs["sample"], inputs["sample"] + 1e-3)
    with pytest.raises(RecordingError, match="outside the mask"):
        edited(compiled_model(name), base, inputs, mask)
