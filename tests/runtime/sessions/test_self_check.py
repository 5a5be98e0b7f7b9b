"""Recorded calls are compared with the module itself, bit for bit: the first ones, and those of other sizes."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fisedit_compiler import SparseModule, SparsifyConfig, sparsify
from fisedit_compiler.capture.keys import structure
from fisedit_compiler.compiling import COMPILING
from fisedit_compiler.errors import CaptureError, RecordingError
from fisedit_compiler.runtime.execution.executable import Executable
from fisedit_compiler.runtime.sessions import record_session, self_check
from tests.support.zoo import ZOO

SAMPLE = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
MASK = torch.zeros(8, 8, dtype=torch.bool)
MASK[2:5, 3:6] = True


class Scaled(nn.Module):
    """One convolution and a factor that the key knows."""

    def __init__(self, factor: float = 2.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self._factor = factor

    def forward(self, sample: Tensor) -> Tensor:
        return self.conv(sample) * self._factor


class Noting(Scaled):
    """Notes a shape on itself, as CompVis' decoder does."""

    def forward(self, sample: Tensor) -> Tensor:
        self.last_shape = sample.shape
        self._seen = {"size": sample.shape[2:]}
        return super().forward(sample)


class Logging(Scaled):
    """Appends to a list that it never reads."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[int] = []

    def forward(self, sample: Tensor) -> Tensor:
        self.calls.append(1)
        return super().forward(sample)


class Tally:
    def __init__(self) -> None:
        self.calls, self.sizes = 0, {"first": 1.0}


HISTORY: list[Any] = []
TALLY = Tally()


class LoggingElsewhere(Scaled):
    """Keeps count on an object, in a dictionary of it that grows, and in a global list that it fills with sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.tally = Tally()

    def forward(self, sample: Tensor) -> Tensor:
        self.tally.calls += 1
        TALLY.calls += 1
        self.tally.sizes[f"call {TALLY.calls}"] = sample.shape[2]
        HISTORY.append(tuple(sample.shape))
        return super().forward(sample) * self.tally.sizes["first"]


class Counting(Scaled):
    """Depends on how often it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def forward(self, sample: Tensor) -> Tensor:
        self.count += 1
        return super().forward(sample) * self.count


def compiled(module: nn.Module, **options: Any) -> SparseModule:
    torch.manual_seed(0)
    config = SparsifyConfig(multiple=1, dense_above=1.0, cache=False, **options)
    return sparsify(module.eval(), config, example_inputs={"sample": SAMPLE})


def recorded(module: SparseModule) -> tuple[Any, Tensor]:
    with module.record() as recording:
        output = module(SAMPLE)
    return recording, output


def test_it_is_compared_at_the_first_call_of_every_recording_and_at_every_new_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module, compared = compiled(Scaled()), list[int]()
    own = self_check._own_outputs

    def counted(*args: Any) -> Any:
        compared.append(number)
        return own(*args)

    monkeypatch.setattr(self_check, "_own_outputs", counted)
    for _ in range(2):
        with module.record():
            for number, sample in enumerate((SAMPLE, SAMPLE, SAMPLE[:1], SAMPLE, SAMPLE[:1, :, :4], SAMPLE[:1])):  # noqa: B007
                module(sample)
    assert compared == [0, 2, 4, 0]


SIZES: dict[str, Callable[[Tensor], float]] = {
    "height and width": lambda sample: 2.0 if sample.shape[2] > sample.shape[3] else 1.0,
    "batch of one": lambda sample: 2.0 if sample.shape[0] == 1 else 1.0,
    "text of a shape": lambda sample: {"4": 2.0}.get(f"{sample.shape[3]}", 1.0),
    "sorted shape": lambda sample: 1.0 if sorted(sample.shape)[-1] == sample.shape[3] else 2.0,
    "odd sizes": lambda sample: 1.0 if sample.shape[2] % 2 == 0 else 2.0,
}


class Branching(Scaled):
    def __init__(self, case: str) -> None:
        super().__init__()
        self.case = case

    def forward(self, sample: Tensor) -> Tensor:
        return super().forward(sample) * SIZES[self.case](sample)


@pytest.mark.parametrize("case", SIZES)
def test_a_branch_on_sizes_is_right_or_refused_at_the_size_that_takes_it(case: str) -> None:
    try:
        module = compiled(Branching(case))
    except CaptureError:
        return
    shapes = [(2, 4, 8, 8), (1, 4, 8, 8), (2, 4, 8, 4), (2, 4, 4, 8), (2, 4, 7, 8), (3, 4, 12, 16)]
    refused = 0
    for shape in shapes:
        for first in (torch.randn(shape), SAMPLE):
            try:
                with module.record():
                    outputs = [(sample, module(sample)) for sample in (first, torch.randn(shape))]
            except CaptureError as error:
                assert "branch on sizes" in str(error)
                refused += 1
                continue
            assert all(torch.equal(output, module.original(sample)) for sample, output in outputs)
    assert refused


def test_what_the_key_misses_is_found_at_the_next_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    """The new recording is right, and the former one is not edited with the program of the new one."""
    monkeypatch.setattr(structure, "_SILENT", structure._SILENT | {"_factor"})
    module = compiled(Scaled())
    recording, output = recorded(module)
    module.original._factor = 3.0
    again, other = recorded(module)
    assert torch.equal(other, module.original(SAMPLE)) and not torch.equal(other, output)
    with module.edit(again, MASK):
        assert torch.allclose(module(SAMPLE), other, atol=1e-6)
    with pytest.raises(RecordingError, match="of another model"), module.edit(recording, MASK):
        pass


def test_what_the_key_misses_within_a_recording_is_refused_where_it_is_compared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(structure, "_SILENT", structure._SILENT | {"_factor"})
    module = compiled(Scaled())
    with pytest.raises(CaptureError, match="something else than its captured graph"), module.record():
        module(SAMPLE)
        module.original._factor = 3.0
        module(SAMPLE[:1])


def test_a_program_of_another_module_is_captured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key that misses something serves the wrong program: the check finds it, and the second capture is right."""
    monkeypatch.setattr(structure, "_SILENT", structure._SILENT | {"_factor"})
    module = compiled(Scaled())
    module.original._factor = 3.0
    recording, output = recorded(module)
    assert torch.equal(output, module.original(SAMPLE))
    with module.edit(recording, MASK):
        assert torch.allclose(module(SAMPLE), output, atol=1e-6)


def test_a_wrong_entry_on_disk_is_replaced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FISEDIT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(structure, "_SILENT", structure._SILENT | {"_factor"})

    def made(factor: float) -> SparseModule:
        torch.manual_seed(0)
        config = SparsifyConfig(multiple=1, dense_above=1.0)
        return sparsify(Scaled(factor).eval(), config, example_inputs={"sample": SAMPLE})

    recorded(made(2.0))
    for _ in range(2):
        module = made(3.0)
        assert torch.equal(recorded(module)[1], module.original(SAMPLE))


def test_a_second_difference_is_an_error_that_names_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    module = compiled(Scaled())
    interpret = Executable.interpret

    def wrong(self: Executable, *args: Any, **kwargs: Any) -> Any:
        outputs, slots = interpret(self, *args, **kwargs)
        return [output + 1 for output in outputs], slots

    monkeypatch.setattr(Executable, "interpret", wrong)
    with pytest.raises(CaptureError, match=r"Scaled computes something else than its captured graph \(output 0"):
        recorded(module)
    monkeypatch.undo()
    assert torch.equal(recorded(module)[1], module.original(SAMPLE)), "the module stays usable"


@pytest.mark.parametrize("build", [Noting, Logging, LoggingElsewhere])
def test_what_a_forward_only_writes_does_not_spoil_its_recordings(build: Callable[[], nn.Module]) -> None:
    module = compiled(build())
    recording, output = recorded(module)
    for _ in range(3):
        module.original(SAMPLE[:1])
        module(SAMPLE)
        with module.edit(recording, MASK):
            assert torch.allclose(module(SAMPLE), output, atol=1e-6)
    assert len(module.programs) == 1
    assert recorded(module)[0].model == recording.model


def test_what_a_forward_reads_beside_its_notes_is_still_watched() -> None:
    module = compiled(LoggingElsewhere())
    recording, output = recorded(module)
    module.original.tally.sizes["first"] = 2.0
    with pytest.raises(RecordingError, match="of another model"), module.edit(recording, MASK):
        pass
    again = recorded(module)[1]
    assert torch.equal(again, module.original(SAMPLE)) and not torch.equal(again, output)


def test_a_note_holds_no_symbolic_size_after_capture() -> None:
    module = compiled(Noting())
    assert not hasattr(module.original, "last_shape")


def test_a_forward_that_depends_on_what_it_wrote_is_refused() -> None:
    module = compiled(Counting())
    with pytest.raises(CaptureError, match=r"writes to what it reads: count"):
        recorded(module)


def test_random_numbers_go_on_as_if_nothing_was_checked() -> None:
    module = compiled(Scaled())
    torch.manual_seed(5)
    recorded(module)
    after = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(3))


def test_outputs_that_are_no_numbers_are_compared_too() -> None:
    module = compiled(Scaled(float("nan")))
    _, output = recorded(module)
    assert output.isnan().all()


class Unrepeatable(Scaled):
    """Adds noise that no random state of torch governs."""

    def __init__(self) -> None:
        super().__init__()
        self.noise = random.Random(0)

    def forward(self, sample: Tensor) -> Tensor:
        return super().forward(sample) + self.noise.random()


class UnrepeatableUnseen(Scaled):
    """Adds noise whose source hangs on nothing that the key reads."""

    def forward(self, sample: Tensor) -> Tensor:
        return super().forward(sample) + random.random()


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (Unrepeatable, r"Unrepeatable may compute something else at every call \(it draws from noise\)"),
        (UnrepeatableUnseen, "UnrepeatableUnseen computes something else at every call with the same arguments"),
    ],
)
def test_a_module_that_computes_something_else_at_every_call_is_named_so(
    build: Callable[[], nn.Module], words: str
) -> None:
    sparse = compiled(build())
    with pytest.raises(CaptureError, match=words), sparse.record():
        sparse(SAMPLE)


def test_no_other_thread_compiles_while_it_compares(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports turn oneDNN off for the whole process, so a convolution beside one differs in its last bits."""
    held = []

    class Watched(Scaled):
        def forward(self, sample: Tensor) -> Tensor:
            thread = threading.Thread(target=lambda: held.append(not COMPILING.acquire(blocking=False)))
            if not torch.compiler.is_compiling():
                thread.start()
                thread.join()
            return super().forward(sample)

    sparse = compiled(Watched())
    held.clear()
    with sparse.record():
        sparse(SAMPLE)
    assert held and all(held)


def test_one_bit_is_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    interpret = Executable.interpret

    def off_by_one_bit(self: Executable, *args: Any, **kwargs: Any) -> Any:
        outputs, slots = interpret(self, *args, **kwargs)
        outputs[0].view(-1)[3:4].view(torch.int32).bitwise_xor_(1)
        return outputs, slots

    sparse = compiled(Scaled())
    monkeypatch.setattr(Executable, "interpret", off_by_one_bit)
    with pytest.raises(CaptureError, match="also when captured again"), sparse.record():
        sparse(SAMPLE)


@pytest.mark.parametrize("given", ["right", "one bit off", "another number", "none"])
def test_outputs_that_are_known_are_compared(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``record(outputs=...)``: what the module gave is compared instead of calling it again."""
    model = ZOO["plain_conv"]()
    inputs = model.make_inputs(1, 8, 8)
    compiled = sparsify(model.module, SparsifyConfig(multiple=model.multiple, cache=False), example_inputs=inputs)
    checked: list[Any] = []
    original = record_session.record_checked

    def counting(*arguments: Any, **options: Any) -> Any:
        checked.append(arguments)
        return original(*arguments, **options)

    monkeypatch.setattr(record_session, "record_checked", counting)
    with torch.no_grad():
        own = compiled(**inputs)
        outputs = {"right": [own], "one bit off": [own.nextafter(own + 1)], "another number": [own, own], "none": None}
        with compiled.record(outputs=outputs["right"]):
            compiled(**inputs)
        assert len(checked) == 1, "a program is compared with the module once in any case"
        with compiled.record(outputs=outputs[given]) as recording:
            assert torch.equal(compiled(**inputs), own)
    assert recording.complete and len(checked) == (1 if given == "right" else 2)
