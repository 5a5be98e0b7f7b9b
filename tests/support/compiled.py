"""Compiled models that the runtime's tests share, and denoising loops small enough to read.

Compiling costs seconds, so each model and configuration is compiled once per process. Tests that change a
module take ``copy.deepcopy`` of it: a copy shares no state and finds its capture in the disk cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fisedit_compiler import Recording, SparseModule, SparsifyConfig, sparsify
from tests.support.tiny_pipeline import make_tiny_pipeline
from tests.support.zoo import ZOO, Inputs, ZooModel

HEIGHT, WIDTH = 16, 24
STEPS = 3


@cache
def model_and_compiled(name: str = "sd15", **options: Any) -> tuple[ZooModel, SparseModule]:
    """A member of the zoo and the same compiled; shared, so leave it as it is.

    Unless asked to, it never falls back to dense calls: the subject is the packed program, under every mask.
    """
    model = ZOO[name]()
    options = {"multiple": model.multiple, "dense_above": 1.0, **options}
    inputs = None if model.text_length else model.make_inputs(2, HEIGHT, WIDTH)
    return model, sparsify(model.module, SparsifyConfig(**options), example_inputs=inputs)


@cache
def compiled_pipeline() -> Any:
    """A stock diffusers pipeline with 16 x 16 latents whose UNet is compiled; shared."""
    pipe = make_tiny_pipeline()
    pipe.unet = sparsify(pipe.unet)
    return pipe


def box(top: int, left: int, bottom: int, right: int, height: int = HEIGHT, width: int = WIDTH) -> Tensor:
    """A rectangular mask, bool ``[height, width]``."""
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[top:bottom, left:right] = True
    return mask


def denoise(module: Any, inputs: Inputs, steps: int = STEPS, size: float = 0.1) -> Tensor:
    """Run ``steps`` calls of ``module``, each starting where the last one led; returns the last sample."""
    sample = inputs["sample"]
    for step in range(steps):
        call = {**inputs, "sample": sample, "timestep": torch.tensor(900 - 100 * step)}
        sample = sample - size * module(**call)[0]
    return sample


def guided(module: Any, inputs: Inputs, steps: int = STEPS) -> Tensor:
    """A run with guidance: both samples of a call have the same latents, and what they predict is mixed."""
    sample = inputs["sample"][:1]
    for step in range(steps):
        call = {**inputs, "sample": sample.repeat(2, 1, 1, 1), "timestep": torch.tensor(900 - 100 * step)}
        unconditional, conditional = module(**call)[0].chunk(2)
        sample = sample - 0.1 * (unconditional + 3.0 * (conditional - unconditional))
    return sample


def other_text(inputs: Inputs, seed: int = 1) -> Inputs:
    """The same call under another prompt."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(inputs["encoder_hidden_states"].shape, generator=generator)
    return {**inputs, "encoder_hidden_states": text.to(inputs["sample"].dtype)}


def conditional_changed(inputs: Inputs, seed: int = 1) -> Inputs:
    """Another prompt with the same negative prompt, as guidance lays them out: the first sample stays."""
    text = other_text(inputs, seed)["encoder_hidden_states"]
    text[: len(text) // 2] = inputs["encoder_hidden_states"][: len(text) // 2]
    return {**inputs, "encoder_hidden_states": text}


@dataclass
class Run:
    """A base run and what was made of it."""

    compiled: SparseModule
    inputs: Inputs
    recording: Recording


def recorded(name: str = "sd15", batch: int = 2, maps: int = 0) -> Run:
    """A base run of a member of the zoo, with guidance if the batch is 2; the first ``maps`` calls keep their maps."""
    model, compiled = model_and_compiled(name)
    inputs = model.make_inputs(batch, HEIGHT, WIDTH)
    if batch == 2:
        inputs["sample"] = inputs["sample"][:1].repeat(2, 1, 1, 1)
    with compiled.record(maps) as recording:
        (guided if batch == 2 else denoise)(compiled, inputs)
    return Run(compiled, inputs, recording)


def run_pipeline(pipe: Any, prompt: str = "a cat", **settings: Any) -> Tensor:
    """Final latents of a short seeded run."""
    seed = settings.pop("seed", 3)
    options = {"num_inference_steps": 4, "guidance_scale": 5.0, "output_type": "latent", **settings}
    latents: Tensor = pipe(prompt, generator=torch.Generator().manual_seed(seed), **options).images
    return latents
