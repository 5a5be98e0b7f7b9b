"""The automatic mask: detectors that find the region of an edit, one rule a file, and their registry.

A detector sees latents and decides on a mask; it calls no UNet (``editing/``). May import what the room ``pipelines``
may.
"""

from fisedit_compiler.pipelines.detectors.base import DetectedMask, DetectionContext, MaskDetector
from fisedit_compiler.pipelines.detectors.early_difference import EarlyDifference
from fisedit_compiler.pipelines.detectors.latent_difference import LatentDifference
from fisedit_compiler.pipelines.detectors.registry import (
    is_detector_name,
    make_mask_detector,
    mask_detectors,
    register_mask_detector,
)

__all__ = [
    "DetectedMask",
    "DetectionContext",
    "EarlyDifference",
    "LatentDifference",
    "MaskDetector",
    "is_detector_name",
    "make_mask_detector",
    "mask_detectors",
    "register_mask_detector",
]
