"""Three runs that must be one: recording and original, an edit of nothing and the base, a full mask and a dense run."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor

from fisedit_compiler import SparseModule, SparsifyConfig, sparsify
from fisedit_compiler.kernels.tolerances import max_error
from fisedit_compiler.runtime.calls.binding import Binder
from fisedit_compiler.runtime.execution.executable import Executable
from fisedit_compiler.runtime.execution.hoisting import HoistCache
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
    output_of,
    zoo_model,
)
from tests.support.zoo import UNETS, ZOO

IDENTITY = 1e-5
"""An edit of nothing reads the recorded neighbours and differs by the order of sums alone."""
FULL = 2e-5
"""As :data:`IDENTITY`, with statistics measured through recorded sums; the contract allows 1e-4."""
HALF_MODELS = ("sd15", "sdxl", "plain_conv", "pooled", "reflect", "vae_decoder")
PRECISIONS = [
    *((name, torch.float32) for name in ZOO),
    *((name, torch.bfloat16) for name in HALF_MODELS),
    ("sd21", torch.float16),
    ("vae_decoder", torch.float16),
]


@pytest.mark.parametrize(("name", "dtype"), PRECISIONS)
def test_a_recording_run_is_the_original_run(name: str, dtype: torch.dtype) -> None:
    for batch, size in ((2, (8, 24)), (1, (20, 12)), (3, (16, 28))):
        with torch.no_grad():
            original = output_of(zoo_model(name, dtype).module(**base_inputs(name, batch, size, dtype)))
        assert torch.equal(base_run(name, "recorded", "cached", batch, size, dtype).output, original)


@pytest.mark.parametrize("norm", ["recorded", "incremental"])
@pytest.mark.parametrize("name", ZOO)
def test_an_edit_of_nothing_is_the_base_run(name: str, norm: Norm) -> None:
    compiled = compiled_model(name, norm, "cached")

    @examples(0.32)
    @given(edits())
    def same_inputs_same_output(edit: tuple[int, Size, Tensor]) -> None:
        batch, size, mask = edit
        base = base_run(name, norm, "cached", batch, size)
        again, _ = edited(compiled, base, base.inputs, mask)
        assert max_error(again, base.output) <= IDENTITY

    same_inputs_same_output()


@pytest.mark.parametrize("attention", ["cached", "active"])
@pytest.mark.parametrize("name", ZOO)
def test_a_full_mask_is_the_dense_run(name: str, attention: Attention) -> None:
    compiled = compiled_model(name, "incremental", attention)
    for batch, size in ((1, (16, 28)), (2, (20, 12))):
        mask = make_mask("full", size)
        inputs = edit_inputs(name, batch, size, mask)
        packed, session = edited(compiled, base_run(name, "incremental", attention, batch, size), inputs, mask)
        assert session.plan is not None and session.plan.is_full
        with torch.no_grad():
            dense = output_of(zoo_model(name).module(**inputs))
        assert max_error(packed, dense) <= FULL


@pytest.mark.parametrize(("norm", "attention"), SEMANTICS)
@pytest.mark.parametrize("name", ["sd15", "vae_decoder", "pooled"])
def test_an_empty_mask_runs_nothing(
    name: str, norm: Norm, attention: Attention, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the original nor any program nor a hoisted bundle."""
    batch, size = 2, (8, 24)
    compiled, base = compiled_model(name, norm, attention), base_run(name, norm, attention, batch, size)
    nothing = make_mask("empty", size)
    inputs = edit_inputs(name, batch, size, nothing)
    calls: list[str] = []

    def forbid(owner: type, method: str) -> None:
        def spy(*args: Any, **kwargs: Any) -> None:
            calls.append(method)
            raise AssertionError(f"{method} ran under an empty mask")

        monkeypatch.setattr(owner, method, spy)

    for method in ("record", "interpret", "step"):
        forbid(Executable, method)
    forbid(HoistCache, "evaluate")
    monkeypatch.setattr(Binder, "_call_module", lambda *_, **__: calls.append("original"))
    with compiled.edit(base.recording, nothing, record=True) as session:
        result = output_of(compiled(**inputs))
    assert calls == []
    assert [kind for kind, _ in session.timings] == ["skipped"]
    assert torch.equal(result, base.output)
    assert result.data_ptr() != base.recording.calls[0].slots[_output_slot(compiled)].data_ptr()
    assert session.result is not None and session.result.complete


def test_a_full_mask_of_an_edited_recording_is_the_dense_run_too() -> None:
    """An edit recorded by the edit before it stands for a base run in every slot."""
    name, batch, size = "sd21", 2, (20, 12)
    compiled, base = compiled_model(name, "incremental"), base_run(name, "incremental", "cached", batch, size)
    mask = make_mask("full", size)
    first = edit_inputs(name, batch, size, mask)
    with compiled.edit(base.recording, mask, record=True) as session:
        once = output_of(compiled(**first))
    assert session.result is not None
    with compiled.edit(session.result, make_mask("block", size, seed=2)):
        again = output_of(compiled(**first))
    assert max_error(again, once) <= IDENTITY


STYLES = ["keywords", "positions", "mixed", "tuple", "object"]
TIMESTEPS: list[Any] = [481, 481.0, torch.tensor(481), torch.tensor([481]), torch.tensor([481, 481])]


@cache
def called_in_every_way() -> SparseModule:
    """A module of its own: a timestep for each sample is another signature, and makes another program."""
    return sparsify(zoo_model("sd15").module, SparsifyConfig(dense_above=1.0))


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("timestep", TIMESTEPS, ids=["int", "float", "0-d", "1-d", "per sample"])
def test_every_way_to_call_records_and_edits(style: str, timestep: Any) -> None:
    """The wrapper takes calls as the original does and returns the same type."""
    size = (8, 24)
    compiled = called_in_every_way()
    inputs = base_inputs("sd15", 2, size)

    def call(module: Any) -> Any:
        sample, text = inputs["sample"], inputs["encoder_hidden_states"]
        if style == "positions":
            return module(sample, timestep, text)
        if style == "mixed":
            return module(sample, timestep, encoder_hidden_states=text, return_dict=True)
        options = {"tuple": {"return_dict": False}, "object": {"return_dict": True}}.get(style, {})
        return module(sample=sample, timestep=timestep, encoder_hidden_states=text, **options)

    with torch.no_grad():
        expected = call(compiled.original)
    with compiled.record() as recording:
        recorded = call(compiled)
    with compiled.edit(recording, make_mask("block", size)):
        again = call(compiled)
    assert type(recorded) is type(expected) and type(again) is type(expected)
    assert torch.equal(recorded[0], expected[0])
    assert max_error(again[0], expected[0]) <= IDENTITY
    if style != "tuple":
        assert torch.equal(recorded.sample, expected.sample)


@pytest.mark.parametrize("name", UNETS)
def test_in_no_mode_it_is_the_original(name: str) -> None:
    compiled, inputs = compiled_model(name), base_inputs(name, 2, (8, 24))
    with torch.no_grad():
        assert torch.equal(output_of(compiled(**inputs)), output_of(compiled.original(**inputs)))


def _output_slot(compiled: Any) -> str:
    (program,) = compiled.programs[:1]
    (slot,) = {output.slot for output in program.outputs}
    return str(slot)
