"""The methods that are compared: sparse edits and what people do otherwise."""

from __future__ import annotations

import time

import torch

from fisedit_compiler import masks
from fisedit_compiler.evaluation.methods.attention_replacement import replace_attention
from fisedit_compiler.evaluation.methods.bench import Bench, Case, KeepOutside, NotApplicable, Outcome, outcome_of
from fisedit_compiler.evaluation.methods.registry import method
from fisedit_compiler.evaluation.pairs.pairs import LOCAL_KINDS
from fisedit_compiler.pipelines.instruments import timed_calls

STRENGTHS = (0.3, 0.5, 0.7, 0.9)
SHARES = (0.2, 0.4, 0.8)

_DRAWN_MARGIN = 2
"""Sites by which a drawn mask goes beyond the object, as a person's does."""
_OTHER_NOISE = 1_000_003


@method("dense", "dense, same seed", "methods", "approximations")
def dense(bench: Bench, case: Case) -> Outcome:
    """The output caption from the base's noise: all of the new caption, nothing of the base is kept on purpose."""
    return case.dense


@method("sparse", "sparse, automatic mask", "methods", "approximations")
def sparse(bench: Bench, case: Case) -> Outcome:
    """The edit as the Editor makes it without a mask."""
    return outcome_of(case.sparse)


@method("sparse-given", "sparse, given mask", "methods")
def sparse_given(bench: Bench, case: Case) -> Outcome:
    """The edit with a mask a person would draw: the object before and after with a margin, else the pair's region."""
    mask = drawn_mask(case)
    with bench.editor() as editor:
        return outcome_of(editor.edit(case.base, case.pair.output, mask=mask, record=False))


@method("blend", "dense with blending, mask of sparse", "methods", "approximations")
def blend(bench: Bench, case: Case) -> Outcome:
    """Dense calls; after each step the latents outside the mask become the base's."""
    mask = local_mask(case)
    outcome = bench.run(case.pair.output, case.base.settings, KeepOutside(case.base.latents, mask))
    return Outcome(outcome.image, outcome.seconds, outcome.calls, mask)


@method("sdedit", "SDEdit, strength", "methods", parameters=STRENGTHS)
def sdedit(bench: Bench, case: Case, strength: float) -> Outcome:
    """The base's final latents noised again and denoised under the output caption (Meng et al., ICLR 2022).

    The noise is not the base's own: of a picture that was not just generated nobody knows it.
    """
    from diffusers import StableDiffusionImg2ImgPipeline

    pipe, settings = bench.pipe, case.base.settings
    parts = {name: getattr(pipe, name) for name in ("vae", "text_encoder", "tokenizer", "scheduler")}
    other = StableDiffusionImg2ImgPipeline(
        **parts, unet=bench.original, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    other.set_progress_bar_config(disable=True)
    started = time.perf_counter()
    with timed_calls(bench.original) as seconds:
        output = other(
            prompt=case.pair.output,
            image=case.base.latents[-1],
            strength=strength,
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
            generator=torch.Generator("cpu").manual_seed(settings.seed + _OTHER_NOISE),
            output_type="pil",
        )
    return Outcome(output.images[0], time.perf_counter() - started, [("dense", taken) for taken in seconds])


@method("p2p", "prompt-to-prompt, share of steps", "methods", parameters=SHARES)
def prompt_to_prompt(bench: Bench, case: Case, share: float) -> Outcome:
    """Dense calls that take the base's cross-attention to the words both captions have (Hertz et al., ICLR 2023)."""
    return replace_attention(bench, case, share)


def local_mask(case: Case) -> torch.Tensor:
    """The automatic mask, for methods that need one that leaves something alone.

    Raises:
        NotApplicable: it is empty or the whole picture.
    """
    if case.everywhere:
        raise NotApplicable("the edit changes the whole picture")
    if not bool(case.sparse.mask.any()):
        raise NotApplicable("the automatic mask is empty")
    return case.sparse.mask


def drawn_mask(case: Case) -> torch.Tensor:
    """The object of the base and of the dense regeneration with a margin; the pair's region where none was found.

    Raises:
        NotApplicable: the pair has no region, or changes the whole picture.
    """
    height, width = case.base.latents[0].shape[-2:]
    if case.pair.region is None or case.pair.kind not in (None, *LOCAL_KINDS):
        raise NotApplicable("nobody would draw a mask for this edit")
    if case.truth is None:
        return masks.box_mask(height, width, case.pair.region)
    return masks.dilated(masks.to_site_mask(case.truth.pixels, height, width), _DRAWN_MARGIN)
