"""The embedded models and how a pipeline is loaded from a local directory.

What lives here: finding the weights shipped with the package, loading a ``StableDiffusionPipeline`` or the
evaluation CLIP from a directory, and choosing a scheduler by name. Nothing here compiles, records or edits,
and nothing here ever reaches for the network: a model is a directory on this machine. May import ``images``,
``progress`` and the rooms below.
"""

from fisedit_compiler.models.loading import (
    EMBEDDED_MODELS,
    SCHEDULERS,
    Clip,
    embedded_model_path,
    embedded_object_names,
    load_clip,
    load_pipeline,
    make_scheduler,
)

__all__ = [
    "EMBEDDED_MODELS",
    "SCHEDULERS",
    "Clip",
    "embedded_model_path",
    "embedded_object_names",
    "load_clip",
    "load_pipeline",
    "make_scheduler",
]
