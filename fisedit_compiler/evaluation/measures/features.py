"""Fréchet distances (FID) between sets of pictures, by torchmetrics, from features that were kept with every pair.

The features are the CLIP's image embeddings, or those of an extractor the user names. So figures of different
extractors cannot be compared, nor with FIDs from Inception features unless that is the extractor.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from fisedit_compiler.errors import ConfigError, ModelNotFoundError
from fisedit_compiler.models.parts import first_line

Extractor = Callable[[Image.Image], Tensor]
"""From a picture to its features ``[D]``, float32, on the CPU."""


def load_extractor(path: str | Path, device: str | torch.device = "cpu") -> Extractor:
    """A feature extractor from a file or a directory.

    Args:
        path: a TorchScript file (``.pt``, ``.pth``, ``.ts``) that takes uint8 ``[1, 3, H, W]`` and returns ``[1, D]``,
            such as StyleGAN's ``inception-2015-12-05.pt`` (whose ``return_features`` is set); or the directory of a
            CLIP model with safetensors weights. A TorchScript file is a program in TorchScript's own language: its
            reader runs no Python, but take it from people you trust.
        device: where it runs.

    Raises:
        ModelNotFoundError: there is no such file, or it is none of these.
        ConfigError: it is an archive of ``torch.export`` (``.pt2``), or pickled weights.
    """
    path = Path(path)
    if path.is_dir():
        from fisedit_compiler.evaluation.measures.judge import Judge
        from fisedit_compiler.models import load_clip

        judge = Judge(load_clip(device, model=path))
        return lambda image: judge.look(image).features
    if not path.is_file():
        raise ModelNotFoundError(
            f"there is no feature extractor {str(path)!r}; name a TorchScript file or a CLIP directory"
        )
    call = _load_program(path, torch.device(device))

    @torch.no_grad()
    def extract(image: Image.Image) -> Tensor:
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].contiguous()
        return call(pixels.to(device)).flatten().float().cpu()

    return extract


def frechet_distance(first: Sequence[Tensor], second: Sequence[Tensor]) -> float | None:
    """FID between two sets of features, each ``[D]``; ``None`` with fewer than two in a set."""
    if min(len(first), len(second)) < 2:
        return None
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=_Features(len(first[0])), normalize=True)
    metric.set_dtype(torch.float64)
    metric.update(torch.stack(list(first)).double(), real=True)
    metric.update(torch.stack(list(second)).double(), real=False)
    # Rounding may take equal sets a hair below 0.
    return max(float(metric.compute()), 0.0)


class _Features(nn.Module):
    """Stands where torchmetrics expects a network: the features were computed before."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def _load_program(path: Path, device: torch.device) -> Callable[[Tensor], Tensor]:
    if what := _pickled(path):
        raise ConfigError(
            f"the feature extractor {str(path)!r} is {what}: reading it could run any code in it. Save the module as "
            'TorchScript, torch.jit.trace(module, example).save("features.pt"), or name a CLIP directory'
        )
    try:
        script: Any = torch.jit.load(str(path), map_location=device).eval()  # type: ignore[no-untyped-call]
    except Exception as error:
        raise ModelNotFoundError(
            f"the feature extractor {str(path)!r} could not be loaded ({first_line(error)}); it must be a TorchScript "
            "file"
        ) from error
    names = {argument.name for argument in script.forward.schema.arguments}
    options = {"return_features": True} if "return_features" in names else {}
    return lambda pixels: script(pixels, **options)


def _pickled(path: Path) -> str:
    """What kind of file that Python would unpickle this is; empty if it is none. Contents decide, then the name."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.partition("/")[2] or name for name in archive.namelist()}
    except (OSError, ValueError, zipfile.BadZipFile):
        # Not a zip file, so no TorchScript either; old files of torch.save begin as pickles do.
        return "an archive of torch.export" if path.suffix == ".pt2" else ""
    if (
        path.suffix == ".pt2"
        or "archive_format" in names
        or any("serialized_exported_program" in name for name in names)
    ):
        return "an archive of torch.export, which holds pickles"
    if "constants.pkl" not in names and any(name.endswith(".pkl") for name in names):
        return "a file of torch.save, which is a pickle"
    return ""
