"""Sparse edits with other approximations, all under one mask: the one that the default edit found.

The mask is given from the first call on, so nothing but the approximation differs. ``pinned`` is the meaning of the
default, computed without packing; ``blend`` (see ``methods.py``) approximates nothing inside the mask.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fisedit_compiler.config import Reuse
from fisedit_compiler.evaluation.methods.bench import Bench, Case, KeepOutside, Outcome, outcome_of
from fisedit_compiler.evaluation.methods.methods import local_mask
from fisedit_compiler.evaluation.methods.pinned_unet import PinnedUNet, kept_calls
from fisedit_compiler.evaluation.methods.registry import method

VARIANTS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("default", "incremental statistics, cached attention, adaptive blocks", {}),
    ("recorded", "recorded statistics", {"norm": "recorded"}),
    ("active", "attention among active sites only", {"attention": "active"}),
    ("recorded-active", "recorded statistics, active attention", {"norm": "recorded", "attention": "active"}),
    ("block-1", "blocks of 1", {"block_size": 1}),
    ("block-2", "blocks of 2", {"block_size": 2}),
    ("block-4", "blocks of 4", {"block_size": 4}),
    ("block-8", "blocks of 8", {"block_size": 8}),
)
"""Name, title and what it changes in the configuration."""


TOLERANCES = (0.12, 0.16, 0.2, 0.25)


def _variant(changes: dict[str, Any], reuse: Reuse = "off") -> Callable[[Bench, Case], Outcome]:
    def run(bench: Bench, case: Case) -> Outcome:
        mask = local_mask(case)
        # Above the break-even every variant would be the same dense run.
        options = {**changes, "dense_above": 1.0}
        with bench.editor(**options) as editor:
            base = case.base
            assert base.recording is not None
            if base.recording.config != bench.compiled(**options).sparsify_config.program_key():
                base = editor.generate(
                    case.pair.input,
                    seed=base.settings.seed,
                    num_inference_steps=base.settings.num_inference_steps,
                    guidance_scale=base.settings.guidance_scale,
                    height=base.settings.height,
                    width=base.settings.width,
                )
            return outcome_of(editor.edit(base, case.pair.output, mask=mask, record=False, reuse=reuse))

    return run


for _name, _title, _changes in VARIANTS:
    _suites = ("approximations", "reuse") if _name == "default" else ("approximations",)
    method(_name, _title, *_suites)(_variant(_changes))


@method("reuse", "reuse across steps, tolerance", "reuse", parameters=TOLERANCES)
def reuse(bench: Bench, case: Case, tolerance: float) -> Outcome:
    """The default, whose calls take what comes up from coarser levels from earlier ones, up to a tolerance."""
    if bench.without_reuse is None or bench.without_reuse[0] is not case:
        bench.without_reuse = (case, _variant({})(bench, case).image)
    outcome = _variant({}, tolerance)(bench, case)
    return replace(outcome, full=bench.without_reuse[1])


@method("pinned", "pinned program", "approximations")
def pinned(bench: Bench, case: Case) -> Outcome:
    """What the default computes, by running the dense graph and overwriting inactive sites after every node."""
    mask = local_mask(case)
    settings = case.base.settings
    with kept_calls(bench.original) as calls:
        bench.run(case.pair.input, settings)
    stand_in = PinnedUNet(bench.compiled(dense_above=1.0), calls, mask)
    outcome = bench.run(case.pair.output, settings, KeepOutside(case.base.latents, mask), stand_in)
    return Outcome(outcome.image, outcome.seconds, [("pinned", taken) for _, taken in outcome.calls], mask)
