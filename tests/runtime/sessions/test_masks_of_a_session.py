"""What a session derives from its mask — plan, turn, sites of each copy — belongs to that mask and to no other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fisedit_compiler import SparseModule
from fisedit_compiler.kernels.tolerances import assert_close
from tests.reference.pinned import PinnedRun
from tests.support.compiled import HEIGHT, WIDTH, box, model_and_compiled
from tests.support.zoo import ZOO, Inputs

FIRST = box(4, 6, 12, 16)
MOVED = box(2, 4, 10, 14)
"""As many sites as ``FIRST``: what is left of the first mask has the right size, and is wrong all the same."""
OTHER = box(9, 17, 16, 24)


def recorded(calls: int) -> tuple[SparseModule, Inputs, object]:
    model, compiled = model_and_compiled("sd15")
    inputs = model.make_inputs(2, HEIGHT, WIDTH)
    with compiled.record() as recording:
        for _ in range(calls):
            compiled(**inputs)
    return compiled, inputs, recording


def test_masks_of_equal_bytes_and_other_shapes_have_plans_of_their_own() -> None:
    """An 8 x 12 and a 12 x 8 mask that are the same bytes in a row."""
    compiled = model_and_compiled("sd15")[1]
    flat = torch.zeros(96, dtype=torch.bool)
    flat[10:40] = True
    outputs = []
    for height, width in ((8, 12), (12, 8)):
        mask = flat.reshape(height, width)
        base = ZOO["sd15"]().make_inputs(2, height, width)
        edited = ZOO["sd15"]().edit_inputs(base, mask)
        with compiled.record() as recording:
            before = compiled(**base)[0]
        with compiled.edit(recording, mask) as session:
            outputs.append(compiled(**edited)[0])
        plan = session.plan
        assert plan is not None
        assert torch.equal(outputs[-1][..., ~mask], before[..., ~mask])
        active = {plan.size(level): plan.active_mask(level) for level in plan.active}
        assert set(active) >= {(height, width)}
        assert_close(outputs[-1], PinnedRun(compiled.original, base).replay(edited, active), torch.float32)
    assert outputs[0].shape != outputs[1].shape


@pytest.mark.parametrize("second", [MOVED, OTHER], ids=["as many sites", "another number"])
def test_a_mask_set_in_mid_edit_records_its_own_sites(second: Tensor) -> None:
    """The second call's slots are those of an edit that had the second mask from the start."""
    compiled, inputs, recording = recorded(calls=2)
    model = ZOO["sd15"]()
    edits = [model.edit_inputs(inputs, mask, seed=1) for mask in (FIRST, second)]
    with compiled.edit(recording, FIRST, record=True) as session:
        compiled(**edits[0])
        session.set_mask(second)
        late = compiled(**edits[1])[0]
    with compiled.edit(recording, second, record=True) as alone:
        compiled(**edits[1])
        expected = compiled(**edits[1])[0]
    assert torch.equal(late, expected)
    assert session.result is not None and alone.result is not None
    for name, value in alone.result.calls[1].slots.items():
        assert torch.equal(session.result.calls[1].slots[name], value), name


def test_masks_of_copies_set_in_mid_edit_pin_every_copy_to_its_own() -> None:
    compiled, inputs, recording = recorded(calls=2)
    model = ZOO["sd15"]()
    first, second = torch.stack([FIRST, OTHER]), torch.stack([OTHER, MOVED])
    base = compiled.original(**inputs)[0]

    def doubled(masks: Tensor) -> Inputs:
        edits = [model.edit_inputs(inputs, mask, seed=seed) for seed, mask in enumerate(masks, start=1)]
        tensors = {n for n, v in inputs.items() if isinstance(v, Tensor) and v.dim() > 0}
        joined = {name: torch.stack([edit[name] for edit in edits], dim=1).flatten(0, 1) for name in tensors}
        return {**inputs, **joined}

    with compiled.edit(recording, first, copies=2) as session:
        compiled(**doubled(first))
        session.set_mask(second)
        output = compiled(**doubled(second))[0]
    for copy, mask in zip(output.unflatten(0, (-1, 2)).unbind(1), second, strict=True):
        assert torch.equal(copy[..., ~mask], base[..., ~mask])
        assert not torch.equal(copy[..., mask], base[..., mask])


def test_a_mask_that_its_owner_writes_to_stays_what_it_was() -> None:
    compiled, inputs, recording = recorded(calls=2)
    mask = FIRST.clone()
    edited = ZOO["sd15"]().edit_inputs(inputs, FIRST)
    with compiled.edit(recording, mask) as session:
        first = compiled(**edited)[0]
        mask.zero_()
        assert session.mask is not None and torch.equal(session.mask, FIRST)
        assert torch.equal(compiled(**edited)[0], first)
