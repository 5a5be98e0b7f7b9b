"""Prompt-to-prompt with recorded attention maps (Hertz et al., ICLR 2023).

The base is recorded again with the maps of its first calls; the edit runs densely and takes, in those calls, the
columns of the words that both captions have, and those of replaced words for the ones in their place.
"""

from __future__ import annotations

import time

from fisedit_compiler.evaluation.methods.bench import Bench, Case, Outcome
from fisedit_compiler.pipelines.editing.words import guided_columns, token_columns


def replace_attention(bench: Bench, case: Case, share: float) -> Outcome:
    """The edit of a pair with the base's cross-attention in the first ``share`` of the calls.

    Raises:
        RecordingError: the UNet has no cross-attention to a text.
    """
    settings = case.base.settings
    compiled = bench.compiled()
    calls = max(round(share * settings.num_inference_steps), 1)
    with compiled.record(maps=calls) as recording:
        bench.run(case.pair.input, settings, unet=compiled)
    started = time.perf_counter()
    # As the paper's AttentionReplace: a new word and the padding take over what the old ones attended to.
    captions = (case.pair.input, case.pair.output)
    columns = token_columns(bench.pipe.tokenizer, *captions, align_padding=True, align_replaced=True)
    with compiled.edit(recording) as session:
        # With guidance the batch holds the empty caption too, which takes nothing from the base.
        session.reuse_maps(guided_columns(columns) if settings.guidance_scale > 1.0 else columns)
        outcome = bench.run(case.pair.output, settings, unet=compiled)
    return Outcome(outcome.image, time.perf_counter() - started, outcome.calls, note=f"maps of {calls} calls")
