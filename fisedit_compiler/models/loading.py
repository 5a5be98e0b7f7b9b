"""Loading models from local directories: the embedded ones, or any in diffusers layout.

The imports of diffusers and transformers are inside the functions: they take seconds, and ``fisedit --help``
or a user of the compiler alone should not pay for them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fisedit_compiler.errors import ConfigError, ModelNotFoundError
from fisedit_compiler.models.parts import (
    check_complete,
    load_transformer,
    load_transformers_parts,
    named_failure,
    read_index,
)

if TYPE_CHECKING:
    from diffusers import SchedulerMixin, StableDiffusionPipeline
    from PIL.Image import Image
    from transformers import CLIPModel

EMBEDDED_MODELS: tuple[str, ...] = ("emoji-scenes", "emoji-clip")
"""Names :func:`embedded_model_path` knows: a text-to-image pipeline, and a CLIP that judges its images."""

SCHEDULERS: dict[str, str] = {
    "ddim": "DDIMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-ancestral": "EulerAncestralDiscreteScheduler",
    "lcm": "LCMScheduler",
    "tcd": "TCDScheduler",
}
"""Scheduler names of :func:`load_pipeline` and the diffusers class behind each."""


def embedded_model_path(name: str) -> Path:
    """Directory of a model shipped with the package.

    Args:
        name: one of :data:`EMBEDDED_MODELS`.

    Raises:
        ModelNotFoundError: the name is unknown, or the installation lacks the data files.
    """
    if name not in EMBEDDED_MODELS:
        raise ModelNotFoundError(
            f"there is no embedded model {name!r}; the package ships {', '.join(EMBEDDED_MODELS)}. "
            "To use a model of your own, pass its directory to load_pipeline()."
        )
    path = _data_path() / name
    if not path.is_dir():
        raise ModelNotFoundError(
            f"this installation of fisedit_compiler lacks the files of {name!r} (looked in {path}); "
            "install the package again from its wheel or its repository."
        )
    return path


def embedded_object_names() -> list[str]:
    """The objects ``emoji-scenes`` was trained on ("cat", "dog", …), the nouns worth using in its prompts."""
    names = json.loads((_data_path() / "names.json").read_text(encoding="utf-8"))
    return [entry["name"] for entry in names["objects"]]


def load_pipeline(
    model: str | Path | None = None,
    *,
    scheduler: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> StableDiffusionPipeline:
    """Load a stock Stable Diffusion pipeline from a local directory, ready to be compiled.

    Weights stored in half precision are converted to ``dtype`` on loading. The progress bar is off, and the
    safety checker is not loaded (it looks at whole images, so it has no part in what is compiled here).

    Args:
        model: ``None`` or ``"emoji-scenes"`` for the embedded model, otherwise a directory in diffusers
            layout, i.e. with a ``model_index.json``. Names on a model hub are not looked up.
        scheduler: a key of :data:`SCHEDULERS`, or ``None`` for the one the model was saved with.
        dtype: floating-point type of all weights.
        device: where the pipeline is put.

    Raises:
        ModelNotFoundError: the directory does not exist, is not in diffusers layout, or lacks files or weights; or its
            weights are pickled: only safetensors are read.
        ConfigError: the scheduler's name is unknown.
    """
    # Checked before anything is read: a misspelt name should not cost the loading of a large model.
    _scheduler_class_name(scheduler)
    path = embedded_model_path("emoji-scenes") if model in (None, "emoji-scenes") else Path(str(model))
    _check_diffusers_layout(path)
    parts = read_index(path)
    with _without_chatter(advice=True):
        from diffusers import StableDiffusionPipeline
    remedy = (
        "The directory must hold every part its model_index.json names, as written by "
        "StableDiffusionPipeline.save_pretrained()."
    )
    with named_failure("model", path, remedy), _without_chatter(advice=False):
        pipeline = StableDiffusionPipeline.from_pretrained(
            str(path),
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            requires_safety_checker=False,
            **{"safety_checker": None, **load_transformers_parts(path, parts, dtype, leave_out=("safety_checker",))},
        )
        check_complete(path, pipeline.components)
    if scheduler is not None:
        pipeline.scheduler = make_scheduler(scheduler, pipeline.scheduler)
    pipeline.set_progress_bar_config(disable=True)
    modules = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    if any(module.dtype != dtype for module in modules):
        # Versions of diffusers before `dtype=` existed ignore it.
        pipeline = pipeline.to(dtype)
    return pipeline.to(device)


def make_scheduler(name: str, like: SchedulerMixin) -> SchedulerMixin:
    """A scheduler by name that keeps the training schedule of another one.

    ``from_config`` carries the betas, ``prediction_type``, ``rescale_betas_zero_snr`` and
    ``timestep_spacing`` over; a scheduler built from its defaults would not fit a v-prediction model with
    zero terminal SNR.

    Args:
        name: a key of :data:`SCHEDULERS`.
        like: the scheduler whose configuration is kept, usually ``pipeline.scheduler``.

    Raises:
        ConfigError: the name is unknown.
    """
    import diffusers

    class_name = _scheduler_class_name(name)
    assert class_name is not None
    # Clipping is DDIM's default and meant for pixels in [-1, 1]: it would cut latents off.
    overrides = {"clip_sample": False} if class_name == "DDIMScheduler" else {}
    return getattr(diffusers, class_name).from_config(like.config, **overrides)


@dataclass(frozen=True)
class Clip:
    """A model that judges how well an image fits a caption; the embedded one knows images of ``emoji-scenes`` only."""

    model: CLIPModel
    tokenizer: Any
    image_processor: Any

    @torch.no_grad()
    def similarity(self, images: Sequence[Image], captions: Sequence[str]) -> torch.Tensor:
        """Cosine similarity of every image with every caption.

        Returns:
            ``[len(images), len(captions)]``, float32, on the CPU.
        """
        device = self.model.device
        tokens = self.tokenizer(list(captions), padding="max_length", truncation=True, return_tensors="pt").to(device)
        pixels = self.image_processor(images=list(images), return_tensors="pt")["pixel_values"]
        output = self.model(**tokens, pixel_values=pixels.to(device, self.model.dtype))
        return (output.image_embeds @ output.text_embeds.T).float().cpu()


def load_clip(
    device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, model: str | Path | None = None
) -> Clip:
    """Load the embedded ``emoji-clip``, or a CLIP from a local directory.

    Args:
        device: where the model is put.
        dtype: floating-point type of its weights.
        model: directory of a ``CLIPModel`` with its tokenizer and image processor, as ``save_pretrained`` writes them;
            ``None`` for the embedded one.

    Raises:
        ModelNotFoundError: the directory does not exist or lacks files or weights, its weights are pickled, or the
            installation lacks the embedded ones.
    """
    path = embedded_model_path("emoji-clip") if model is None else Path(model)
    if not (path / "config.json").is_file():
        raise ModelNotFoundError(
            f"{path} is not a CLIP model: it has no config.json. Pass a directory written by "
            "CLIPModel.save_pretrained() with its tokenizer and image processor, or leave it out for the embedded one."
        )
    with _without_chatter(advice=True):
        from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer
    remedy = (
        "The directory must hold a CLIPModel, its tokenizer and its image processor, as save_pretrained() writes them."
    )
    with named_failure("CLIP model", path, remedy), _without_chatter(advice=False):
        return Clip(
            model=load_transformer(CLIPModel, path, dtype).to(device).eval(),
            tokenizer=CLIPTokenizer.from_pretrained(str(path), local_files_only=True),
            image_processor=CLIPImageProcessor.from_pretrained(str(path), local_files_only=True),
        )


@contextmanager
def _without_chatter(*, advice: bool) -> Iterator[None]:
    """Silence the libraries' loading bars, and leave their settings as they were found.

    Args:
        advice: also silence warnings. For imports only (transformers advises to install torchvision): while
            weights are read, a warning may say that some are missing, and that must be seen.
    """
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    found = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    for library in libraries:
        library.disable_progress_bar()
        if advice:
            library.set_verbosity_error()
    try:
        yield
    finally:
        for library, (verbosity, bars) in zip(libraries, found, strict=True):
            library.set_verbosity(verbosity)
            if bars:
                library.enable_progress_bar()


def _data_path() -> Path:
    return Path(str(resources.files("fisedit_compiler.models") / "data"))


def _scheduler_class_name(name: str | None) -> str | None:
    if name is None:
        return None
    if name not in SCHEDULERS:
        raise ConfigError(f"unknown scheduler {name!r}; choose one of {', '.join(SCHEDULERS)}.")
    return SCHEDULERS[name]


def _check_diffusers_layout(path: Path) -> None:
    if not path.is_dir():
        raise ModelNotFoundError(
            f"there is no model directory {path}. Models are read from this machine only: download it first "
            "and pass the directory that holds its model_index.json, or leave the model out to use the "
            "embedded one."
        )
    if not (path / "model_index.json").is_file():
        raise ModelNotFoundError(
            f"{path} is not a diffusers pipeline: it has no model_index.json. A single checkpoint file must "
            "be converted first, with StableDiffusionPipeline.from_single_file(...).save_pretrained(...)."
        )
