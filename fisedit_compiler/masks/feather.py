"""The weights of a soft border: how much of an edit counts at each site of its mask."""

from __future__ import annotations

import torch
from scipy import ndimage

from fisedit_compiler.errors import ConfigError


def feather_weights(mask: torch.Tensor, sites: int) -> torch.Tensor:
    """The weight of the edit at every site: 0 outside the mask, 1 deep inside, a ramp between.

    With ``d`` the distance in sites from a site's centre to the nearest centre outside the mask (Euclidean, so at least
    1 inside), the weight is ``min(1, d / (sites + 1))``: linear, and below 1 in exactly the ``sites`` rows along a
    straight border. The picture's edge is no border: a mask that reaches it keeps its full weight there.

    Args:
        mask: bool ``[H, W]``.
        sites: width of the ramp, 0 for none.

    Returns:
        float32 ``[H, W]`` on the device of ``mask``; exactly 0 outside and exactly 1 from ``sites + 1`` sites inwards.

    Raises:
        ConfigError: ``sites`` is no whole number of 0 or more.
    """
    check_feather(sites)
    if sites == 0 or bool(mask.all()):
        return mask.float()
    distance = torch.from_numpy(ndimage.distance_transform_edt(mask.cpu().numpy()))
    return (distance / (sites + 1)).clamp(max=1.0).float().to(mask.device)


def check_feather(sites: object) -> int:
    """``sites`` if it is a width that :func:`feather_weights` takes.

    Raises:
        ConfigError: it is not.
    """
    if isinstance(sites, bool) or not isinstance(sites, int) or sites < 0:
        raise ConfigError(
            f"feather={sites!r} is no width; give a whole number of latent sites, 0 for a hard border at the mask"
        )
    return sites
