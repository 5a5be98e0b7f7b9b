"""Dense calls as compiled code: from which run of a size on, whose tensors they give, and what if they cannot be."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextvars import Context
from typing import Any

import pytest
import torch
from torch import Tensor

from fisedit_compiler import Recording, SparseModule, SparsifyConfig, sparsify
from fisedit_compiler.kernels.tolerances import assert_close
from fisedit_compiler.runtime.execution import dense_graphs
from fisedit_compiler.runtime.execution.dense_graphs import KEPT, DenseGraphs, device_of
from tests.support.compiled import box
from tests.support.graph_stand_in import Compiler, patch_cuda
from tests.support.zoo import ZOO, Inputs

SIZE = (16, 24)
MASK = box(0, 0, 8, 8, SIZE[0], SIZE[1])
CALLS = 2


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    found = Compiler()
    patch_cuda(monkeypatch, found)
    return found


def made(**config: Any) -> SparseModule:
    return sparsify(ZOO["plain_conv"]().module, SparsifyConfig(**config))


def inputs(seed: int = 0, size: tuple[int, int] = SIZE) -> Inputs:
    return ZOO["plain_conv"]().make_inputs(2, *size, seed)


def record(module: SparseModule, size: tuple[int, int] = SIZE) -> tuple[Recording, list[Tensor]]:
    with module.record() as recording:
        outputs = [output(module(**inputs(seed, size))) for seed in range(CALLS)]
    return recording, outputs


def output(result: Any) -> Tensor:
    found: Tensor = result if isinstance(result, Tensor) else result[0]
    return found


def edit(module: SparseModule, recording: Recording, mask: Tensor | None, calls: list[Inputs]) -> Any:
    """The session of an edit, and what its calls gave."""
    with module.edit(recording, mask) as session:
        return session, [output(module(**call)) for call in calls]


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        entry.getMessage()
        for entry in caplog.records
        if entry.levelno >= logging.WARNING and entry.name.startswith("fisedit_compiler")
    ]


# -- when -------------------------------------------------------------------------------------------------


def test_the_second_run_of_a_size_is_compiled_and_all_its_calls_are_alike(compiler: Compiler) -> None:
    compiler.change = lambda results: [value * (1 + 1e-6) for value in results]
    module = made()
    first, plain = record(module)
    assert compiler.dense == [], "a run of a size that may not come again waits for nothing"
    second, outputs = record(module)
    assert len(compiler.dense) == 1
    for now, then, call, before in zip(outputs, plain, second, first, strict=True):
        assert_close(now, then, torch.float32)
        assert not torch.equal(now, then), "every call is the compiled one, also the one that was compared"
        assert call.slots.keys() == before.slots.keys()
        assert now.stride() == then.stride()
        for name in call.slots:
            assert_close(call.slots[name], before.slots[name], torch.float32)
            assert call.slots[name].stride() == before.slots[name].stride()
    record(module, (24, 16))
    assert len(compiler.dense) == 1
    record(module, (24, 16))
    record(module)
    assert len(compiler.dense) == 2


def test_on_a_cpu_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda *args, **options: pytest.fail("compiled on a CPU"))
    module = made()
    (_, first), (_, second) = record(module), record(module)
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


def test_few_sizes_are_kept(compiler: Compiler) -> None:
    module = made()
    sizes = [(16, 16), (16, 24), (24, 16)]
    for size in sizes:
        record(module, size)
        record(module, size)
    (executable,) = module._programs.executables()
    assert len(sizes) > KEPT == len(executable.dense._captured)


# -- what -------------------------------------------------------------------------------------------------


def test_a_recording_is_its_own_and_can_be_edited(compiler: Compiler) -> None:
    module = made()
    record(module)
    recording, outputs = record(module)
    kept = [{name: value.clone() for name, value in call.slots.items()} for call in recording]
    record(module)
    for call, values in zip(recording, kept, strict=True):
        for name, value in values.items():
            assert torch.equal(call.slots[name], value), name
            assert call.slots[name].untyped_storage().nbytes() == value.nbytes, "nothing else is kept alive"
    _, edited = edit(module, recording, MASK, [inputs(seed + 5) for seed in range(CALLS)])
    for now, then in zip(edited, outputs, strict=True):
        assert torch.equal(now[..., ~MASK], then[..., ~MASK]) and not torch.equal(now, then)


def test_calls_above_the_break_even_and_those_that_look_for_a_mask_run_the_same_code(compiler: Compiler) -> None:
    compiler.change = lambda results: [value * (1 + 1e-6) for value in results]
    module = made(dense_above=0.1)
    recording, _ = record(module)
    others = [inputs(seed + 5) for seed in range(CALLS)]
    session, edited = edit(module, recording, MASK, others)
    assert session.fallback is not None and len(compiler.dense) == 1, "an edit that runs densely is a run, too"
    plain = [output(module.original(**call)) for call in others]
    for now, then in zip(edited, plain, strict=True):
        assert_close(now[..., MASK], then[..., MASK], torch.float32)
        assert not torch.equal(now[..., MASK], then[..., MASK])
    _, looked = edit(module, recording, None, others)
    assert_close(looked[0], plain[0], torch.float32)
    assert len(compiler.dense) == 1


def test_looking_for_a_mask_never_compiles_and_computes_the_whole_batch_where_that_is_compiled(
    compiler: Compiler,
) -> None:
    module = made()
    recording, _ = record(module)
    halves = [inputs(seed) for seed in range(CALLS)]
    for half in halves:
        half["sample"] = torch.cat([half["sample"][:1], inputs(3)["sample"][1:]])
    for _ in range(3):
        session, _ = edit(module, recording, None, halves)
        assert session.computed_samples[0] == 1 and compiler.dense == []
    recording, _ = record(module)
    session, found = edit(module, recording, None, halves)
    assert session.computed_samples[0] == 2 and len(compiler.dense) == 1
    assert_close(found[0], output(module.original(**halves[0])), torch.float32)


def test_calls_whose_maps_are_kept_are_interpreted_and_the_others_compiled(compiler: Compiler) -> None:
    compiler.change = lambda results: [value * (1 + 1e-6) for value in results]
    model = ZOO["sd15"]()
    module = sparsify(model.module, SparsifyConfig())
    calls = [model.make_inputs(1, 16, 16, seed) for seed in range(CALLS)]
    plain = [output(module.original(**call)) for call in calls]
    for _ in range(2):
        with module.record(maps=1) as recording:
            outputs = [output(module(**call)) for call in calls]
    assert len(compiler.dense) == 1
    assert recording.calls[0].maps and not recording.calls[1].maps
    assert torch.equal(outputs[0], plain[0]) and not torch.equal(outputs[1], plain[1])
    assert_close(outputs[1], plain[1], torch.float32)


def test_weights_that_were_exchanged_are_followed(compiler: Compiler) -> None:
    module = made()
    record(module)
    record(module)
    weights = next(iter(module.original.parameters()))
    with torch.no_grad():
        weights.mul_(2.0)
    _, written = record(module)
    assert_close(written[0], output(module.original(**inputs(0))), torch.float32)
    for name, parameter in list(module.original.named_parameters()):
        owner = module.original.get_submodule(name.rpartition(".")[0])
        setattr(owner, name.rpartition(".")[2], torch.nn.Parameter(3 * parameter.detach()))
    _, exchanged = record(module)
    assert not torch.equal(written[0], exchanged[0]) and len(compiler.dense) == 1
    assert_close(exchanged[0], output(module.original(**inputs(0))), torch.float32)


@pytest.mark.parametrize("write", [lambda weight: weight.mul_(-2), lambda weight: weight.data.mul_(-2)])
def test_code_of_packed_weights_follows_what_is_written_to_them(
    write: Callable[[Tensor], Any], compiler: Compiler
) -> None:
    module = made()
    record(module)
    record(module)
    (executable,) = module._programs.executables()
    ((_, captured),) = executable.dense._captured.items()
    assert captured.form.packed and len(captured.weights.read) == len(captured.form.packed)
    first = [output(module.original(**inputs(seed))) for seed in range(CALLS)]
    for _ in range(2):  # and back
        with torch.no_grad():
            for name, weight in module.original.named_parameters():
                if name in captured.form.packed:
                    write(weight)
        _, outputs = record(module)
        for seed, now in enumerate(outputs):
            assert_close(now, output(module.original(**inputs(seed))), torch.float32)
        assert not torch.equal(outputs[0], first[0])
    assert len(compiler.dense) == 1


def test_weights_are_packed_once_for_sparse_and_dense_calls(compiler: Compiler) -> None:
    module = made()
    recording, _ = record(module)
    edit(module, recording, MASK, [inputs(seed + 5) for seed in range(CALLS)])
    record(module)
    (executable,) = module._programs.executables()
    assert executable.hoisted.computed["weights"] == 1
    ((_, captured),) = executable.dense._captured.items()
    hoisted = executable._hoisted(executable.hoisted, inputs(), {}, None, weights_only=True)
    names = executable.program.packed_weights
    for path, value in zip(captured.form.packed, captured.weights.read, strict=True):
        assert value is hoisted[names[path]]


# -- what if not ------------------------------------------------------------------------------------------


def _broken(results: list[Any]) -> list[Any]:
    raise RuntimeError("kernel 17 is broken")


def _wrong(results: list[Any]) -> list[Any]:
    return [*results[:-1], results[-1] + 0.1]


def _reshaped(results: list[Any]) -> list[Any]:
    return [results[0][:1], *results[1:]]


def _not_a_number(results: list[Any]) -> list[Any]:
    return [results[0] * float("nan"), *results[1:]]


@pytest.mark.parametrize("change", [_broken, _wrong, _reshaped, _not_a_number])
def test_code_that_fails_or_is_wrong_is_not_used_and_one_warning_says_so(
    change: Callable[[list[Any]], list[Any]], compiler: Compiler, caplog: pytest.LogCaptureFixture
) -> None:
    compiler.change = change
    module = made()
    for _ in range(3):
        recording, outputs = record(module)
        plain = [output(module.original(**inputs(seed))) for seed in range(CALLS)]
        assert all(torch.equal(*pair) for pair in zip(outputs, plain, strict=True))
    assert len(compiler.dense) == 1
    (told,) = warnings_in(caplog)
    assert "interpreted from now on, which is slower and gives the same results" in told
    _, edited = edit(module, recording, MASK, [inputs(seed + 5) for seed in range(CALLS)])
    assert torch.equal(edited[0][..., ~MASK], outputs[0][..., ~MASK])


def test_code_that_took_an_argument_for_a_constant_is_not_used(
    compiler: Compiler, caplog: pytest.LogCaptureFixture
) -> None:
    first: list[list[Any]] = []

    def constant(results: list[Any]) -> list[Any]:
        first.append(results)
        return first[0]

    compiler.change = constant
    module = made()
    record(module)
    _, outputs = record(module)
    for seed, now in enumerate(outputs):
        assert torch.equal(now, output(module.original(**inputs(seed))))
    (told,) = warnings_in(caplog)
    assert "differs by" in told


def test_runs_that_a_compilation_never_pays_for_are_interpreted(compiler: Compiler) -> None:
    """A decoder makes one call a run, of which its pipeline has the outputs already."""
    module = made()
    for seed in range(4):
        given = inputs(seed)
        with module.record(outputs=[output(module.original(**given))]) as recording:
            module(**given)
    full = box(0, 0, *SIZE, *SIZE)
    for _ in range(4):
        edit(module, recording, full, [inputs(9)])
    assert not compiler.dense


def test_a_call_runs_where_an_argument_is_that_is_not_on_the_cpu() -> None:
    there = torch.empty(2, device="meta")
    assert device_of([torch.ones(()), there]).type == "meta" and device_of([there, torch.ones(())]).type == "meta"
    assert device_of([torch.ones(2)]).type == "cpu"


def test_ctrl_c_while_it_is_compiled_ends_the_run_and_the_next_one_compiles(compiler: Compiler) -> None:
    def interrupted(results: list[Any]) -> list[Any]:
        raise KeyboardInterrupt

    module = made()
    record(module)
    compiler.change = interrupted
    with pytest.raises(KeyboardInterrupt):
        record(module)
    compiler.change = lambda results: results
    recording, outputs = record(module)
    assert recording.complete and len(compiler.dense) == 2
    assert_close(outputs[0], output(module.original(**inputs(0))), torch.float32)


def test_results_that_are_not_finite_in_both_are_no_fault_of_the_code() -> None:
    from fisedit_compiler.runtime.execution import dense_graphs

    nan = torch.tensor([1.0, float("nan")])
    dense_graphs._compare([nan, 3], [nan.clone(), 3])
    with pytest.raises(ValueError, match="result 0 differs"):
        dense_graphs._compare([torch.ones(3)], [nan.new_tensor([1.0, float("nan"), 1.0])])
    half = torch.linspace(1, 2, 64, dtype=torch.float16)
    dense_graphs._compare([half, half.float()], [half, half.float() * 1.01])
    with pytest.raises(ValueError, match="result 1 differs"):
        dense_graphs._compare([half, half.float()], [half, half.float() * 1.1])
    with pytest.raises(ValueError, match="result 1 differs"):
        dense_graphs._compare([torch.ones(3), torch.tensor([1])], [torch.ones(3), torch.tensor([2])])


def test_nothing_is_expected_of_sizes_that_no_run_had() -> None:
    graphs = DenseGraphs("a model")
    assert not graphs.expect([torch.ones(2)]) and not graphs.expect([torch.ones(3)])
    assert not graphs.expect([torch.ones(2, dtype=torch.float64)])
    assert graphs.expect([torch.ones(2)]) and not graphs.know([torch.ones(2)])


def test_a_run_goes_on_as_it_began_though_another_one_compiles(compiler: Compiler) -> None:
    compiler.change = lambda results: [value * (1 + 1e-6) for value in results]
    module = made()
    plain = [output(module.original(**inputs(seed))) for seed in range(CALLS)]

    def other_run() -> None:
        record(module)
        record(module)

    with module.record():
        first = output(module(**inputs(0)))
        Context().run(other_run)
        second = output(module(**inputs(1)))
    assert len(compiler.dense) == 1
    assert torch.equal(first, plain[0]) and torch.equal(second, plain[1])


# -- on a GPU ---------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["sd15", "vae_decoder"])
def test_on_a_gpu_a_recording_is_that_of_the_interpreted_graph(name: str, caplog: pytest.LogCaptureFixture) -> None:
    model = ZOO[name]()
    module = model.module.to("cuda", torch.float16)
    compiled = sparsify(module, SparsifyConfig(norm="incremental"))

    def on_gpu(seed: int) -> Inputs:
        given = model.make_inputs(2, 24, 40, seed)
        return {
            name: value.to("cuda", torch.float16) if isinstance(value, Tensor) and value.is_floating_point() else value
            for name, value in given.items()
        }

    def run() -> tuple[Recording, list[Tensor]]:
        with compiled.record() as recording:
            outputs = [output(compiled(**on_gpu(seed))) for seed in range(CALLS)]
        return recording, outputs

    (plain, expected), (recording, outputs) = run(), run()
    (executable,) = compiled._programs.executables()
    assert executable.dense._captured and not warnings_in(caplog)
    for now, then in zip(outputs, expected, strict=True):
        assert_close(now, then, torch.float16)
    for call, before in zip(recording, plain, strict=True):
        for slot, value in before.slots.items():
            assert call.slots[slot].stride() == value.stride(), slot
            norm = torch.linalg.vector_norm(value.float()).clamp_min(1e-6)
            assert torch.linalg.vector_norm(call.slots[slot].float() - value.float()) / norm < 0.03, slot


def test_what_is_finite_is_compared_beside_what_is_not() -> None:
    inf, nan = float("inf"), float("nan")
    interpreted = torch.tensor([-inf, nan, 1.0, 2.0])
    for others in ([-inf, nan], [nan, 3.0]):
        dense_graphs._compare([interpreted], [torch.tensor([*others, 1.0, 2.0])])
        with pytest.raises(ValueError, match=r"result 0 differs by 1\.3 of its norm"):
            dense_graphs._compare([interpreted], [torch.tensor([*others, 1.0, 5.0])])
    with pytest.raises(ValueError, match="result 0 differs by nan"):
        dense_graphs._compare([torch.ones(2)], [torch.tensor([1.0, nan])])
