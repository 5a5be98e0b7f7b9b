"""What befalls one run is no business of the others: errors, contexts, what it keeps of prompts and measures."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fisedit_compiler import Recording, SparseModule, SparsifyConfig, sparsify
from fisedit_compiler.errors import FiseditError
from fisedit_compiler.pipelines.instruments import timed_calls
from fisedit_compiler.recordings.stores import hold
from fisedit_compiler.recordings.stores.addresses import KnownAddresses
from fisedit_compiler.recordings.stores.edited import EditedSlots
from fisedit_compiler.runtime.execution.executable import PER_CALL
from fisedit_compiler.runtime.execution.hoisting import HoistCache
from fisedit_compiler.runtime.sessions.edit_session import EditSession
from fisedit_compiler.runtime.sessions.record_session import RecordSession
from tests.support.compiled import box, other_text
from tests.support.runs import (
    CALLS,
    Run,
    alone,
    calls_of,
    check,
    edit,
    in_tasks,
    in_threads,
    record,
    recorded,
    slots_of,
    together,
)
from tests.support.zoo import Inputs

SIZE = 8
MASK, OTHER_MASK = box(1, 1, 4, 5, SIZE, SIZE), box(3, 2, 7, 8, SIZE, SIZE)
SCALE: ContextVar[float] = ContextVar("scale", default=1.0)


class Told(nn.Module):
    """Convolutions and a norm, told a timestep and a text."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 3, 3, padding=1)
        self.norm, self.text = nn.GroupNorm(2, 4), nn.Linear(5, 4)

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor]:
        told = self.text(encoder_hidden_states).mean(1) * timestep.cos()
        return (self.last(self.norm(self.first(sample)).sigmoid() + told[:, :, None, None]),)


class Scaled(Told):
    """Also looks at a context variable."""

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor]:
        return super().forward(sample * SCALE.get(), timestep, encoder_hidden_states)


def inputs_of(seed: int = 0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    sample, text = torch.randn(2, 3, SIZE, SIZE, generator=generator), torch.randn(2, 3, 5, generator=generator)
    return {"sample": sample, "timestep": torch.tensor(900), "encoder_hidden_states": text}


def compiled_of(module: nn.Module) -> SparseModule:
    config = SparsifyConfig(multiple=1, cache=False, dense_above=1.0)
    return sparsify(module.eval(), config, example_inputs=inputs_of())


@pytest.fixture(scope="module")
def compiled() -> SparseModule:
    torch.manual_seed(0)
    return compiled_of(Told())


@pytest.fixture(scope="module")
def base(compiled: SparseModule) -> Recording:
    return recorded(compiled, inputs_of())


# -- errors ----------------------------------------------------------------------------------------------


def stopped(compiled: SparseModule, base: Recording, error: type[BaseException]) -> Run:
    def run(computed: list[Tensor]) -> Iterator[None]:
        with pytest.raises(error), compiled.record() as recording:
            compiled(**inputs_of(1))
            yield
            raise error("stopped by its user")
        assert not recording.complete and recording.num_calls == 1
        yield

    return run


def refused(compiled: SparseModule, base: Recording, changed: Mapping[str, Any]) -> Run:
    """An edit whose second call is none that its recording has."""

    def run(computed: list[Tensor]) -> Iterator[None]:
        first, second = calls_of(other_text(inputs_of(), 2))
        with pytest.raises((FiseditError, RuntimeError)), compiled.edit(base, MASK, record=True) as session:
            compiled(**first)
            yield
            compiled(**{**second, **changed})
        assert session.result is None or not session.result.complete
        yield

    return run


MISTAKES: Mapping[str, Callable[[SparseModule, Recording], Run]] = {
    "an exception": lambda compiled, base: stopped(compiled, base, ValueError),
    "an interrupt": lambda compiled, base: stopped(compiled, base, KeyboardInterrupt),
    "another timestep": lambda compiled, base: refused(compiled, base, {"timestep": torch.tensor(111)}),
    "another noise": lambda compiled, base: refused(compiled, base, {"sample": inputs_of(9)["sample"]}),
    "another size": lambda compiled, base: refused(compiled, base, {"sample": torch.zeros(2, 3, 4, 4)}),
    "a text that the module cannot read": lambda compiled, base: refused(
        compiled, base, {"encoder_hidden_states": torch.zeros(2, 3, 4)}
    ),
}


@pytest.mark.parametrize("how", [in_threads, in_tasks])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_an_error_in_one_run_leaves_the_others_alone(
    compiled: SparseModule, base: Recording, mistake: str, how: Callable[..., list[list[Tensor]]]
) -> None:
    runs = [
        MISTAKES[mistake](compiled, base),
        edit(compiled, base, other_text(inputs_of(), 2), MASK, record=True),
        edit(compiled, base, other_text(inputs_of(), 3), OTHER_MASK),
        record(compiled, inputs_of(4)),
    ]
    expected = alone(runs[1:])
    turns = [number for _ in range(CALLS + 1) for number in range(len(runs))]
    assert len(turns) == 3 * len(runs)
    check(how(runs, turns)[1:], expected)
    check(alone(runs[1:]), expected)
    assert "in no mode" in repr(compiled) and "elsewhere" not in repr(compiled)


# -- what runs share ---------------------------------------------------------------------------------------


def test_a_prompt_of_each_run_is_computed_once(compiled: SparseModule, base: Recording) -> None:
    """More runs at once than prompts are kept of one: they do not drive out each other's."""
    (executable,) = compiled._programs.executables()
    runs = [edit(compiled, base, other_text(inputs_of(), 10 + seed), MASK) for seed in range(6)]
    expected = alone(runs)
    executable.hoisted.clear()
    executable.hoisted.computed.clear()
    turns = [number for _ in range(CALLS + 1) for number in range(len(runs))]
    check(in_threads(runs, turns), expected)
    assert max(executable.hoisted.computed.values()) == CALLS * len(runs), "text and timestep meet in one value"
    check(alone(runs), expected)
    assert max(executable.hoisted.computed.values()) == CALLS * len(runs)


def test_what_is_kept_for_a_timestep_is_computed_from_it(compiled: SparseModule) -> None:
    """A call that brings another one is refused behind its launch: by then other runs may have found its values."""
    (executable,) = compiled._programs.executables()
    tensors, other = inputs_of(), {**inputs_of(), "timestep": torch.tensor(111)}
    expected = executable._hoisted(HoistCache(PER_CALL), tensors, {}, None)
    found = executable._hoisted(HoistCache(PER_CALL), other, {"timestep": 900.0}, None)
    assert expected and list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_what_was_begun_before_everything_was_forgotten_is_not_kept(compiled: SparseModule) -> None:
    """It may have been computed by graphs of weights that were exchanged meanwhile."""
    (executable,) = compiled._programs.executables()
    cache, bundles = HoistCache(PER_CALL), executable._bundle_modules()
    begun = cache.generation
    cache.clear()
    late = cache.evaluate(bundles, inputs_of(), 2, generation=begun)
    again = cache.evaluate(bundles, inputs_of(), 2, generation=cache.generation)
    found = cache.evaluate(bundles, inputs_of(), 2, generation=begun)
    assert set(cache.computed.values()) == {2}, "what is kept is found, also by who begun earlier"
    assert late.groups != again.groups == found.groups
    assert all(torch.equal(late[name], again[name]) for name in again)


def test_runs_that_edit_one_edit(compiled: SparseModule, base: Recording) -> None:
    """Its slots are put together as they are read, by tables that whoever reads first makes."""

    def result() -> Recording:
        turn = base
        for seed, mask in ((1, MASK), (2, OTHER_MASK)):
            with compiled.edit(turn, mask, record=True) as session:
                for call in calls_of(other_text(inputs_of(), seed)):
                    compiled(**call)
            assert session.result is not None
            turn = session.result
        return turn

    def runs_on(turn: Recording) -> Sequence[Run]:
        return [
            edit(compiled, turn, other_text(inputs_of(), 3 + number), mask, record=number % 2 == 0)
            for number, mask in enumerate((MASK, OTHER_MASK, MASK, OTHER_MASK))
        ]

    expected = alone(runs_on(result()))
    for _ in range(3):
        turn = result()
        before = slots_of(turn)
        check(in_threads(runs_on(turn)), expected)
        assert all(map(torch.equal, slots_of(turn), before))


def test_a_check_disturbs_no_run(compiled: SparseModule, base: Recording) -> None:
    run = edit(compiled, base, other_text(inputs_of(), 3), MASK)

    def checked(computed: list[Tensor]) -> Iterator[None]:
        assert compiled.check(OTHER_MASK)
        yield
        assert compiled.check(MASK)

    expected = alone([run, run])
    found = in_threads([run, checked, run], [0, 1, 2, 0, 1, 2, 0, 2])
    check([found[0], found[2]], expected)
    check(in_threads([checked, run, checked, run])[1::2], expected)


@pytest.mark.parametrize("view", [False, True])
def test_a_store_gives_each_reader_the_addresses_of_its_layout(view: bool) -> None:
    """Another run asks for those of its own layout at the very moment at which this one's are kept."""
    recorded_slots = hold({"slot": torch.randn(4, 6)})
    store = EditedSlots(recorded_slots, {}) if view else recorded_slots
    mine, others = {"slot": (6, 1)}, {"slot": (1, 4)}
    asked: list[Any] = []

    def keep_in(known: Any, kept: Any) -> None:
        known.__dict__["kept"] = kept
        if not asked:
            asked.append(None)
            asked[0] = store.addresses(others, torch.device("cpu"))

    watched = property(lambda known: known.__dict__.get("kept", ()), keep_in)
    store._addresses.__class__ = type("Watched", (KnownAddresses,), {"_kept": watched})  # type: ignore[attr-defined]
    found = store.addresses(mine, torch.device("cpu"))
    assert found.tensors["slot"].stride() == mine["slot"] and asked[0].tensors["slot"].stride() == others["slot"]


@pytest.mark.parametrize("view", [False, True])
def test_full_and_shallow_calls_in_turn_find_their_addresses_again(view: bool) -> None:
    recorded_slots = hold({"slot": torch.randn(4, 6)})
    store = EditedSlots(recorded_slots, {}) if view else recorded_slots
    layouts = [{"slot": (6, 1)}, {"slot": (1, 4)}, {"slot": (6, 1)}]
    first, second = (store.addresses(layout, torch.device("cpu")) for layout in layouts[:2])
    assert store.addresses(layouts[0], torch.device("cpu")) is first
    assert store.addresses(layouts[1], torch.device("cpu")) is second
    store.addresses(layouts[2], torch.device("cpu"))
    assert store.addresses(layouts[0], torch.device("cpu")) is not first, "a third one drives the oldest out"
    for other in (copy.deepcopy(store), pickle.loads(pickle.dumps(store))):
        found = other.addresses(layouts[0], torch.device("cpu"))
        assert found.tensors["slot"] is other.read("slot"), "a copy has its own"
        assert other._addresses is not store._addresses  # type: ignore[attr-defined]


def test_a_stopwatch_counts_the_calls_of_its_own_block(compiled: SparseModule) -> None:
    def timed(calls: int) -> int:
        with timed_calls(compiled) as seconds:
            for _ in range(calls):
                compiled(**inputs_of())
        return len(seconds)

    counts = [1, 5, 3, 4]
    assert together([lambda calls=calls: timed(calls) for calls in counts]) == counts
    assert not compiled._forward_hooks and not compiled._forward_pre_hooks


# -- contexts ----------------------------------------------------------------------------------------------


def in_context(scale: float, run: Run) -> Run:
    def scaled(computed: list[Tensor]) -> Iterator[None]:
        SCALE.set(scale)
        yield from run(computed)

    return scaled


def recorded_and_edited(compiled: SparseModule) -> Run:
    def run(computed: list[Tensor]) -> Iterator[None]:
        with compiled.record() as recording:
            for call in calls_of(inputs_of()):
                computed.append(compiled(**call)[0])
                yield
        with compiled.edit(recording, MASK):
            for call in calls_of(other_text(inputs_of(), 1)):
                computed.append(compiled(**call)[0])
                yield

    return run


@pytest.mark.parametrize("how", [in_threads, in_tasks])
def test_runs_in_contexts_that_the_module_looks_at(how: Callable[..., list[list[Tensor]]]) -> None:
    """Each has a program of its own, and none gets another's, whoever's call is next."""
    torch.manual_seed(0)
    compiled = compiled_of(Scaled())
    runs = [in_context(scale, recorded_and_edited(compiled)) for scale in (1.0, 2.0, 0.5)]
    turns = [number for _ in range(2 * CALLS + 1) for number in range(len(runs))]
    found = how(runs, turns)
    check(found, alone(runs))
    assert not torch.equal(found[0][0], found[1][0])
    SCALE.set(1.0)


def test_a_call_has_the_program_of_what_its_own_run_saw(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both look at the module before either of them looks for its program."""
    torch.manual_seed(0)
    compiled = compiled_of(Scaled())
    runs = [in_context(scale, recorded_and_edited(compiled)) for scale in (1.0, 2.0)]
    expected = alone(runs)
    looked = threading.Barrier(len(runs), timeout=60)
    for session in (RecordSession, EditSession):

        def meeting(session: Any, before: Callable[[Any], Any] = session.before) -> Any:
            seen = before(session)
            looked.wait()
            return seen

        monkeypatch.setattr(session, "before", meeting)
    check(in_threads(runs), expected)
    SCALE.set(1.0)


def test_modes_of_two_modules_inside_each_other(compiled: SparseModule, base: Recording) -> None:
    torch.manual_seed(1)
    other = compiled_of(Told())

    def nested(outer: SparseModule, inner: SparseModule, seed: int) -> Run:
        def run(computed: list[Tensor]) -> Iterator[None]:
            inner_base = recorded(inner, inputs_of())
            with outer.record() as recording:
                computed.append(outer(**inputs_of(seed))[0])
                yield
                with inner.edit(inner_base, MASK):
                    for call in calls_of(other_text(inputs_of(), seed)):
                        computed.append(inner(**call)[0])
                        yield
                computed.append(outer(**inputs_of(seed + 1))[0])
            computed += slots_of(recording)

        return run

    runs = [nested(compiled, other, 1), nested(other, compiled, 2), nested(compiled, other, 3)]
    expected = alone(runs)
    check(in_tasks(runs, [number for _ in range(4) for number in range(3)]), expected)
    for _ in range(3):
        check(in_threads(runs), expected)
