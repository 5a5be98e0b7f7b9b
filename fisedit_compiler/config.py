"""The one configuration object of the compiler: a frozen, validated dataclass passed down, never global state."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from fisedit_compiler.errors import ConfigError

Norm = Literal["recorded", "incremental"]
Attention = Literal["cached", "active"]
Backend = Literal["auto", "eager", "inductor"]
Reuse = Literal["off", "auto"] | float
"""When calls of an edit may take what comes from coarser levels from earlier ones: never, or up to a tolerance."""
RunsOn = Literal["eager", "inductor"]
"""What a backend comes to on one device."""
BLOCK_SIZES = (1, 2, 4, 8)


@dataclass(frozen=True)
class SparsifyConfig:
    """How :func:`fisedit_compiler.sparsify` rewrites and runs a module.

    Attributes:
        norm: ``"recorded"`` normalises active sites with the mean and variance of the base run (approximate
            normalization of FISEdit, Yu et al., AAAI 2024); ``"incremental"`` corrects the recorded statistics by
            the active sites' old and new sums, exact for the pinned canvas, at ``2 * groups`` extra values a site.
        attention: ``"cached"`` attends from active queries to recorded keys and values whose active rows are
            replaced; ``"active"`` attends among active rows only (fastest, roughest, records no keys or values).
        dilation: sites by which every mask is grown before it is used (square neighbourhood, latent resolution).
        backend: how the sparse step runs. ``"inductor"`` compiles it once with torch.compile and replays CUDA graphs
            on a CUDA device, and raises :class:`LoweringError` where that fails; ``"eager"`` runs it as it is read.
            ``"auto"`` is ``"inductor"``, except that a step which cannot be compiled or captured runs eagerly from
            then on, after one warning that says why. On every other device all three run eagerly.
        dense_above: share of active sites (of the mask grown by ``dilation``, at latent resolution) above which an
            edit's calls run densely, their outputs outside the mask still the recorded ones. ``None`` is the break-even
            measured on this device type and backend, or never where nobody measured one (``geometry/break_even.json``);
            1.0 is never.
        block_size: sites along the side of the blocks that sparse convolutions are computed in: 1, 2, 4 or 8 at every
            level, or ``None`` for the size that a cost model chooses per level and mask, fitted to times measured on
            the device type (``geometry/block_costs.json``). Results are the same up to rounding.
        reuse: whether calls of an edit may take what comes up from coarser levels from an earlier call of it, computing
            the finest level only. A number is how far that may have moved in the base run since, as a share of its
            norm. ``"auto"`` is the number that quality was measured with, and ``"off"`` where a model offers no place
            to cut it; a number is refused there. ``compiled.edit(reuse=...)`` decides for one edit.
        disabled_passes: names of rewrite passes to leave out; their operations then run densely.
        extra_passes: your own rewrite passes (subclasses of :class:`fisedit_compiler.extend.Pass` or ``GraphPass``),
            each of which says what it comes ``after`` and ``before``.
        check_inputs: compare the input outside the mask with the recorded one at every call and refuse a
            mismatch (another seed, scheduler or guidance scale). Switch off only for synthetic calls.
        skip_recorded: dense calls of an edit that has no mask yet take the recorded output of every sample whose inputs
            are the recorded ones bit for bit, and compute the others only.
        spatial_inputs: names of the tensor arguments that hold images or latents; ``None`` asks the registry of
            known model classes, then takes every 4-D floating point tensor of the example call.
        multiple: the divisor of height and width (the model's total downsampling); ``None`` asks the registry,
            then tries powers of two.
        cache: keep captured and rewritten programs on disk for the next process (see ``FISEDIT_CACHE_DIR``).

    Raises:
        ConfigError: a field is outside the values above.
    """

    norm: Norm = "recorded"
    attention: Attention = "cached"
    dilation: int = 0
    backend: Backend = "auto"
    dense_above: float | None = None
    block_size: int | None = None
    reuse: Reuse = "off"
    disabled_passes: frozenset[str] = field(default_factory=frozenset)
    extra_passes: tuple[type[Any], ...] = ()
    check_inputs: bool = True
    skip_recorded: bool = True
    spatial_inputs: tuple[str, ...] | None = None
    multiple: int | None = None
    cache: bool = True

    def __post_init__(self) -> None:
        for name, choices in (("norm", Norm), ("attention", Attention), ("backend", Backend)):
            value = getattr(self, name)
            if value not in get_args(choices):
                raise ConfigError(f"SparsifyConfig.{name}={value!r} is unknown; choose one of {get_args(choices)}.")
        if isinstance(self.dilation, bool) or not isinstance(self.dilation, int) or self.dilation < 0:
            raise ConfigError(f"SparsifyConfig.dilation={self.dilation!r} must be a whole number of sites, 0 or more.")
        above = self.dense_above
        if above is not None and (
            isinstance(above, bool) or not isinstance(above, (int, float)) or not 0.0 <= above <= 1.0
        ):
            raise ConfigError(
                f"SparsifyConfig.dense_above={above!r} must be a share of the sites from 0.0 to 1.0 (1.0 for never), "
                "or None for the measured break-even."
            )
        size = self.block_size
        if size is not None and (isinstance(size, bool) or size not in BLOCK_SIZES):
            raise ConfigError(
                f"SparsifyConfig.block_size={size!r} must be one of {BLOCK_SIZES} sites, or None for the size that the "
                "cost model chooses per level and mask."
            )
        check_reuse(self.reuse, "SparsifyConfig.reuse")
        if self.multiple is not None and self.multiple < 1:
            raise ConfigError(f"SparsifyConfig.multiple={self.multiple!r} must be 1 or more.")
        object.__setattr__(self, "disabled_passes", frozenset(self.disabled_passes))
        object.__setattr__(self, "extra_passes", tuple(self.extra_passes))

    def backend_on(self, device_type: str) -> RunsOn:
        """What sparse calls run on there if nothing goes wrong: ``"inductor"`` needs CUDA."""
        return "inductor" if self.backend != "eager" and device_type == "cuda" else "eager"

    def program_key(self) -> Mapping[str, Any]:
        """The fields that change the compiled program, for the cache key (run-time switches are left out)."""
        return {
            "norm": self.norm,
            "attention": self.attention,
            "disabled_passes": sorted(self.disabled_passes),
            "extra_passes": [f"{extra.__module__}.{extra.__qualname__}" for extra in self.extra_passes],
        }


def check_reuse(value: Any, name: str) -> None:
    """Refuse what says nothing about reuse across steps.

    Raises:
        ConfigError: names the argument.
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if value not in ("off", "auto") if not number else not 0.0 < value < math.inf:
        raise ConfigError(f"{name}={value!r} must be 'off', 'auto', or a tolerance above 0 such as 0.1.")
