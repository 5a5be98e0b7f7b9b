"""First uses in several threads: one compiles, the others wait, and every result is right."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fisedit_compiler import Editor, SparseModule, SparsifyConfig, compiling, dynamo, sparsify
from fisedit_compiler.compiling import COMPILING, alone, computing, made_once
from fisedit_compiler.lowering import program
from tests.support.compiled import HEIGHT, WIDTH, box, model_and_compiled
from tests.support.runs import WAIT, together
from tests.support.tiny_pipeline import make_tiny_pipeline
from tests.support.zoo import ZOO

MASK = box(4, 6, 11, 15)


class Watched:
    """Counts captures, and how many threads capture at once."""

    def __init__(self, capture: Callable[..., Any]) -> None:
        self.capture, self.calls, self.now, self.most = capture, 0, 0, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            return self.capture(*args, **kwargs)
        finally:
            self.now -= 1


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> Watched:
    watched = Watched(program.capture)
    monkeypatch.setattr(program, "capture", watched)
    return watched


def record_and_edit(compiled: SparseModule, sample: Tensor) -> tuple[Tensor, Tensor]:
    with compiled.record() as recording:
        base = compiled(sample)
    with compiled.edit(recording, MASK):
        return base, compiled(torch.where(MASK, -sample, sample))


def test_first_uses_of_two_models(captures: Watched) -> None:
    models = [ZOO["plain_conv"]() for _ in range(4)]
    sample = models[0].make_inputs(2, HEIGHT, WIDTH)["sample"]

    def first_use(number: int) -> tuple[Tensor, Tensor]:
        config = SparsifyConfig(multiple=models[0].multiple, cache=False, dense_above=1.0)
        return record_and_edit(sparsify(models[number].module, config), sample)

    results = together([lambda number=number: first_use(number) for number in range(len(models))])
    assert captures.calls == len(models) and captures.most == 1
    expected = record_and_edit(model_and_compiled("plain_conv")[1], sample)
    for base, edited in results:
        assert torch.equal(base, expected[0])
        torch.testing.assert_close(edited, expected[1])


def test_first_uses_of_one_model(captures: Watched) -> None:
    model = ZOO["plain_conv"]()
    inputs = model.make_inputs(2, HEIGHT, WIDTH)
    compiled = sparsify(model.module, SparsifyConfig(multiple=model.multiple, cache=False))
    first, second = together([lambda: compiled._programs.prepare(inputs)] * 2)
    assert first is second and captures.calls == 1 and len(compiled.programs) == 1
    graphs = together([lambda: (first.interpreted_step(), first.program.maps)] * 2)
    assert graphs[0][0] is graphs[1][0] and graphs[0][1] is graphs[1][1]


def test_a_first_use_that_fails_leaves_the_others_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several that wait for one program the next one compiles it."""
    model = ZOO["plain_conv"]()
    sample = model.make_inputs(2, HEIGHT, WIDTH)["sample"]
    compiled = sparsify(model.module, SparsifyConfig(multiple=model.multiple, cache=False, dense_above=1.0))
    capture, attempts = program.capture, list[int]()

    def fails_once(*arguments: Any) -> Any:
        attempts.append(len(attempts))
        if len(attempts) == 1:
            raise RuntimeError("this export failed")
        return capture(*arguments)

    def use() -> tuple[Tensor, Tensor] | None:
        try:
            return record_and_edit(compiled, sample)
        except RuntimeError as error:
            assert "this export failed" in str(error)
            return None

    monkeypatch.setattr(program, "capture", fails_once)
    results = together([use] * 3)
    assert len(attempts) == 2 and len(compiled.programs) == 1
    assert sum(result is None for result in results) == 1
    base, edited = record_and_edit(compiled, sample)
    for result in results:
        assert result is None or (torch.equal(result[0], base) and torch.equal(result[1], edited))


def test_an_editor_compiles_once(captures: Watched) -> None:
    editor = Editor(make_tiny_pipeline(), SparsifyConfig(cache=False), progress=False)
    first, second = together([lambda: editor.compiled] * 2)
    assert first is second is editor.pipe.unet and captures.calls == 1


def test_the_second_door_compiles_once(captures: Watched) -> None:
    sample = torch.zeros(1, 4, HEIGHT, WIDTH)
    compiled: Any = torch.compile(ZOO["plain_conv"]().module, backend="fisedit", options={"cache": False})
    first, second = together([lambda: dynamo.sparse_module(compiled)] * 2)
    assert first is second
    together([lambda: first._programs.prepare({"sample": sample})] * 2)
    assert captures.calls == 1


def test_calls_of_compiled_modules_do_not_wait() -> None:
    model, compiled = model_and_compiled("plain_conv")
    sample = model.make_inputs(2, HEIGHT, WIDTH)["sample"]
    record_and_edit(compiled, sample)
    done, results = threading.Event(), []

    def run() -> None:
        results.append(record_and_edit(compiled, sample))
        done.set()

    with COMPILING:  # as somebody who compiles does
        thread = threading.Thread(target=run)
        thread.start()
        assert done.wait(timeout=120)
    thread.join()
    assert len(results) == 1


def test_what_is_made_once_is_made_by_one_thread() -> None:
    made: list[object] = []

    def make() -> object:
        made.append(object())
        return made[-1]

    known: dict[str, object] = {}
    results = together([lambda: made_once(known, "key", make)] * 8)
    assert len(made) == 1 and all(result is made[0] for result in results)


# -- who is alone ----------------------------------------------------------------------------------------


def test_whoever_is_alone_waits_for_those_who_compute_and_they_for_it() -> None:
    begun, events = threading.Event(), list[str]()

    def calls() -> None:
        with computing(), computing():
            begun.set()
            events.append("called")
        with computing():
            events.append("called")

    def captures() -> None:
        begun.wait(WAIT)
        with alone(), alone():
            events.append("captures")
            with computing():
                made_once({}, "key", object)
            events.append("captured")

    together([calls, captures, captures])
    assert [events.index("captures"), events.count("captured")] == [events.index("captured") - 1, 2]
    assert events.index("called") == 0


def test_a_module_in_no_mode_waits_for_who_is_alone_though_something_is_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What torch says of a compilation is said to all threads."""
    model = ZOO["plain_conv"]()
    module, inputs = sparsify(model.module), model.make_inputs(2, HEIGHT, WIDTH)
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)
    begun, over = threading.Event(), threading.Event()

    def called() -> None:
        begun.wait(WAIT)
        module(**inputs)
        assert over.is_set()

    def exports() -> None:
        with alone():
            begun.set()
            time.sleep(0.2)
            over.set()

    together([called, exports])


def test_who_waits_to_compile_is_not_computing() -> None:
    """Else whoever compiles and wants to be alone would wait for it for ever."""
    held, waiting = threading.Event(), threading.Event()

    def first() -> None:
        with COMPILING:
            held.set()
            waiting.wait(WAIT)
            with alone():
                pass

    def second() -> None:
        held.wait(WAIT)
        with computing(), computing():
            waiting.set()
            made_once({}, "key", object)
            assert _is_computing()

    together([first, second])


def _is_computing() -> bool:
    lock: Any = computing()
    return bool(lock._is_owned())


def test_a_thread_that_an_interrupt_kept_computing_stops_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "LOOK", 0.01)
    interrupted, over = threading.Event(), threading.Event()

    def leaves_it_locked() -> None:
        lock: Any = computing()
        lock.acquire()
        interrupted.set()
        over.wait(WAIT)
        with computing():  # and goes on as any other thread
            pass

    def captures() -> None:
        interrupted.wait(WAIT)
        with alone():
            over.set()

    together([leaves_it_locked, captures])
