"""What the methods run on: one pipeline, its UNet in every compiled form, and the pictures of one pair.

Nothing is measured here but time, and no method is written here.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from fisedit_compiler.config import SparsifyConfig
from fisedit_compiler.evaluation.pairs.objects import GroundTruth
from fisedit_compiler.evaluation.pairs.pairs import EditPair
from fisedit_compiler.pipelines.callbacks import StepCallback, Tensors
from fisedit_compiler.pipelines.editing.runs import Edit, Generation, RunSettings
from fisedit_compiler.pipelines.editor import EDITOR_CONFIG, Editor
from fisedit_compiler.pipelines.instruments import timed_calls

if TYPE_CHECKING:
    from fisedit_compiler.module import SparseModule


class NotApplicable(Exception):
    """A method has nothing to do for a pair; the message says why. No failure: the pair counts without it."""


@dataclass(frozen=True)
class Outcome:
    """What a method made of a pair.

    Attributes:
        image: the edited picture.
        seconds: wall time of the edit from prompt to picture, without what had to be prepared for the comparison only.
        calls: ``(kind, seconds)`` of every UNet call.
        mask: bool ``[H, W]`` of latent sites that were allowed to change; ``None`` for methods without one.
        note: what the method said about the run.
        full: the picture that the same edit has without reuse across steps, of methods that reuse.
    """

    image: Image.Image = field(repr=False)
    seconds: float
    calls: Sequence[tuple[str, float]] = field(default=(), repr=False)
    mask: torch.Tensor | None = field(default=None, repr=False)
    note: str = ""
    full: Image.Image | None = field(default=None, repr=False)

    def count(self, kind: str) -> int:
        """Number of calls of a kind."""
        return sum(1 for seen, _ in self.calls if seen == kind)


@dataclass(frozen=True)
class Case:
    """One pair with the runs that every method is compared with.

    Attributes:
        pair: the pair.
        base: the recorded run of its input caption.
        dense: the regeneration with its output caption and the same noise.
        sparse: the edit with the automatic mask.
        truth: the pixels the pair should change, if known.
    """

    pair: EditPair
    base: Generation
    dense: Outcome
    sparse: Edit
    truth: GroundTruth | None

    @property
    def everywhere(self) -> bool:
        """Whether the automatic mask is the whole picture."""
        return bool(self.sparse.mask.all())


class Bench:
    """A pipeline and its UNet, original and compiled in as many ways as methods ask for.

    Args:
        pipe: a stock pipeline with its own UNet.
        config: how the UNet is compiled unless a method asks for something else; as the Editor does by default.
    """

    def __init__(self, pipe: Any, config: SparsifyConfig | None = None) -> None:
        self.pipe, self.config = pipe, config or EDITOR_CONFIG
        self.original: torch.nn.Module = pipe.unet
        self._compiled: dict[SparsifyConfig, SparseModule] = {}
        self.without_reuse: tuple[Case, Image.Image] | None = None

    @contextmanager
    def editor(self, **changes: Any) -> Iterator[Editor]:
        """An Editor of the UNet compiled with ``changes`` to the configuration; the original is put back afterwards."""
        self.pipe.unet = self.compiled(**changes)
        try:
            # Every method decodes whole pictures: what is compared is what the UNet makes.
            yield Editor(self.pipe, progress=False, parts=("unet",))
        finally:
            self.pipe.unet = self.original

    def compiled(self, **changes: Any) -> SparseModule:
        """The UNet compiled with ``changes`` to the configuration; each is compiled once."""
        from fisedit_compiler.api import sparsify

        config = replace(self.config, **changes)
        if config not in self._compiled:
            self._compiled[config] = sparsify(self.original, config)
        return self._compiled[config]

    def run(
        self, prompt: str, settings: RunSettings, callback: StepCallback | None = None, unet: Any = None
    ) -> Outcome:
        """One run of the pipeline from the settings' noise, with the original UNet or another one in its place."""
        unet = self.original if unet is None else unet
        self.pipe.unet = unet
        started = time.perf_counter()
        try:
            with timed_calls(unet) as seconds:
                output = self.pipe(
                    prompt=prompt,
                    num_inference_steps=settings.num_inference_steps,
                    guidance_scale=settings.guidance_scale,
                    height=settings.height,
                    width=settings.width,
                    generator=torch.Generator("cpu").manual_seed(settings.seed),
                    callback_on_step_end=callback,
                    callback_on_step_end_tensor_inputs=["latents"],
                    output_type="pil",
                )
        finally:
            self.pipe.unet = self.original
        return Outcome(output.images[0], time.perf_counter() - started, [("dense", taken) for taken in seconds])


class KeepOutside:
    """A step callback that sets the latents outside a mask to the base's: inpainting by blending.

    Avrahami et al., "Blended Latent Diffusion", 2023, with the base's own latents in place of a noised picture.
    """

    def __init__(self, base_latents: Sequence[torch.Tensor], mask: torch.Tensor) -> None:
        self._base_latents = base_latents
        self._mask = mask.to(base_latents[0].device)

    def __call__(self, pipe: Any, step: int, timestep: Any, tensors: Tensors) -> Tensors:
        return {"latents": torch.where(self._mask, tensors["latents"], self._base_latents[step])}


def outcome_of(edit: Edit) -> Outcome:
    """An Editor's edit as an outcome."""
    return Outcome(edit.image, edit.report.wall_seconds, edit.report.calls, edit.mask, edit.report.note)
