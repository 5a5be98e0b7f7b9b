"""A ControlNet's residuals are spatial inputs at several resolutions; edits with them follow the contract too."""

from __future__ import annotations

from fractions import Fraction

import torch
from diffusers import ControlNetModel

import fisedit_compiler
from fisedit_compiler.kernels.tolerances import assert_close
from tests.reference.pinned import PinnedRun
from tests.support.zoo import ZOO


def test_residuals_of_a_controlnet_are_sparse_inputs() -> None:
    model = ZOO["sd15"]()
    torch.manual_seed(0)
    control = ControlNetModel.from_unet(model.module).eval()
    for parameter in control.parameters():  # its zero convolutions would hide the residuals
        torch.nn.init.normal_(parameter, std=0.05)
    inputs = model.make_inputs(2, 24, 40)
    scale = int(2 ** (len(control.config.conditioning_embedding_out_channels) - 1))
    hint = torch.randn(2, 3, 24 * scale, 40 * scale)

    def with_residuals(call: dict) -> dict:
        plain = {name: call[name] for name in ("sample", "timestep", "encoder_hidden_states")}
        with torch.no_grad():
            down, middle = control(**plain, controlnet_cond=hint, return_dict=False)
        return call | {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}

    mask = torch.zeros(24, 40, dtype=torch.bool)
    mask[4:11, 9:22] = True
    base, edited = with_residuals(inputs), with_residuals(model.edit_inputs(inputs, mask))
    compiled = fisedit_compiler.sparsify(model.module)
    with compiled.record() as recording:
        dense = compiled(**base)[0]
    assert torch.equal(dense, model.module(**base)[0])
    with compiled.edit(recording, mask) as session:
        result = compiled(**edited)[0]
    assert session.plan is not None
    active = {session.plan.size(level): session.plan.active_mask(level) for level in session.plan.active}
    expected = PinnedRun(model.module, base).replay(edited, active)
    assert_close(result, expected, torch.float32)
    assert torch.equal(result[..., ~mask], dense[..., ~mask])
    assert not session.plan.active_mask(Fraction(1)).all()
