"""All figures of one method's picture of one pair, as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from fisedit_compiler import masks
from fisedit_compiler.evaluation.measures import pixels
from fisedit_compiler.evaluation.measures.judge import Judge, Look, directional_similarity, layer_distance, similarity
from fisedit_compiler.evaluation.methods.bench import Case, Outcome
from fisedit_compiler.pipelines.drawing.pictures import mask_to_pixels


@dataclass(frozen=True)
class Metric:
    """One figure.

    Attributes:
        name: key in the records.
        title: in tables.
        form: how it is printed.
        better: ``"higher"``, ``"lower"`` or ``""``.
    """

    name: str
    title: str
    form: str = "{:.3f}"
    better: str = ""


METRICS = (
    Metric("directional_similarity", "directional CLIP similarity", better="higher"),
    Metric("image_similarity", "image-image CLIP similarity", better="higher"),
    Metric("text_similarity", "CLIP similarity to the caption", better="higher"),
    Metric("psnr_outside_mask", "PSNR outside the mask, dB", "{:.1f}", "higher"),
    Metric("ssim_outside_mask", "SSIM outside the mask", better="higher"),
    Metric("distance_outside_mask", "LPIPS-style distance outside the mask", "{:.4f}", "lower"),
    Metric("psnr_inside_to_dense", "PSNR to dense inside the mask, dB", "{:.1f}", "higher"),
    Metric("psnr_inside_to_full", "PSNR to the edit without reuse inside the mask, dB", "{:.1f}", "higher"),
    Metric("psnr_outside_objects", "PSNR outside the objects, dB", "{:.1f}", "higher"),
    Metric("ssim_outside_objects", "SSIM outside the objects", better="higher"),
    Metric("distance_outside_objects", "LPIPS-style distance outside the objects", "{:.4f}", "lower"),
    Metric("mask_area", "mask area", "{:.1%}"),
    Metric("mask_over_objects", "mask area / objects' area", "{:.2f}", "lower"),
    Metric("mask_recall", "share of the objects in the mask", "{:.1%}", "higher"),
    Metric("seconds", "seconds an edit", "{:.2f}", "lower"),
    Metric("dense_calls", "dense calls", "{:.1f}", "lower"),
    Metric("sparse_calls", "sparse calls", "{:.1f}"),
    Metric("shallow_calls", "shallow calls", "{:.1f}"),
)


@dataclass(frozen=True)
class Reference:
    """What every method of a pair is compared with: the base, both captions, and the two kinds of outside."""

    case: Case
    judge: Judge
    look: Look
    before: Tensor
    after: Tensor
    outside_mask: pixels.Pixels
    outside_objects: pixels.Pixels | None

    @classmethod
    def of(cls, case: Case, judge: Judge) -> Reference:
        """The reference of a pair."""
        image = case.base.image
        return cls(
            case=case,
            judge=judge,
            look=judge.look(image),
            before=judge.read(case.pair.input),
            after=judge.read(case.pair.output),
            outside_mask=pixels.outside_mask(case.sparse.mask, image),
            outside_objects=None if case.truth is None else ~case.truth.pixels,
        )

    def measure(self, outcome: Outcome) -> tuple[dict[str, Any], Look]:
        """The figures of a method's outcome, by names of :data:`METRICS`, ``None`` where one has no meaning."""
        look = self.judge.look(outcome.image)
        figures: dict[str, Any] = {
            "directional_similarity": directional_similarity(
                self.look.embedding, look.embedding, self.before, self.after
            ),
            "image_similarity": similarity(self.look.embedding, look.embedding),
            "text_similarity": similarity(look.embedding, self.after),
            **self._outside("mask", outcome.image, self.outside_mask),
            **self._outside("objects", outcome.image, self.outside_objects),
            "psnr_inside_to_dense": pixels.finite_psnr(outcome.image, self.case.dense.image, ~self.outside_mask),
            "psnr_inside_to_full": None
            if outcome.full is None
            else pixels.finite_psnr(outcome.image, outcome.full, ~self.outside_mask),
            **self._of_mask(outcome.mask),
            "seconds": outcome.seconds,
            "dense_calls": outcome.count("dense"),
            "sparse_calls": outcome.count("sparse"),
            "shallow_calls": outcome.count("shallow"),
            "note": outcome.note,
        }
        return figures, look

    def _outside(self, of: str, image: Image.Image, outside: pixels.Pixels | None) -> dict[str, float | None]:
        base = self.case.base.image
        if outside is None or not outside.any():
            return dict.fromkeys((f"psnr_outside_{of}", f"ssim_outside_{of}", f"distance_outside_{of}"))
        kept = self.judge.look(pixels.with_base_inside(image, base, outside))
        return {
            f"psnr_outside_{of}": pixels.finite_psnr(image, base, outside),
            f"ssim_outside_{of}": pixels.ssim(image, base, outside),
            f"distance_outside_{of}": layer_distance(self.look.layers, kept.layers),
        }

    def _of_mask(self, mask: torch.Tensor | None) -> dict[str, float | None]:
        if mask is None:
            return dict.fromkeys(("mask_area", "mask_over_objects", "mask_recall"))
        truth, area = self.case.truth, masks.area(mask)
        covered = mask_to_pixels(mask, self.case.base.image)
        return {
            "mask_area": area,
            "mask_over_objects": None if truth is None else area / truth.area,
            "mask_recall": None if truth is None else truth.recall(covered),
        }
