"""The results of an Editor: a generated image, an edited one, and a dense one to compare with.

They are plain data; the work is done in ``pipelines.editor``.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from PIL import Image

from fisedit_compiler.pipelines.editing.report import EditReport
from fisedit_compiler.pipelines.inversion.corrections import Corrections
from fisedit_compiler.recordings.recording import Recording
from fisedit_compiler.tensors.bits import differs

if TYPE_CHECKING:
    from fisedit_compiler.pipelines.drawing.figures import NotebookFigure
    from fisedit_compiler.pipelines.parts import PartRecording


@dataclass(frozen=True)
class RunSettings:
    """What a run must share with its edits.

    Attributes:
        seed: of the CPU generator that draws the noise, so that every machine draws the same.
        num_inference_steps: as given to the pipeline.
        guidance_scale: as given to the pipeline.
        height: of the image in pixels.
        width: of the image in pixels.
        scheduler: fingerprint of the scheduler, see
            :func:`~fisedit_compiler.pipelines.editing.refusals.scheduler_fingerprint`.
        corrections: of a loaded picture and its edits: where their runs start and what is added after every step.
        options: further arguments of the pipeline's call, by name.
    """

    seed: int
    num_inference_steps: int
    guidance_scale: float
    height: int
    width: int
    scheduler: str = field(repr=False)
    corrections: Corrections | None = field(default=None, repr=False, compare=False)
    options: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)


@dataclass(frozen=True, eq=False)
class Generation:
    """An image, and everything an edit of it starts from.

    Attributes:
        prompt: the text it was made from.
        negative_prompt: the text it was guided away from.
        settings: what its edits must share.
        image: the decoded picture.
        latents: the latents after every step, each ``[1, C, H, W]`` in the model's dtype and on its device.
        initial_latents: the noise the run started from, same form.
        recordings: what each compiled part of the pipeline recorded, by its name; none for an edit made with
            ``record=False``.
    """

    prompt: str
    negative_prompt: str | None
    settings: RunSettings
    image: Image.Image = field(repr=False)
    latents: Sequence[torch.Tensor] = field(repr=False)
    initial_latents: torch.Tensor = field(repr=False)
    recordings: Mapping[str, PartRecording] = field(repr=False)

    @property
    def recording(self) -> Recording | None:
        """What the UNet recorded; ``None`` for an edit made with ``record=False``.

        Its sizes are the UNet's alone; those of a report are of all compiled parts, as are the sums over
        ``recordings``.
        """
        return cast("Recording | None", self.recordings.get("unet"))

    @property
    def is_followed_exactly(self) -> bool:
        """Whether a sparse run reproduces its latents outside a mask without being set back to them."""
        return True


@dataclass(frozen=True, eq=False)
class Edit(Generation):
    """An edited image; it can be edited again if it was recorded.

    Attributes:
        base: the run that was edited. As long as the edit is kept, so are its base and the base's recording, and so on
            back to the first run: of a long chain of edits everything stays in memory.
        mask: bool ``[H, W]`` at the latent's size, on the CPU; true where the edit was allowed to change the
            latents.
        report: what it cost.
        heat: the map behind an automatic mask, float32 ``[H, W]``.
        pixels: bool ``[height, width]`` of the picture, on the CPU: the mask and the border around it that the decoder
            computed. Outside, every pixel is the base's. ``None`` if the whole picture was decoded.
    """

    base: Generation = field(repr=False)
    mask: torch.Tensor = field(repr=False)
    report: EditReport
    heat: torch.Tensor | None = field(default=None, repr=False)
    pixels: torch.Tensor | None = field(default=None, repr=False)

    @property
    def is_followed_exactly(self) -> bool:
        """Not if its own latents, or those of what it is an edit of, were set back or blended between two calls."""
        own = not self.report.restored_steps and not self.report.feather
        return own and self.base.is_followed_exactly

    @property
    def unchanged_outside(self) -> bool:
        """Whether the final latents outside the mask are the base's, bit for bit."""
        outside = ~self.mask.to(self.latents[-1].device)
        return not bool(differs(self.latents[-1][..., outside], self.base.latents[-1][..., outside]).any())

    @property
    def unchanged_pixels_outside(self) -> bool:
        """Whether the picture outside :attr:`pixels` is the base's, bit for bit; false if the whole was decoded."""
        if self.pixels is None:
            return False
        changed = np.asarray(self.image) != np.asarray(self.base.image)
        return not bool(changed[~self.pixels.numpy()].any())

    def show(self) -> NotebookFigure:
        """The base with the mask's outline, the heat map if there is one, and the edit, as a matplotlib figure.

        A notebook displays it as the result of a cell; elsewhere in a cell ``display(edit.show())`` does, and in a
        script ``edit.show().savefig(path)`` writes it.
        """
        return self._figure()

    def _repr_png_(self) -> bytes:
        """The same figure for notebooks, so that an edit as the result of a cell shows itself."""
        return self._figure()._repr_png_()

    def _figure(self) -> NotebookFigure:
        from fisedit_compiler.pipelines.drawing.figures import edit_figure  # brings matplotlib along

        base, report = self.base, self.report
        return edit_figure(
            (base.image, base.prompt),
            (self.image, self.prompt),
            self.mask,
            area=report.area,
            heat=self.heat,
            threshold=report.threshold,
        )


@dataclass(frozen=True, eq=False)
class DenseRun:
    """The same prompt and seed through the unmodified UNet, to compare an edit with.

    Attributes:
        image: the decoded picture.
        latents: the final latents ``[1, C, H, W]``.
        call_seconds: duration of every UNet call.
    """

    image: Image.Image = field(repr=False)
    latents: torch.Tensor = field(repr=False)
    call_seconds: Sequence[float] = field(repr=False)

    @property
    def ms(self) -> float:
        """Median milliseconds of a UNet call."""
        return 1000.0 * statistics.median(self.call_seconds)
