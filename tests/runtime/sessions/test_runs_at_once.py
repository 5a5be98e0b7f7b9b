"""Runs at once on one set of weights compute what each computes alone, bit for bit, whoever's call is next."""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fisedit_compiler import Recording, SparseModule, SparsifyConfig, sparsify
from fisedit_compiler.errors import CaptureError, RecordingError
from fisedit_compiler.lowering import program
from fisedit_compiler.runtime.sessions.edit_session import EditSession
from tests.support.compiled import HEIGHT, WIDTH, box, model_and_compiled, other_text
from tests.support.runs import (
    CALLS,
    WAIT,
    Run,
    alone,
    calls_of,
    check,
    dense,
    edit,
    in_tasks,
    in_threads,
    record,
    recorded,
    stops,
    together,
)
from tests.support.zoo import ZOO, Inputs

MASK = box(4, 6, 11, 15)
OTHER_MASK = box(0, 0, 6, 9)
SMALL = (8, 16)


@pytest.fixture(scope="module")
def runs() -> Sequence[Run]:
    """Of every kind: recordings, edits of different recordings, masks, sizes and batches, edits in turn, no mode."""
    model, compiled = model_and_compiled("sd15")
    inputs, small = model.make_inputs(2, HEIGHT, WIDTH), model.make_inputs(1, *SMALL)
    base, other = recorded(compiled, inputs), recorded(compiled, small)
    pair = {name: inputs[name].repeat_interleave(2, 0) for name in ("sample", "encoder_hidden_states")}
    return [
        record(compiled, other_text(inputs, 3)),
        record(compiled, small, maps=1),
        edit(compiled, base, other_text(inputs, 4), MASK),
        edit(compiled, base, other_text(inputs, 5), OTHER_MASK, record=True),
        edit(compiled, base, other_text(inputs, 6), MASK, late=True),
        edit(compiled, base, other_text({**inputs, **pair}, 7), [MASK, OTHER_MASK], copies=2, record=True),
        edit(compiled, other, other_text(small, 8), box(1, 2, 5, 9, *SMALL)),
        dense(compiled, other_text(inputs, 9)),
    ]


@pytest.fixture(scope="module")
def expected(runs: Sequence[Run]) -> list[list[Tensor]]:
    return alone(runs)


def forget() -> None:
    """Nothing that runs share is there already."""
    for executable in model_and_compiled("sd15")[1]._programs.executables():
        executable.hoisted.clear()
        executable.plans.recent.clear()


HOWS = [in_threads, in_tasks]


@pytest.mark.parametrize("how", HOWS)
@given(data=st.data())
@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whoevers_call_is_next(
    how: Callable[..., list[list[Tensor]]], data: st.DataObject, runs: Sequence[Run], expected: list[list[Tensor]]
) -> None:
    chosen = data.draw(st.lists(st.sampled_from(range(len(runs))), min_size=2, max_size=4))
    some = [runs[number] for number in chosen]
    turns = data.draw(st.permutations([number for number, run in enumerate(some) for _ in range(CALLS + 1)]))
    forget()
    check(how(some, turns), [expected[number] for number in chosen])


def test_a_run_stops_after_every_call(runs: Sequence[Run]) -> None:
    assert {stops(run) for run in runs} == {CALLS + 1}


def test_all_at_once(runs: Sequence[Run], expected: list[list[Tensor]]) -> None:
    for _ in range(3):
        forget()
        check(in_threads(runs), expected)


def test_calls_of_a_task_may_be_made_in_other_threads(runs: Sequence[Run], expected: list[list[Tensor]]) -> None:
    """A server's task enters the mode and hands every call to a pool."""
    model, compiled = model_and_compiled("sd15")
    inputs = model.make_inputs(2, HEIGHT, WIDTH)
    base = recorded(compiled, inputs)

    async def request(seed: int, mask: Tensor) -> list[Tensor]:
        with compiled.edit(base, mask):
            return [(await asyncio.to_thread(compiled, **call))[0] for call in calls_of(other_text(inputs, seed))]

    async def serve() -> list[list[Tensor]]:
        return list(await asyncio.gather(request(4, MASK), request(5, OTHER_MASK), request(4, MASK)))

    forget()
    once, other, again = asyncio.run(serve())
    check([once, other, again], [expected[2], expected[3][:CALLS], expected[2]])


# -- first uses ------------------------------------------------------------------------------------------


def test_first_uses_capture_once_and_disturb_nobody(
    monkeypatch: pytest.MonkeyPatch, runs: Sequence[Run], expected: list[list[Tensor]]
) -> None:
    """Beside them runs of another model go on: an export turns oneDNN off for the whole process."""
    captures = []
    capture = program.capture

    def watched(*arguments: Any) -> Any:
        captures.append(arguments[0])
        return capture(*arguments)

    monkeypatch.setattr(program, "capture", watched)
    model = ZOO["plain_conv"]()
    config = SparsifyConfig(multiple=model.multiple, cache=False, dense_above=1.0)
    compiled = sparsify(model.module, config)
    samples = [model.make_inputs(2, HEIGHT, WIDTH, seed)["sample"] for seed in range(3)]

    def first(sample: Tensor) -> Run:
        def run(computed: list[Tensor]) -> Iterator[None]:
            with compiled.record() as recording:
                computed.append(compiled(sample))
            yield
            with compiled.edit(recording, MASK):
                computed.append(compiled(torch.where(MASK, -sample, sample)))

        return run

    fresh = [first(sample) for sample in samples]
    found = in_threads([*fresh, *runs])
    assert captures == [model.module] and len(compiled.programs) == 1
    check(found, [*alone(fresh), *expected])


@pytest.mark.parametrize("mode", ["no mode", "record", "edit"])
def test_nobody_computes_while_a_graph_is_traced(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, compiled = model_and_compiled("plain_conv")
    sample = model.make_inputs(2, HEIGHT, WIDTH)["sample"]
    with compiled.record() as recording:
        compiled(sample)
    modes = {"no mode": nullcontext, "record": compiled.record, "edit": lambda: compiled.edit(recording, MASK)}
    ready, tracing = threading.Event(), threading.Event()
    events: list[str] = []
    export = torch.export.export

    def watched(*arguments: Any, **options: Any) -> Any:
        tracing.set()
        exported = export(*arguments, **options)
        events.append("traced")
        return exported

    def calling() -> None:
        with modes[mode]():
            ready.set()
            tracing.wait(WAIT)
            compiled(sample)
            events.append("called")

    def capturing() -> None:
        ready.wait(WAIT)
        sparsify(ZOO["plain_conv"]().module, config, example_inputs={"sample": sample})

    config = SparsifyConfig(multiple=model.multiple, cache=False)
    monkeypatch.setattr(torch.export, "export", watched)
    together([calling, capturing])
    assert events == ["traced", "called"]


# -- weights ---------------------------------------------------------------------------------------------


def changing() -> tuple[SparseModule, Inputs, Recording]:
    model, shared = model_and_compiled("sd15")
    compiled = copy.deepcopy(shared)
    inputs = model.make_inputs(2, HEIGHT, WIDTH)
    return compiled, inputs, recorded(compiled, inputs)


@pytest.mark.parametrize("mode", ["record", "edit"])
def test_weights_that_another_thread_changes_end_a_run(mode: str) -> None:
    compiled, inputs, base = changing()
    run = record(compiled, inputs) if mode == "record" else edit(compiled, base, other_text(inputs), MASK)
    made = run([])
    next(made)
    with torch.no_grad():
        together([lambda: compiled.original.conv_in.weight.mul_(1.01)])
    with pytest.raises(RecordingError, match=rf"weights changed inside {mode}"):
        next(made)
    recorded(compiled, inputs)


def test_weights_that_came_back_leave_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run hoisted from them while they were others is found by none that follows."""
    compiled, inputs, base = changing()
    text = other_text(inputs, 4)
    (expected,) = alone([edit(compiled, base, text, MASK)])
    (executable,) = compiled._programs.executables()
    executable.hoisted.clear()
    weight = compiled.original.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_k.weight
    kept = weight.detach().clone()
    before = EditSession.before

    def while_it_is_called(session: EditSession) -> None:
        before(session)
        weight.mul_(3.0)

    with torch.no_grad(), monkeypatch.context() as patch, compiled.edit(base, MASK):
        for call in calls_of(text):
            patch.setattr(EditSession, "before", while_it_is_called)
            compiled(**call)
            patch.undo()
            weight.copy_(kept)
    check(alone([edit(compiled, base, text, MASK)]), [expected])


# -- modules that write to themselves ---------------------------------------------------------------------


class Notes(nn.Module):
    """Keeps what it computed last, and reads it back in the same call."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, sample: Tensor) -> Tensor:
        self.kept = self.conv(sample)
        self.shape = tuple(sample.shape)
        return self.kept * 2 + sample


def test_a_forward_that_writes_to_itself_is_right_or_refused() -> None:
    torch.manual_seed(0)
    samples = [torch.randn(1, 3, 8, 8) for _ in range(4)]
    compiled = sparsify(Notes().eval(), SparsifyConfig(cache=False, multiple=1), example_inputs={"sample": samples[0]})
    mask = box(2, 2, 5, 5, 8, 8)

    def run_of(sample: Tensor) -> Run:
        def run(computed: list[Tensor]) -> Iterator[None]:
            with compiled.record() as recording:
                computed.append(compiled(sample))
                yield
            with compiled.edit(recording) as session:
                computed.append(compiled(sample + 1))
            with compiled.edit(recording, mask) as session:
                computed.append(compiled(torch.where(mask, -sample, sample)))
            assert session.call == 1

        return run

    fresh = [run_of(sample) for sample in samples]
    try:
        found = in_threads(fresh)
    except CaptureError as error:
        assert "forward" in str(error)
        return
    check(found, alone(fresh))
