"""The graph pool against the eager step: the same tests with CUDA graphs, and with a stand-in for them on the CPU.

The stand-in "replays" by running again what was captured, on the tensors it was captured with, and reads through the
table of addresses. So it shows whether everything a replay reads was brought to the captured tensors, and, as Dynamo
traces the step, what it would be compiled again for; that kernels and Inductor's code are right, only the ``gpu`` cases
show. Both run the same models, recordings and masks, and share what they compiled as a user's calls do.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fisedit_compiler import SparsifyConfig, sparsify
from fisedit_compiler.kernels.tolerances import TOLERANCES, max_error
from fisedit_compiler.runtime.execution import cuda_graphs, graph_choice
from fisedit_compiler.runtime.execution.owned_outputs import OwnedOutputs
from tests.support.compiled_zoo import make_mask
from tests.support.graph_pair import (
    CALLS,
    MASKS,
    SIZE,
    Pair,
    box,
    forced_block_size,
    make_pair,
    move,
    shared_pair,
)
from tests.support.graph_stand_in import patch_cuda
from tests.support.runs import together
from tests.support.zoo import ZOO, Inputs


def test_edits_are_the_eager_ones_for_every_mask_without_compiling_again(pair: Pair) -> None:
    inputs = pair.inputs()
    recording, base = pair.record(inputs)
    for kind in MASKS:
        mask = make_mask(kind, SIZE, seed=2)
        outputs = pair.check(recording, pair.edited(inputs, mask), mask, kind)
        for output, recorded in zip(outputs, base, strict=True):
            kept = ~mask.to(pair.device)
            assert torch.equal(output[..., kept], recorded[..., kept]), "outside the mask stands the recording"
            assert not torch.equal(output, recorded)


def test_blocks_of_any_size_share_one_compilation(pair: Pair) -> None:
    """Block sizes differ from mask to mask; a step is compiled once, and every size has graphs of its own."""
    inputs = pair.inputs()
    recording, _ = pair.record(inputs)
    graphs = set()
    for kind, size in product(("block", "scattered", "border", "full"), (1, 4, 2, 8)):
        mask = make_mask(kind, SIZE, seed=2)
        with forced_block_size(pair, size):
            pair.check(recording, pair.edited(inputs, mask), mask, (kind, size))
        graphs.add(next(reversed(pair.pool._graphs)))  # the one that was replayed last
    assert len(graphs) == 16


def test_tables_follow_the_mask_within_a_bucket(pair: Pair) -> None:
    inputs = pair.inputs()
    recording, _ = pair.record(inputs)
    masks = [box(8, 8), box(8, 20), box(12, 24), box(8, 8)]
    # How many blocks cover a mask depends on where it lies, how many sites it has does not.
    with forced_block_size(pair, 1):
        pair.check(recording, pair.edited(inputs, masks[0]), masks[0])
        graphs = len(pair.pool._graphs)
        for number, mask in enumerate([*masks, *reversed(masks)]):
            pair.check(recording, pair.edited(inputs, mask), mask, number)
    assert len(pair.pool._graphs) == graphs, "the masks were meant to share one graph"


def test_each_recording_brings_its_own_slots(pair: Pair) -> None:
    mask = box(8, 8)
    runs = [pair.inputs(seed) for seed in (0, 5)]
    recordings = [pair.record(inputs)[0] for inputs in runs]
    results = []
    for number in (0, 1, 0, 1):
        edit = pair.edited(runs[number], mask)
        results.append(pair.check(recordings[number], edit, mask, f"recording {number}"))
    for first, second in zip(results[0], results[2], strict=True):
        assert torch.equal(first, second), "the same edit again"
    assert not torch.equal(results[0][0], results[1][0])


def test_each_prompt_brings_its_own_hoisted_values(pair: Pair) -> None:
    inputs, mask = pair.inputs(), box(8, 8)
    recording, _ = pair.record(inputs)
    edits = [pair.edited(inputs, mask, seed) for seed in (1, 2, 3)]
    results = [pair.check(recording, edits[number], mask, f"prompt {number}") for number in (0, 1, 2, 0, 1)]
    assert torch.equal(results[0][0], results[3][0]) and torch.equal(results[1][0], results[4][0])
    assert not torch.equal(results[0][0], results[1][0])


def test_calls_bring_their_own_timestep(pair: Pair) -> None:
    inputs, mask = pair.inputs(), box(8, 8)
    recording, _ = pair.record(inputs)
    first, second = pair.check(recording, pair.edited(inputs, mask), mask)
    assert not torch.equal(first, second)


def test_outputs_belong_to_the_caller(pair: Pair) -> None:
    inputs, mask = pair.inputs(), box(8, 8)
    recording, _ = pair.record(inputs)
    outputs = pair.check(recording, pair.edited(inputs, mask), mask)
    kept = [output.clone() for output in outputs]
    pair.check(recording, pair.edited(inputs, mask, seed=4), mask)
    for output, copied in zip(outputs, kept, strict=True):
        assert torch.equal(output, copied), "a later call wrote to an earlier result"
        output.zero_()
    pair.check(recording, pair.edited(inputs, mask), mask, "after the caller wrote to its results")


def test_the_pool_is_bounded(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "POOL_SIZE", 2)
    inputs = pair.inputs()
    recording, _ = pair.record(inputs)
    masks = [box(4, 4, size) for size in (4, 8, 12, 16)]
    for mask in [*masks, *masks]:
        pair.check(recording, pair.edited(inputs, mask), mask, int(mask.sum()))
        assert len(pair.pool._graphs) <= 2


def test_plans_outlive_neither_their_pool_nor_their_bucket(pair: Pair) -> None:
    """More masks than plans are kept: a plan that was forgotten and made again still finds the right graph."""
    inputs = pair.inputs()
    recording, _ = pair.record(inputs)
    masks = [box(top, left) for top in (4, 8, 12) for left in (4, 8, 12, 16)]
    for mask in [*masks, masks[0], masks[-1]]:
        pair.check(recording, pair.edited(inputs, mask), mask)


def test_an_edit_that_records_is_replayed_for_every_mask_without_compiling_again(pair: Pair) -> None:
    inputs = pair.inputs()
    recording, base = pair.record(inputs)
    for kind in MASKS:
        mask = make_mask(kind, SIZE, seed=2)
        edit = pair.edited(inputs, mask)
        (result,) = pair.check_recorded(recording, edit, mask, kind)
        outputs = pair.check(result, edit, mask, f"{kind}, edited again")
        for output, recorded in zip(outputs, base, strict=True):
            kept = ~mask.to(pair.device)
            assert torch.equal(output[..., kept], recorded[..., kept]), "outside the mask stands the recording"
    assert pair.pool._graphs, "nothing was captured"


def test_a_chain_of_recorded_edits_is_replayed(pair: Pair) -> None:
    """Slots of edits are put together for each call, and must stay where they are until the replay has read them."""
    inputs = pair.inputs()
    recording, _ = pair.record(inputs)
    turns, edits = [recording], [inputs]
    for number, mask in enumerate([box(8, 8), box(4, 4, 6), box(10, 12, 10), box(8, 8)]):
        edits.append(pair.edited(edits[-1], mask, seed=number + 1))
        turns.append(pair.check_recorded(turns[-1], edits[-1], mask, f"turn {number}")[0])
        assert turns[-1].own_nbytes < recording.nbytes / 2
    again = box(6, 6, 5)
    edit = pair.edited(edits[2], again, seed=9)
    first = pair.check(turns[2], edit, again, "back to the second turn")
    pair.check(turns[4], pair.edited(edits[4], again, seed=9), again, "and to the last")
    for now, then in zip(pair.check(turns[2], edit, again), first, strict=True):
        assert torch.equal(now, then)


def test_what_a_recorded_edit_keeps_is_its_own(pair: Pair) -> None:
    """Later replays write to the memory of the graph, not to earlier recordings."""
    inputs, mask = pair.inputs(), box(8, 8)
    recording, _ = pair.record(inputs)
    _, (first,) = pair.record_edit(pair.graphs, recording, pair.edited(inputs, mask), mask)
    kept = [{name: first.slot(call, name).clone() for name in first.calls[0].slots} for call in range(CALLS)]
    pair.record_edit(pair.graphs, recording, pair.edited(inputs, mask, seed=6), mask)
    pair.edit(pair.graphs, recording, pair.edited(inputs, mask, seed=7), mask)
    for call, slots in enumerate(kept):
        for name, value in slots.items():
            assert torch.equal(first.slot(call, name), value), name


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "of their own"])
def test_edits_that_record_and_those_that_do_not_share_a_compilation(
    shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch_cuda(monkeypatch)
    monkeypatch.setattr(graph_choice, "shares_update", lambda: shared)
    pair = make_pair("sd15", torch.float32, "cpu")
    compiled: list[object] = []
    compile_step = cuda_graphs.compile_step
    monkeypatch.setattr(
        cuda_graphs, "compile_step", lambda step, besides: compiled.append(step) or compile_step(step, besides)
    )
    inputs = pair.inputs()
    recording, _ = pair.record(inputs)
    for number, mask in enumerate((box(8, 8), box(4, 4, 12))):
        pair.record_edit(pair.graphs, recording, pair.edited(inputs, mask), mask)
        assert len(compiled) == 1, "on first use, and an edit that is recorded needs no other step"
        pair.record_edit(pair.graphs, recording, pair.edited(inputs, mask, seed=number), mask)
    edit = pair.edited(inputs, mask)
    outputs = pair.edit(pair.graphs, recording, edit, mask)
    recorded, _ = pair.record_edit(pair.graphs, recording, edit, mask)
    assert len(compiled) == (1 if shared else 2)
    assert all(map(torch.equal, outputs, recorded))


def test_what_an_edit_does_not_record_is_not_copied(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    recording, _ = pair.record(inputs := pair.inputs())
    mask = box(3, 5)
    pair.edit(pair.graphs, recording, pair.edited(inputs, mask), mask)
    copied = list[int]()
    of = OwnedOutputs.of

    def counted(owned: OwnedOutputs, *arguments: Any) -> list[Tensor]:
        found = of(owned, *arguments)
        copied.append(len(found))
        return found

    monkeypatch.setattr(OwnedOutputs, "of", counted)
    pair.edit(pair.graphs, recording, pair.edited(inputs, mask), mask)
    assert copied == [1] * CALLS


def test_copies_are_replayed(pair: Pair) -> None:
    inputs = pair.inputs()
    recording, base = pair.record(inputs)
    masks = torch.stack([box(8, 8), box(4, 20, 6)])
    edits = [pair.edited(inputs, mask, seed) for seed, mask in enumerate(masks, start=1)]
    names = ("sample", "encoder_hidden_states")
    together = {**inputs, **{name: torch.stack([edit[name] for edit in edits], 1).flatten(0, 1) for name in names}}
    with torch._dynamo.config.patch(error_on_recompile=False):  # once for a batch of another size
        results = pair.check_recorded(recording, together, masks, "two masks", copies=2)
    outputs, _ = pair.record_edit(pair.graphs, recording, together, masks, copies=2)
    for output, recorded in zip(outputs, base, strict=True):
        for copied, mask in enumerate(masks):
            kept = ~mask.to(pair.device)
            assert torch.equal(output[copied::2][..., kept], recorded[..., kept])
    for result, edit, mask in zip(results, edits, masks, strict=True):
        pair.check(result, edit, mask, "an edit of a copy")


@pytest.mark.parametrize("in_place", [False, True], ids=["replaced", "in place"])
def test_graphs_follow_changed_weights(in_place: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Buckets are numbered by pool: plans prepared for an old pool must not meet a new one's numbers.

    Weights written to in place stay where the graph reads them, but what was packed from them must be packed again.
    """
    patch_cuda(monkeypatch)
    pair = make_pair("sd15", torch.float32, "cpu")
    inputs = pair.inputs()
    small, large = box(8, 8, 4), box(4, 4, 16)
    recording, _ = pair.record(inputs)
    pair.check(recording, pair.edited(inputs, small), small)
    layer: Any = pair.model.module.conv_in
    if in_place:
        layer.weight.mul_(1.5)
    else:
        layer.weight = nn.Parameter(layer.weight.detach() * 1.5, requires_grad=False)
    recording, _ = pair.record(inputs)
    for mask in (large, small, large):
        pair.check(recording, pair.edited(inputs, mask), mask, int(mask.sum()))


@pytest.mark.gpu
def test_half_precision_is_no_worse_than_the_eager_step() -> None:
    """Against the eager step in float32, the compiled step in float16 errs at most twice as much as the eager one."""
    exact, half = shared_pair("sd15", torch.float32, "cuda"), shared_pair("sd15", torch.float16, "cuda")
    inputs = exact.inputs()
    recording, _ = exact.record(inputs)
    half_recording, _ = half.record(move(inputs, "cuda", torch.float16))
    for kind in MASKS:
        mask = make_mask(kind, SIZE, seed=2)
        edit = exact.edited(inputs, mask)
        half_edit = move(edit, "cuda", torch.float16)
        truth = exact.edit(exact.eager, recording, edit, mask)
        eager = half.edit(half.eager, half_recording, half_edit, mask)
        compiled = half.edit(half.graphs, half_recording, half_edit, mask)
        for true, slow, fast in zip(truth, eager, compiled, strict=True):
            bound = 2 * max_error(slow, true) + TOLERANCES[torch.float16][0]
            assert max_error(fast, true) <= bound, kind


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("norm", "attention"), [("incremental", "cached"), ("recorded", "active")])
def test_repeated_rows_count_once(norm: Any, attention: Any, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums over rows and attention among rows meet the rows that padding repeats."""
    if device == "cpu":
        patch_cuda(monkeypatch)
    module = copy.deepcopy(ZOO["sd15"]().module).to(device)
    compiled, eager = (
        sparsify(module, SparsifyConfig(norm=norm, attention=attention, backend=backend, dense_above=1.0))
        for backend in ("inductor", "eager")
    )
    pair = Pair(replace(ZOO["sd15"](), module=module), compiled, eager, torch.float32, device)
    inputs = pair.inputs()
    recording, _ = pair.record(inputs)
    for kind in ("site", "scattered", "block", "full"):
        mask = make_mask(kind, SIZE, seed=2)
        edit = pair.edited(inputs, mask)
        pair.check(recording, edit, mask, kind)
        pair.check_recorded(pair.check_recorded(recording, edit, mask, kind)[0], edit, mask, kind)
    assert pair.pool._graphs


# -- runs at once ----------------------------------------------------------------------------------------


def test_runs_at_once_share_the_graphs(pair: Pair) -> None:
    """Each on a stream of its own where there are streams: buffers are filled, replayed and read by one at a time."""
    recording, _ = pair.record(inputs := pair.inputs())
    masks = [box(2, 3), box(8, 12), box(2, 3, 6), box(0, 0)]
    edits = [(pair.edited(inputs, mask, seed), mask) for seed, mask in enumerate(masks)]
    expected = [pair.edit(pair.graphs, recording, *edit) for edit in edits]

    def run(edited: Inputs, mask: Tensor) -> list[Tensor]:
        if pair.device == "cpu":
            return pair.edit(pair.graphs, recording, edited, mask)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.default_stream())
        with torch.cuda.stream(stream):
            outputs = pair.edit(pair.graphs, recording, edited, mask)
        stream.synchronize()
        return outputs

    for _ in range(3):
        for executable in pair.graphs._programs.executables():
            executable.hoisted.clear()
        found = together([lambda edit=edit: run(*edit) for edit in edits])
        for now, then in zip(found, expected, strict=True):
            assert all(map(torch.equal, now, then))


def test_first_replays_at_once_capture_once(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    recording, _ = pair.record(inputs := pair.inputs())
    mask = box(3, 5)
    edited = pair.edited(inputs, mask)
    expected = pair.edit(pair.graphs, recording, edited, mask)
    pair.pool._graphs.clear()
    captures, capture = list[Any](), pair.pool._capture

    def counted(*arguments: Any) -> Any:
        captures.append(arguments)
        return capture(*arguments)

    monkeypatch.setattr(pair.pool, "_capture", counted)
    found = together([lambda: pair.edit(pair.graphs, recording, edited, mask)] * 3)
    assert len(pair.pool._graphs) == len(captures) == 1
    for outputs in found:
        assert all(map(torch.equal, outputs, expected))
