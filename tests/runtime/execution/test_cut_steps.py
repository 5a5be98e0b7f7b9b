"""Shallow calls as CUDA graphs run them: rows stay padded between calls, and results are those of eager calls."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from fisedit_compiler import Recording, SparseModule, SparsifyConfig, sparsify
from fisedit_compiler.errors import LoweringError
from fisedit_compiler.kernels.tolerances import assert_close
from fisedit_compiler.lowering.stage import stage
from fisedit_compiler.runtime.execution.executable import Executable
from tests.support.compiled_zoo import make_mask
from tests.support.graph_pair import SIZE, Pair, calls_of
from tests.support.graph_stand_in import patch_cuda
from tests.support.pass_tools import zoo_step_call
from tests.support.zoo import ZOO, Inputs


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cpu":
        patch_cuda(monkeypatch)
    return request.param


def make_pair(device: str, backend: Any = "inductor", **options: Any) -> Pair:
    module = copy.deepcopy(ZOO["sd15"]().module).to(device)
    graphs, eager = (
        sparsify(module, SparsifyConfig(backend=each, dense_above=1.0, reuse=1e9, **options))
        for each in (backend, "eager")
    )
    return Pair(replace(ZOO["sd15"](), module=module), graphs, eager, torch.float32, device)


def edit(
    module: SparseModule, recording: Recording, inputs: Inputs, mask: torch.Tensor, record: bool
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[str]]:
    """Outputs, recorded slots, and how calls ran."""
    with module.edit(recording, mask, record=record) as session:
        outputs = [module(**call)[0] for call in calls_of(inputs)]
    slots = [value for result in session.results for call in result for value in call.slots.values()]
    return outputs, slots, [kind for kind, _ in session.timings]


@pytest.mark.parametrize("record", [False, True])
@pytest.mark.parametrize(("norm", "attention"), [("incremental", "cached"), ("recorded", "active")])
def test_graphs_give_what_eager_calls_give(norm: Any, attention: Any, record: bool, device: str) -> None:
    pair = make_pair(device, norm=norm, attention=attention)
    inputs = pair.inputs()
    recording, _ = pair.record(inputs)
    for kind in ("site", "scattered", "block", "site", "full"):
        mask = make_mask(kind, SIZE, seed=2)
        edited = pair.edited(inputs, mask)
        found, expected = (edit(each, recording, edited, mask, record) for each in (pair.graphs, pair.eager))
        assert found[2] == expected[2] == ["sparse", "shallow"]
        for now, then in zip(found[0] + found[1], expected[0] + expected[1], strict=True):
            assert_close(now.float(), then.float(), torch.float32)
    (executable,) = pair.graphs._programs.executables()
    assert {"reuse.full_update", "reuse.shallow_update"} == set(executable._pools), "shared with edits that record"
    assert all(pool._graphs for pool in executable._pools.values())


def test_a_shallow_graph_that_is_refused_goes_on_with_the_rows_that_were_kept(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They were padded for a graph; the eager call takes those of the plan's sites."""
    pair = make_pair(device, "auto")
    inputs = pair.inputs()
    recording, _ = pair.record(inputs)
    mask = make_mask("scattered", SIZE, seed=2)
    edited = pair.edited(inputs, mask)
    make_pool = Executable._make_pool

    def refuse(self: Executable, name: Any) -> Any:
        if "shallow" in name:
            raise LoweringError("refused")
        return make_pool(self, name)

    monkeypatch.setattr(Executable, "_make_pool", refuse)
    found, expected = (edit(each, recording, edited, mask, False) for each in (pair.graphs, pair.eager))
    assert found[2] == expected[2] == ["sparse", "shallow"]
    for now, then in zip(found[0], expected[0], strict=True):
        assert_close(now, then, torch.float32)


@pytest.mark.parametrize("name", ["sd15", "sdxl", "scale_shift", "plain_conv"])
@pytest.mark.parametrize("padding", [False, True], ids=["plain", "padded"])
def test_cut_and_staged_graphs_give_the_same_bits(name: str, padding: bool) -> None:
    for kind in ("site", "scattered", "block", "full"):
        call = zoo_step_call(name, make_mask(kind, (8, 24), seed=5), padding=padding)
        program = call.executable.program
        for part, whole in (("", program.step), ("_update", program.update)):
            expected, full = call.run(whole), getattr(program.reuse, f"full{part}")
            *outputs, rows = call.run(full)
            assert all(map(torch.equal, outputs, expected)), "a full call returns the rows at the cut besides"
            assert not isinstance(program.cut, str)
            held = replace(call, held={program.cut.values[0].origin: rows})
            shallow = getattr(program.reuse, f"shallow{part}")
            kept = [*range(len(program.outputs))]
            if part:
                places = {update.slot: number for number, update in enumerate(program.updates, len(kept))}
                kept += [places[update.slot] for update in program.reuse.updates]
            for graph in (shallow, stage(shallow, program.slots_of(f"reuse.shallow{part}"))):  # type: ignore[arg-type]
                read = replace(held, slots={each: call.slots[each] for each in program.slots_of("reuse.shallow")})
                found = read.run(graph)
                assert len(found) == len(kept)
                for now, place in zip(found, kept, strict=True):
                    assert torch.equal(now, expected[place]), (kind, place)
