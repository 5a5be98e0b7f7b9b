"""Prompt-to-prompt with recorded attention maps: the only place that knows how maps are recorded and reused.

The base is recorded again with the maps of its first calls; the edit runs densely and takes, in those calls, the
columns of the words that both captions have. ``compiled.record(maps=...)``, ``session.reuse_maps(columns)`` and
``pipelines.words.token_columns`` do the work.
"""

from __future__ import annotations

import importlib
import inspect
import time
from collections.abc import Callable
from typing import Any

import torch

from fisedit_compiler.evaluation.bench import Bench, Case, NotApplicable, Outcome

WORDS = "fisedit_compiler.pipelines.words"


def replace_attention(bench: Bench, case: Case, share: float) -> Outcome:
    """The edit of a pair with the base's cross-attention in the first ``share`` of the calls.

    Raises:
        NotApplicable: this version of the package records no attention maps.
    """
    token_columns = _token_columns(bench)
    settings = case.base.settings
    compiled = bench.compiled()
    calls = max(round(share * settings.num_inference_steps), 1)
    with compiled.record(maps=calls) as recording:  # type: ignore[call-arg]
        bench.run(case.pair.input, settings, unet=compiled)
    # As the paper's AttentionReplace: a new word and the padding take over what the old ones attended to.
    captions = (case.pair.input, case.pair.output)
    columns = token_columns(bench.pipe.tokenizer, *captions, align_padding=True, align_replaced=True)
    if columns.dim() == 1 and settings.guidance_scale > 1.0:
        # Guidance batches the empty caption before the edit's: nothing of it is taken from the base.
        columns = torch.stack([torch.full_like(columns, -1), columns])
    started = time.perf_counter()
    with compiled.edit(recording) as session:
        reusing: Any = session
        reusing.reuse_maps(columns)
        outcome = bench.run(case.pair.output, settings, unet=compiled)
    return Outcome(outcome.image, time.perf_counter() - started, outcome.calls, note=f"maps of {calls} calls")


def _token_columns(bench: Bench) -> Callable[..., torch.Tensor]:
    if "maps" not in inspect.signature(bench.compiled().record).parameters:
        raise NotApplicable("this version records no attention maps")
    try:
        function: Callable[..., torch.Tensor] = importlib.import_module(WORDS).token_columns
    except ImportError as error:
        raise NotApplicable("this version finds no words that two captions have in common") from error
    return function
