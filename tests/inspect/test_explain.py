"""``explain()``: every level with its size and estimates, refusals with reasons, and in words when nothing is known."""

from __future__ import annotations

import pytest
import torch

from fisedit_compiler import SparsifyConfig, sparsify
from fisedit_compiler.errors import MaskError
from fisedit_compiler.kernels.block_costs import fits
from tests.runtime.compiled import HEIGHT, WIDTH, box, compiled_model


def test_a_mask_shows_sizes_and_estimates_of_every_level() -> None:
    _, compiled = compiled_model()
    (executable,) = compiled._programs.executables()
    text = compiled.explain(box(2, 2, 9, 9))
    lines = text.splitlines()
    assert "0 operations stay dense" in lines[0] and "12.8% active sites, batch 2, on cpu" in lines[1]
    levels = executable.block_sizes.levels
    assert [line.split()[0] for line in lines[3:]] == [str(level) for level in levels]
    for line in lines[3:]:
        _, active, sites, size, *costs = line.split()
        assert int(active) <= int(sites) <= HEIGHT * WIDTH
        assert len(costs) == len(fits("cpu")) and int(costs[(1, 2, 4, 8).index(int(size))]) == min(map(int, costs))


def test_a_forced_size_is_shown() -> None:
    model, _ = compiled_model()
    forced = sparsify(model.module, SparsifyConfig(block_size=4, multiple=model.multiple))
    for line in forced.explain(box(2, 2, 9, 9)).splitlines()[3:]:
        assert line.split()[3] == "4"


def test_refusals_are_named_with_their_reason() -> None:
    _, compiled = compiled_model("pooled")
    text = compiled.explain()
    (program,) = compiled.programs
    assert program.refusals
    assert all(reason in text for *_, reason in program.refusals)
    assert "convolutions of" not in text, "without a mask there are no sizes"


def test_wrong_masks_are_refused() -> None:
    _, compiled = compiled_model()
    with pytest.raises(MaskError, match=r"mask > 0\.5"):
        compiled.explain(torch.zeros(HEIGHT, WIDTH))


def test_a_session_explains_what_it_runs() -> None:
    model, compiled = compiled_model()
    inputs = model.make_inputs(2, HEIGHT, WIDTH)
    with compiled.record() as recording:
        compiled(**inputs)
    with compiled.edit(recording) as session:
        assert session.explain() == "no mask is set: calls run densely"
        session.set_mask(box(2, 2, 9, 9))
        assert "no call was made with it yet" in session.explain()
        compiled(**inputs)
        assert session.explain() == compiled.explain(box(2, 2, 9, 9))
    with compiled.edit(recording, box(0, 0, 0, 0)) as session:
        assert "empty" in session.explain()
        compiled(**inputs)
    dense = sparsify(model.module, SparsifyConfig(dense_above=0.0, multiple=model.multiple))
    with dense.edit(recording, box(2, 2, 9, 9)) as session:
        assert session.explain() == session.fallback
        dense(**inputs)
