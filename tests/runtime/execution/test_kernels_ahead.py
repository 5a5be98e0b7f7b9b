"""On a GPU the kernels of a step are compiled before it runs for the first time, by other threads."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from fisedit_compiler.kernels import triton as room
from tests.kernels.triton.stand_in import forget
from tests.support.compiled_zoo import make_mask
from tests.support.graph_pair import SIZE, make_pair

BEFORE = {"_stage_copies_kernel", "_stage_rings_kernel", "_checksum_kernel"}
"""A first run launches them before it compiles the step: to read weights, and what the step reads of a recording."""


@pytest.mark.gpu
@pytest.mark.parametrize("recorded", [False, True], ids=["edit", "recorded edit"])
def test_no_launch_of_a_step_compiles(recorded: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from triton import knobs

    compiled: dict[bool, set[str]] = {True: set(), False: set()}

    def listen(*, src: Any, cache_hit: bool, **_: Any) -> None:
        if src.fn.__module__.startswith(room.__name__) and not cache_hit:
            compiled[threading.current_thread() is threading.main_thread()].add(src.name)

    pair = make_pair("sd15", torch.float16, "cuda")
    inputs, mask = pair.inputs(), make_mask("block", SIZE, seed=2)
    recording, _ = pair.record(inputs)
    edit = pair.edited(inputs, mask)
    forget(torch.cuda.current_device())
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(knobs.compilation, "listener", listen)
    with torch._inductor.config.patch(force_disable_caches=True):
        if recorded:
            pair.record_edit(pair.graphs, recording, edit, mask)
        else:
            pair.edit(pair.graphs, recording, edit, mask)
    assert compiled[True] <= BEFORE
    assert {"_attention_sites_kernel", "_cross_attention_kernel", "_gather_taps_kernel"} <= compiled[False]
    assert ("_copy_out_kernel" in compiled[False]) or not recorded
