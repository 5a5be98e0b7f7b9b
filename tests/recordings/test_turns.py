"""Edits as copy-on-write views: what every turn of a chain computes, keeps in memory and shares with its base."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from fisedit_compiler import Recording, SparseModule
from fisedit_compiler.kernels.tolerances import assert_close
from fisedit_compiler.lowering.program import CompiledProgram
from fisedit_compiler.recordings.stores.edited import EditedSlots, written_in
from fisedit_compiler.runtime.execution.executable import Executable
from fisedit_compiler.runtime.sessions.edit_session import EditSession
from fisedit_compiler.slots.row_form import RowForm
from fisedit_compiler.slots.turn import Turn
from fisedit_compiler.slots.written import Written
from tests.reference.pinned import PinnedRun
from tests.support.compiled import HEIGHT, WIDTH, box, model_and_compiled
from tests.support.compiled_zoo import active_sets
from tests.support.zoo import ZOO, Inputs

TURNS = (
    box(4, 6, 12, 16),
    box(8, 10, 15, 22),
    box(5, 7, 9, 11),
    box(0, 0, 16, 4),
    box(4, 6, 12, 16),
    box(7, 1, 13, 20),
)
"""Masks of a chain: overlapping, inside an earlier one, apart from it, an earlier one again, across all."""


@dataclass(frozen=True)
class Step:
    """One turn of a chain of single calls."""

    inputs: Inputs
    session: EditSession
    output: Tensor

    @property
    def recording(self) -> Recording:
        assert self.session.result is not None
        return self.session.result


def turn(compiled: SparseModule, recording: Recording, inputs: Inputs, mask: Tensor | None) -> Step:
    with compiled.edit(recording, mask, record=True) as session:
        output = compiled(**inputs)[0]
    return Step(inputs, session, output)


def chain(compiled: SparseModule, name: str, masks: tuple[Tensor, ...], batch: int = 2) -> tuple[Recording, list[Step]]:
    """A base call and one edit of it after the other, each with a text of its own."""
    model = ZOO[name]()
    inputs = model.make_inputs(batch, HEIGHT, WIDTH)
    with compiled.record() as recording:
        compiled(**inputs)
    steps: list[Step] = []
    for number, mask in enumerate(masks):
        inputs = model.edit_inputs(inputs, mask, seed=number + 1)
        steps.append(turn(compiled, steps[-1].recording if steps else recording, inputs, mask))
    return recording, steps


def program_of(compiled: SparseModule) -> CompiledProgram:
    (program,) = compiled.programs
    return program


def output_slot(compiled: SparseModule) -> str:
    (output,) = program_of(compiled).outputs
    assert output.slot is not None
    return output.slot


def written_bytes(program: CompiledProgram, base: Mapping[str, Tensor], session: EditSession) -> int:
    """What a turn has to store, from the program's slots and the plan's numbers of active sites."""
    assert session.plan is not None
    total = 0
    for update in program.updates:
        slot = next(slot for slot in program.slots if slot.name == update.slot)
        value, level = base[slot.name], slot.layout.level
        assert level is not None
        height, width = session.plan.size(level)
        share = 1 if slot.kind.name == "statistics" else height * width
        rows = 1 if slot.kind.name == "statistics" else session.plan.rows(level)
        assert value.numel() % share == 0
        total += value.numel() // share * rows * value.element_size()
    return total


# -- what a chain computes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "norm"), [("sd15", "recorded"), ("sd15", "incremental"), ("sdxl", "incremental")])
def test_every_turn_of_a_chain_is_the_pinned_program(name: str, norm: Any) -> None:
    compiled = model_and_compiled(name, norm=norm)[1]
    run = PinnedRun(compiled.original, ZOO[name]().make_inputs(2, HEIGHT, WIDTH))
    for number, step in enumerate(chain(compiled, name, TURNS)[1]):
        active = active_sets(step.session)
        expected = run.replay(step.inputs, active, norm=norm)
        assert_close(step.output, expected, torch.float32)
        assert torch.equal(step.output, step.recording.slot(0, output_slot(compiled))), number
        run = run.continued(step.inputs, active, norm=norm)


@pytest.mark.parametrize("norm", ["recorded", "incremental"])
def test_slots_after_a_chain_are_those_written_one_after_the_other(norm: Any) -> None:
    """Composed at once or turn by turn: every turn's rows over the slots of the turn before."""
    compiled = model_and_compiled("sd15", norm=norm)[1]
    recording, steps = chain(compiled, "sd15", TURNS)
    before: Mapping[str, Tensor] = recording.calls[0].slots
    kinds = {slot.name: slot for slot in program_of(compiled).slots}
    for step in steps:
        slots = step.recording.calls[0].slots
        assert isinstance(slots, EditedSlots) and list(slots) == list(before)
        for name, written in slots.written.items():
            if kinds[name].kind.name != "site_sums":
                last = written.by_turn[-1]
                expected = written.form.write(before[name], last.turn.sites[written.form.level], last.rows)
                assert torch.equal(slots[name], expected), name
        before = slots


def test_any_turn_can_be_returned_to() -> None:
    compiled = model_and_compiled("sd15", norm="incremental")[1]
    model = ZOO["sd15"]()
    _, steps = chain(compiled, "sd15", TURNS)
    mask = box(6, 4, 11, 13)
    inputs = model.edit_inputs(steps[2].inputs, mask, seed=9)
    slots = {name: steps[2].recording.slot(0, name) for name in steps[2].recording.calls[0].slots}
    first = turn(compiled, steps[2].recording, inputs, mask)
    # Four more turns from there, and one that is thrown away.
    later = first
    for number, other in enumerate((*TURNS[:4], box(0, 0, HEIGHT, WIDTH))):
        edited = model.edit_inputs(later.inputs, other, seed=20 + number)
        later = turn(compiled, later.recording, edited, other)
    again = turn(compiled, steps[2].recording, inputs, mask)
    assert torch.equal(again.output, first.output)
    for name, value in slots.items():
        assert torch.equal(steps[2].recording.slot(0, name), value), f"{name} of an earlier turn has changed"
        assert torch.equal(again.recording.slot(0, name), first.recording.slot(0, name)), name


@pytest.mark.parametrize("kind", ["map", "transposed", "tokens"])
def test_rows_lie_where_the_layout_says(kind: str) -> None:
    """Values that are not packed: maps with their sites anywhere, and tokens."""
    from fractions import Fraction

    from fisedit_compiler.graph.axis_roles import Batch, Channel, Sites
    from fisedit_compiler.graph.layout import Layout

    batch, channel, level = Batch(), Channel(), Fraction(1)
    height, width = Sites(level, "height"), Sites(level, "width")
    shape, layout = {
        "map": ((2, 3, 4, 5), Layout((batch, channel, height, width))),
        "transposed": ((2, 5, 3, 4), Layout((batch, width, channel, height))),
        "tokens": ((2, 20, 3), Layout((batch, Sites(level), channel))),
    }[kind]
    base, new = torch.randn(shape), torch.randn(shape)
    sites = torch.tensor([1, 6, 7, 19])
    form = RowForm.dense(layout)
    rows = form.gather(new, sites)
    written = form.write(base, sites, rows)
    selected = torch.zeros(20, dtype=torch.bool)
    selected[sites] = True
    grid = selected.view(4, 5)
    mask = {"map": grid, "transposed": grid.T[None, :, None, :], "tokens": selected[None, :, None]}[kind]
    assert torch.equal(written, torch.where(mask, new, base))


# -- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["recorded", "incremental"])
def test_ten_turns_cost_their_active_rows(norm: Any) -> None:
    compiled = model_and_compiled("sd15", norm=norm)[1]
    masks = tuple(box(number, 2 * number, number + 4, 2 * number + 5) for number in range(10))
    recording, steps = chain(compiled, "sd15", masks)
    base = recording.calls[0].slots
    for step in steps:
        assert step.recording.own_nbytes == written_bytes(program_of(compiled), base, step.session)
        assert step.recording.own_bytes_per_call == [step.recording.own_nbytes]
        assert step.recording.own_nbytes < recording.nbytes / 4
        assert f"{step.recording.own_nbytes / 2**20:.1f} MiB of its own" in repr(step.recording)
    # Nothing is held but the base and the rows: every storage that the eleven recordings keep alive, each once.
    held = {id(tensor): tensor for tensor in base.values()}
    for step in steps:
        held |= {id(tensor): tensor for tensor in step.recording.calls[0].slots.tensors()}
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in held.values()}
    turns = sum(step.recording.own_nbytes for step in steps)
    assert sum(storages.values()) == recording.nbytes + turns
    assert steps[-1].recording.nbytes <= recording.nbytes + turns
    assert recording.own_nbytes == recording.nbytes


def test_what_an_edit_leaves_alone_is_shared_with_its_base() -> None:
    compiled = model_and_compiled("sd15", norm="recorded")[1]
    recording, steps = chain(compiled, "sd15", TURNS[:2])
    for step in steps:
        slots = step.recording.calls[0].slots
        changed = {update.slot for update in program_of(compiled).updates}
        assert set(written_in(slots)) == changed
        held = {id(tensor) for tensor in slots.tensors()}
        for name, value in recording.calls[0].slots.items():
            assert id(value) in held, f"{name} was copied"
            assert name in changed or slots[name] is value
    statistics = [slot.name for slot in program_of(compiled).slots if slot.kind.name == "statistics"]
    assert statistics and not set(statistics) & {update.slot for update in program_of(compiled).updates}


def test_an_empty_edit_shares_everything() -> None:
    compiled = model_and_compiled()[1]
    recording, (first,) = chain(compiled, "sd15", TURNS[:1])
    inputs = ZOO["sd15"]().make_inputs(2, HEIGHT, WIDTH)
    for base, sample in ((recording, inputs["sample"]), (first.recording, first.inputs["sample"])):
        changed = {**first.inputs, "sample": sample}
        empty = turn(compiled, base, changed, torch.zeros(HEIGHT, WIDTH, dtype=torch.bool))
        assert empty.recording.own_nbytes == 0
        assert empty.recording.nbytes == base.nbytes
        assert torch.equal(empty.output, base.slot(0, output_slot(compiled)))


def test_a_dense_call_shares_the_slots_whose_bits_are_the_bases() -> None:
    """Before the first cross-attention the text has no part in anything: those slots are the base's."""
    compiled = model_and_compiled("sd15", norm="incremental")[1]
    model = ZOO["sd15"]()
    recording, _ = chain(compiled, "sd15", ())
    inputs = model.make_inputs(2, HEIGHT, WIDTH)
    other = model.edit_inputs(inputs, torch.zeros(HEIGHT, WIDTH, dtype=torch.bool), seed=3)
    dense = turn(compiled, recording, other, None)
    slots, base = dense.recording.calls[0].slots, recording.calls[0].slots
    shared = {name for name in base if slots[name] is base[name]}
    assert "conv_in.input" in shared and output_slot(compiled) not in shared
    assert dense.recording.own_nbytes == sum(value.nbytes for name, value in slots.items() if name not in shared)
    with compiled.record() as fresh:
        compiled(**other)
    for name, value in fresh.calls[0].slots.items():
        assert torch.equal(slots[name], value), name
    unchanged = turn(compiled, recording, inputs, None)
    assert unchanged.recording.own_nbytes == 0, "the same call again"
    # Sparse turns over dense ones over sparse ones.
    mask = TURNS[1]
    step = turn(compiled, dense.recording, model.edit_inputs(other, mask, seed=4), mask)
    run = PinnedRun(compiled.original, other)
    assert_close(step.output, run.replay(step.inputs, active_sets(step.session), norm="incremental"), torch.float32)


def test_rows_that_a_later_turn_covers_are_not_kept_by_it() -> None:
    compiled = model_and_compiled("sd15", norm="incremental")[1]
    _, steps = chain(compiled, "sd15", (TURNS[2], TURNS[0], TURNS[0], TURNS[3]))
    depths = []
    for step in steps:
        depths.append(len(written_in(step.recording.calls[0].slots)["conv_in.input"].by_turn))
    assert depths == [1, 1, 1, 2]


def test_dropping_a_turn_frees_its_rows_and_keeps_what_others_need() -> None:
    compiled = model_and_compiled("sd15", norm="incremental")[1]
    recording, steps = chain(compiled, "sd15", TURNS[:3])
    names = list(recording.calls[0].slots)
    expected = {name: steps[2].recording.slot(0, name).clone() for name in names}

    def own(step: Step) -> list[weakref.ref[Tensor]]:
        slots = step.recording.calls[0].slots
        assert isinstance(slots, EditedSlots)
        return [weakref.ref(tensor) for tensor in slots.own]

    last, middle = own(steps[2]), own(steps[1])
    roots = [weakref.ref(value) for value in recording.calls[0].slots.values()]
    kept = steps[2].recording
    del recording, steps[0:2]
    gc.collect()
    assert all(reference() is not None for reference in last)
    assert any(reference() is not None for reference in middle), "rows under the last turn's are needed"
    assert any(reference() is not None for reference in roots), "and so is the base"
    for name, value in expected.items():
        assert torch.equal(kept.slot(0, name), value), name
    del kept, steps
    gc.collect()
    assert not [reference for reference in (*last, *middle, *roots) if reference() is not None]


@pytest.mark.parametrize("reuse", ["off", 0.5])
def test_dropping_a_turn_that_was_written_over_frees_it_though_nobody_read_the_later_one(reuse: Any) -> None:
    """What an edit changed is written down when somebody asks; until then it refers to what it edited."""
    compiled = model_and_compiled("sd15", norm="incremental", reuse=reuse)[1]
    recording, steps = chain(compiled, "sd15", (TURNS[0], TURNS[0]))
    first, kept = (step.recording for step in steps)
    rows = [weakref.ref(change.by_turn[-1].rows) for call in first for change in written_in(call.slots).values()]
    del first, steps, recording
    gc.collect()
    assert rows and not [reference for reference in rows if reference() is not None]
    for call in kept:
        assert isinstance(call.slots, EditedSlots)
        assert call.own_nbytes == sum(tensor.nbytes for tensor in call.slots.own)


def test_reading_a_slot_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is put together for a call is gone after it."""
    compiled = model_and_compiled()[1]
    _, steps = chain(compiled, "sd15", TURNS[:2])
    read: list[weakref.ref[Tensor]] = []
    original = Written.over

    def remember(written: Written, root: Tensor) -> Tensor:
        value = original(written, root)
        read.append(weakref.ref(value))
        return value

    monkeypatch.setattr(Written, "over", remember)
    step = turn(compiled, steps[1].recording, steps[1].inputs, TURNS[2])
    assert read and step.recording.own_nbytes
    gc.collect()
    assert not [reference for reference in read if reference() is not None]


def test_a_base_keeps_nothing_of_edits_that_are_dropped() -> None:
    compiled = model_and_compiled("sd15")[1]
    before = len(weakref.finalize._registry)  # type: ignore[attr-defined]
    recording, steps = chain(compiled, "sd15", TURNS[:1])
    result = weakref.ref(steps[0].recording)
    assert len(weakref.finalize._registry) == before + 1  # type: ignore[attr-defined]
    steps.clear()
    gc.collect()
    assert result() is None and recording.complete
    assert len(weakref.finalize._registry) == before  # type: ignore[attr-defined]


def test_nothing_is_written_down_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A base may be garbage that is collected then; comparing sites would wait for the device."""
    compiled = model_and_compiled("sd15")[1]
    recording, steps = chain(compiled, "sd15", TURNS[:2])
    result, slots = steps[1].recording, steps[1].recording.calls[0].slots
    assert isinstance(slots, EditedSlots)
    with monkeypatch.context() as capture:
        capture.setattr(torch.cuda, "is_initialized", lambda: True)
        capture.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        capture.setattr(Turn, "covers", lambda *_: pytest.fail("asked the device"))
        del recording
        steps.clear()
        gc.collect()
    assert slots._make is not None
    expected = chain(compiled, "sd15", TURNS[:2])[1][1].recording
    assert all(torch.equal(result.slot(0, name), expected.slot(0, name)) for name in slots)


def test_tables_of_a_chain_are_made_once() -> None:
    """Merging what turns wrote is host work; fifty calls of a run must not repeat it."""
    sites = [{1: torch.tensor([1, 4, 5])}, {1: torch.tensor([0, 4])}, {1: torch.tensor([2, 5])}]
    turns: tuple[Any, ...] = tuple(Turn(table) for table in sites)  # type: ignore[arg-type]
    written, source = turns[-1].merged(turns, 1)  # type: ignore[arg-type]
    assert written.tolist() == [0, 1, 2, 4, 5]
    assert source.tolist() == [3, 0, 5, 4, 6], "the last turn that wrote a site counts"
    assert turns[-1].merged(turns, 1)[0] is written  # type: ignore[arg-type]
    nothing: Any = Turn({1: torch.tensor([], dtype=torch.int64)})  # type: ignore[dict-item]
    assert nothing.merged((turns[0], nothing), 1)[0].tolist() == [1, 4, 5]
    assert not turns[1].covers(turns[0], 1) and Turn({1: torch.arange(6)}).covers(turns[0], 1)  # type: ignore[arg-type,dict-item]


# -- the graph that records ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["recorded", "incremental"])
def program(request: pytest.FixtureRequest) -> Iterator[CompiledProgram]:
    yield program_of(model_and_compiled("sd15", norm=request.param)[1])


def test_the_update_graph_returns_rows_and_small_values(program: CompiledProgram) -> None:
    kinds = {slot.name: slot.kind.name for slot in program.slots}
    for update in program.updates:
        assert (update.dim is None) == (kinds[update.slot] == "statistics")
    missing = set(kinds) - {update.slot for update in program.updates}
    recorded = {name for name, kind in kinds.items() if kind == "statistics"}
    assert missing == (recorded if program.config.norm == "recorded" else set())
    scatters = [
        sum(node.target is torch.ops.fisedit.scatter_sites.default for node in graph.nodes)
        for graph in (program.step, program.update)
    ]
    assert scatters[0] == scatters[1], "recording writes no canvas"


def test_an_executable_gives_updates_by_name() -> None:
    compiled = model_and_compiled("sd15", norm="incremental")[1]
    recording, (step,) = chain(compiled, "sd15", TURNS[:1])
    (executable,) = compiled._programs.executables()
    assert isinstance(executable, Executable) and step.session.plan is not None
    call, _ = compiled._programs.bind((), step.inputs)
    _, updates = executable.step(call.tensors, recording.calls[0].slots, step.session.plan, update=True)
    assert list(updates) == [update.slot for update in executable.program.updates]
    for value in updates.values():
        assert value.untyped_storage().nbytes() == value.nbytes, "an update keeps no larger tensor alive"
