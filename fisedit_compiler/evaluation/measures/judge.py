"""What CLIP says about pictures: embeddings, similarities, and a distance of its inner layers.

The distance is in the style of LPIPS (Zhang et al., CVPR 2018), not LPIPS itself: features of several layers, unit
length over the channels, squared differences averaged; the features are those of the CLIP's vision tower and no weights
were fitted to people's judgements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fisedit_compiler.models.loading import Clip

_SMALLEST_CHANGE = 1e-6


@dataclass(frozen=True)
class Look:
    """One picture as the vision tower sees it; on the CPU, float32.

    Attributes:
        features: ``[D]``, projected, not normalised: what FID compares.
        layers: per layer ``[patches, channels]``, unit length over the channels.
    """

    features: Tensor
    layers: tuple[Tensor, ...]

    @property
    def embedding(self) -> Tensor:
        """``[D]``, unit length."""
        return F.normalize(self.features, dim=0)


class Judge:
    """A CLIP model that looks at pictures and reads captions.

    Args:
        clip: as :func:`fisedit_compiler.models.load_clip` gives it.
    """

    def __init__(self, clip: Clip) -> None:
        self.clip = clip

    @torch.no_grad()
    def look(self, image: Image.Image) -> Look:
        """Features of a picture."""
        model = self.clip.model
        pixels = self.clip.image_processor(images=[image.convert("RGB")], return_tensors="pt")["pixel_values"]
        output = model.vision_model(pixels.to(model.device, model.dtype), output_hidden_states=True)
        features = model.visual_projection(output.pooler_output)[0]
        # The first token stands for the whole picture, the others for patches.
        layers = tuple(F.normalize(layer[0, 1:].float(), dim=-1).cpu() for layer in output.hidden_states[1:])
        return Look(features.float().cpu(), layers)

    @torch.no_grad()
    def read(self, caption: str) -> Tensor:
        """Embedding of a caption: ``[D]``, unit length, float32, on the CPU."""
        model = self.clip.model
        tokens = self.clip.tokenizer([caption], padding="max_length", truncation=True, return_tensors="pt")
        output = model.text_model(**tokens.to(model.device))
        return F.normalize(model.text_projection(output.pooler_output)[0].float().cpu(), dim=0)


def similarity(first: Tensor, second: Tensor) -> float:
    """Cosine of two unit vectors, in [-1, 1]."""
    return float(first @ second)


def directional_similarity(base: Tensor, edited: Tensor, before: Tensor, after: Tensor) -> float:
    """Cosine between how the picture changed and how the caption did (Gal et al., StyleGAN-NADA, 2022).

    Args:
        base: embedding of the base picture.
        edited: embedding of the edited one.
        before: embedding of the base's caption.
        after: embedding of the edit's.

    Returns:
        In [-1, 1]; 0 where the picture or the caption did not change.
    """
    change, words = edited - base, after - before
    if change.norm() < _SMALLEST_CHANGE or words.norm() < _SMALLEST_CHANGE:
        return 0.0
    return float(F.cosine_similarity(change, words, dim=0))


def layer_distance(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    """LPIPS-style distance of two pictures' layers: 0 for equal ones, at most 4."""
    pairs = zip(first, second, strict=True)
    return float(torch.stack([(a - b).square().sum(dim=-1).mean() for a, b in pairs]).mean())
