"""What the VAE decodes in one run: recorded with a base, or inside the masks of its edits only.

A run decodes once, at its end. Whatever stands in the way of a sparse decode, the picture is decoded densely and the
report says why; an edit never fails for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from fisedit_compiler import masks
from fisedit_compiler.errors import CaptureError, FiseditError, LayoutError, LoweringError, VerificationError
from fisedit_compiler.module import SparseModule
from fisedit_compiler.pipelines.decoding.decoder import (
    SHARE_OF_FREE_MEMORY,
    as_pixels,
    bordered,
    free_memory,
    hindrance,
)
from fisedit_compiler.recordings.recording import Recording
from fisedit_compiler.runtime.sessions.edit_masks import EditMask, EditMasks
from fisedit_compiler.tensors.bits import differs

Dense = Callable[[Tensor], Tensor]
Kind = Literal["dense", "sparse", "shallow", "skipped"]
OTHER_VAE = "the VAE does not give the base's picture back: it was changed since"
SAME_PICTURE = 1.0 / 255
"""Largest difference of pixels in [-1, 1], half a level, that counts as the same picture."""
_FOR_GOOD = (CaptureError, LayoutError, LoweringError, VerificationError)
"""Errors that say something about the decoder, not about one run."""
_CAUGHT = (FiseditError, torch.OutOfMemoryError)


class DecodingVAE(Protocol):
    """What runs know of the VAE.

    Attributes:
        original: the user's.
        decoding: its compiled decoder.
        refused: why nothing is decoded sparsely any more, in words; empty as long as it is.
        wanted: bytes of its recordings by batch, height and width, as far as they were asked for.
    """

    original: Any
    decoding: SparseModule
    refused: str
    wanted: dict[tuple[int, int, int], int]

    def refuse(self, why: str) -> None:
        """Decode densely from now on."""


@dataclass
class Decoded:
    """What one run decoded, for its edits.

    Attributes:
        latents: what was decoded, ``[B, C, H, W]``; ``None`` if nothing was.
        pixels: what was made of it, ``[B, 3, k*H, k*W]``.
        recording: what the decoder's edits read; made by the first of them, ``None`` if that was not possible.
        note: why there is none and will be none, in words.
        complete: whether the run ended without an exception.
    """

    latents: Tensor | None = field(default=None, repr=False)
    pixels: Tensor | None = field(default=None, repr=False)
    recording: Recording | None = None
    note: str = ""
    complete: bool = False

    @property
    def num_calls(self) -> int:
        """Decodes that are recorded."""
        return 0 if self.recording is None else self.recording.num_calls

    @property
    def nbytes(self) -> int:
        """Bytes it keeps in memory, those it shares with other recordings included."""
        return self._plain + (0 if self.recording is None else self.recording.nbytes)

    @property
    def own_nbytes(self) -> int:
        """Bytes it added."""
        return self._plain + (0 if self.recording is None else self.recording.own_nbytes)

    @property
    def _plain(self) -> int:
        return sum(value.nbytes for value in (self.latents, self.pixels) if value is not None)


@dataclass(frozen=True)
class Decode:
    """How one picture was decoded.

    Attributes:
        kind: ``"sparse"``, ``"dense"``, or ``"skipped"`` for the base's picture.
        area: share of the latent sites that were computed, the border included.
        took: when it began and when it ended; read by :attr:`seconds`.
        note: why densely, in words.
        pixels: bool ``[H, W]`` on the CPU, the pixels outside which it is the base's; ``None`` for all of them.
    """

    kind: Kind
    area: float
    took: Stopwatch = field(repr=False)
    note: str = ""
    pixels: Tensor | None = field(default=None, repr=False)

    @property
    def seconds(self) -> float:
        """Duration, kernels on a GPU included."""
        return self.took.seconds


class Stopwatch:
    """Measures work without waiting for it, on a GPU by events."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._start = self._now()
        self._end: Any = None

    def stop(self) -> Stopwatch:
        """The work is launched."""
        self._end = self._now()
        return self

    @property
    def seconds(self) -> float:
        """From the start to the stop."""
        if not self._on_gpu:
            return float(self._end - self._start)
        self._end.synchronize()
        return float(self._start.elapsed_time(self._end)) / 1000.0

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class DecodeRecord:
    """Keeps what a run decodes, if it decodes once. The decoder's own recording is made by the first edit."""

    def __init__(self, vae: DecodingVAE) -> None:
        self.vae = vae
        self.decoded = Decoded(note="the base's run decoded nothing")

    def decode(self, latents: Tensor, dense: Dense) -> Tensor:
        """The original's pixels."""
        pixels = dense(latents)
        if self.decoded.latents is not None:
            self.decoded.note = "the base's run decoded more than once"
            return pixels
        self.decoded.latents, self.decoded.pixels = latents.clone(), pixels.clone()
        # Tiles and the like make another picture than one decode does.
        self.decoded.note = hindrance(self.vae.original, latents, latents.shape[0])
        return pixels


class DecodeEdit:
    """Decodes edits of what was recorded.

    Attributes:
        decodes: how each copy was decoded.
        results: with ``record``, what each copy decoded, for its own edits.
        masks: of the edits; ``None`` as long as they are not known.
    """

    def __init__(self, vae: DecodingVAE, base: Decoded, record: bool, copies: int) -> None:
        self.vae, self.base, self.record, self.copies = vae, base, record, copies
        self.masks: EditMasks | None = None
        self.decodes: Sequence[Decode] = ()
        self.results: tuple[Decoded, ...] = ()
        self._made: list[Decoded] = []

    def set_mask(self, mask: Any, *, densely: str | None = None) -> None:
        """Edit inside the mask, in any form that ``SparseModule.edit`` takes; ``densely`` is the UNet's business.

        Raises:
            MaskError: the mask does not fit.
        """
        size = None if self.base.latents is None else self.base.latents.shape[-2:]
        if isinstance(mask, EditMasks):
            self.masks = mask
        elif size is not None:
            self.masks = EditMasks.of(mask, self.copies, size[0], size[1], 0)

    def decode(self, latents: Tensor, dense: Dense) -> Tensor:
        """Decode every copy inside its own mask; copies lie as ``SparseModule.edit`` has them."""
        base = self.base.latents
        if self.decodes or (base is not None and base.shape[0] * self.copies != latents.shape[0]):
            self._made = []
            return dense(latents)
        samples = latents.shape[0] // self.copies
        each = latents.unflatten(0, (samples, self.copies))
        decodes, pixels = [], []
        for copy in range(self.copies):
            made, decode = self._decode_one(each[:, copy].contiguous(), copy, dense)
            self._made.append(made)
            decodes.append(decode)
            pixels.append(made.pixels)
        self.decodes = decodes
        return torch.stack([one for one in pixels if one is not None], dim=1).flatten(0, 1)

    def finish(self) -> None:
        """The run has ended as it should."""
        if self.record:
            for made in self._made:
                made.complete = True
            self.results = tuple(self._made)

    def _decode_one(self, latents: Tensor, copy: int, dense: Dense) -> tuple[Decoded, Decode]:
        watch, base = Stopwatch(latents.device), self.base
        if self.masks is None:
            return self._whole(latents, dense, watch, "")
        mask = self.masks.parts[copy if len(self.masks.parts) > 1 else 0].grown
        if base.latents is None or base.pixels is None:
            return self._whole(latents, dense, watch, base.note)
        if base.latents.shape != latents.shape or base.latents.dtype != latents.dtype:
            return self._whole(latents, dense, watch, "the base's latents have another size or dtype")
        if bool(differs(latents, base.latents)[..., ~mask.to(latents.device)].any()):
            return self._whole(latents, dense, watch, "the latents outside the mask are not the base's")
        if not bool(mask.any()):
            pixels = torch.zeros(base.pixels.shape[-2:], dtype=torch.bool)
            return base, Decode("skipped", 0.0, watch.stop(), pixels=pixels)
        if bool(mask.all()):
            return self._whole(latents, dense, watch, "")
        sites = bordered(mask)
        inside = as_pixels(sites, base.pixels.shape[-1] // latents.shape[-1])
        why = self.vae.refused or base.note or hindrance(self.vae.original, latents, latents.shape[0])
        try:
            if not why and base.recording is None:
                why = record(self.vae, base)
            if base.recording is not None and not why:
                made, kind, why = self._sparsely(latents, sites, inside, base)
                area = masks.area(sites) if kind == "sparse" else 1.0
                return made, Decode(kind, area, watch.stop(), why, inside)
        except _CAUGHT as error:
            why = in_words(self.vae, error)
        if why == OTHER_VAE:
            return self._whole(latents, dense, watch, why)
        pixels = torch.where(inside.to(latents.device), dense(latents), base.pixels)
        # What was put together is no decode, so no recording can be made of it.
        return Decoded(latents.clone(), pixels, None, why), Decode("dense", 1.0, watch.stop(), why, inside)

    def _sparsely(self, latents: Tensor, sites: Tensor, inside: Tensor, base: Decoded) -> tuple[Decoded, Kind, str]:
        mask = EditMasks([EditMask(sites, sites)])
        assert base.recording is not None and base.pixels is not None
        with self.vae.decoding.edit(base.recording, mask, record=self.record) as session:
            pixels = self.vae.decoding(latents)
        # The recording's own pixels are the base's up to the last bit, if it was made with another number of threads.
        pixels = torch.where(inside.to(pixels.device), pixels, base.pixels)
        return Decoded(latents.clone(), pixels, session.result), session.timings[0][0], session.fallback or ""

    def _whole(self, latents: Tensor, dense: Dense, watch: Stopwatch, note: str) -> tuple[Decoded, Decode]:
        """Without the base: every pixel may be another."""
        hindered = hindrance(self.vae.original, latents, latents.shape[0])
        made = Decoded(latents.clone(), dense(latents), None, hindered)
        return made, Decode("dense", 1.0, watch.stop(), note)


def record(vae: DecodingVAE, base: Decoded) -> str:
    """Record what the base decoded, once; returns why not, in words.

    Raises:
        FiseditError: the decoder cannot be compiled or recorded.
    """
    assert base.latents is not None and base.pixels is not None
    if why := _lacks_memory(vae, base.latents):
        return why
    with vae.decoding.record(outputs=[base.pixels]) as recording:
        pixels = vae.decoding(base.latents)
    # Another number of threads changes last bits, other weights change the picture.
    if not torch.allclose(pixels.float(), base.pixels.float(), rtol=0.0, atol=SAME_PICTURE, equal_nan=True):
        return OTHER_VAE
    base.recording = recording
    return ""


def in_words(vae: DecodingVAE, error: Exception) -> str:
    """An error as the reason for a dense decode; what will not go away is not tried again."""
    why = "there is not enough memory" if isinstance(error, torch.OutOfMemoryError) else str(error)
    if isinstance(error, _FOR_GOOD):
        vae.refuse(why)
    return why


def _lacks_memory(vae: DecodingVAE, latents: Tensor) -> str:
    """Whether the recording would take too much of what is free, in words; empty if not."""
    free = free_memory(latents.device)
    if free is None or not vae.decoding.programs:
        return ""  # the first recording tells how large they are
    sizes = latents.shape[0], latents.shape[2], latents.shape[3]
    if sizes not in vae.wanted:
        explanation = vae.decoding.explain(batch=sizes[0], size=sizes[1:])
        vae.wanted[sizes] = max(program.recorded_bytes for program in explanation.programs)
    if vae.wanted[sizes] <= SHARE_OF_FREE_MEMORY * free:
        return ""
    gib, left = vae.wanted[sizes] / 2**30, free / 2**30
    return f"its recording would take {gib:.1f} GiB, more than half of the {left:.1f} GiB that are free"
