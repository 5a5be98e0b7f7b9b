"""The diffusers side: the Editor, its results, the automatic mask, and drawings of them."""

from fisedit_compiler.pipelines.detect import DetectedMask, LatentDifference
from fisedit_compiler.pipelines.editor import Editor
from fisedit_compiler.pipelines.report import EditReport
from fisedit_compiler.pipelines.runs import DenseRun, Edit, Generation, RunSettings

__all__ = [
    "DenseRun",
    "DetectedMask",
    "Edit",
    "EditReport",
    "Editor",
    "Generation",
    "LatentDifference",
    "RunSettings",
]
