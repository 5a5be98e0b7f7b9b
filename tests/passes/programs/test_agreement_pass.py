"""The slots of real programs, tried as the programs use them."""

from __future__ import annotations

import pytest

from fisedit_compiler import SparsifyConfig
from fisedit_compiler.passes import rewrite
from fisedit_compiler.passes.programs.agreement import uses_of
from fisedit_compiler.slots.agreement import check_agreement
from tests.support.compiled_zoo import Norm, compiled_model
from tests.support.pass_tools import program_of


@pytest.mark.parametrize("norm", ["recorded", "incremental"])
@pytest.mark.parametrize("name", ["sd15", "vae_decoder", "pooled", "reflect"])
def test_kinds_of_the_package_agree_as_programs_use_them(name: str, norm: Norm) -> None:
    captured = program_of(compiled_model(name)).captured
    uses = uses_of(rewrite(captured, SparsifyConfig(cache=False, norm=norm)))
    assert all(use.loaded is not None for use in uses), "somebody reads every slot"
    assert any(use.rows is not None for use in uses)
    assert any(use.whole for use in uses) == (
        norm == "incremental" and any("statistics" in use.slot.name for use in uses)
    )
    check_agreement(uses, own=True)
