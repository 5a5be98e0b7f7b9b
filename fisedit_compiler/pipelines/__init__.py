"""The diffusers side: the Editor, its results, the detectors of the automatic mask, and drawings of them.

Nothing here looks into a graph or a program: a compiled UNet is used through its modes, as users do. May import
``dynamo``, ``api``, ``extend`` and the rooms below.
"""

from fisedit_compiler.pipelines.detectors import (
    DetectedMask,
    DetectionContext,
    EarlyDifference,
    LatentDifference,
    MaskDetector,
    mask_detectors,
    register_mask_detector,
)
from fisedit_compiler.pipelines.editing.report import Detection, EditReport
from fisedit_compiler.pipelines.editing.runs import DenseRun, Edit, Generation, RunSettings
from fisedit_compiler.pipelines.editor import EDITOR_CONFIG, Editor
from fisedit_compiler.pipelines.inversion.load import DdimInversion, Inversion, Loaded

__all__ = [
    "EDITOR_CONFIG",
    "DdimInversion",
    "DenseRun",
    "DetectedMask",
    "Detection",
    "DetectionContext",
    "EarlyDifference",
    "Edit",
    "EditReport",
    "Editor",
    "Generation",
    "Inversion",
    "LatentDifference",
    "Loaded",
    "MaskDetector",
    "RunSettings",
    "mask_detectors",
    "register_mask_detector",
]
