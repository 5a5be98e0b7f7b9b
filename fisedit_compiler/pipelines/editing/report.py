"""What an edit cost, as numbers and as text. Nothing is measured here."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from fisedit_compiler.masks import Region

_REGIONS_SHOWN = 3


@dataclass(frozen=True)
class Detection:
    """How an automatic mask was found.

    Attributes:
        detector: its name.
        steps: steps of the scheduler that it looked at.
        threshold: above which a site counted as changed; ``None`` if nothing differed.
        quiet: mean difference below the threshold over that above it: near 0 for a clearly local change.
        area: share of the sites in the mask.
        seconds: from the start of the run to the mask, the dense calls included.
    """

    detector: str
    steps: int
    threshold: float | None
    quiet: float | None
    area: float
    seconds: float

    def __str__(self) -> str:
        parts = [f"{self.detector} after {self.steps} step{'s' * (self.steps != 1)}, {self.seconds:.2f} s"]
        if self.threshold is not None:
            parts.append(f"threshold {self.threshold:.3g}")
        if self.quiet is not None:
            parts.append(f"quiet {self.quiet:.2f}")
        return ", ".join(parts)


@dataclass(frozen=True)
class Decoding:
    """How the edit's picture was made of its latents.

    Attributes:
        kind: ``"sparse"``, ``"dense"``, or ``"skipped"`` for the base's picture.
        area: share of the latent sites that the decoder computed: the mask and a border around it.
        seconds: duration.
        note: why it was dense, if there is more to say than that the mask is everywhere.
    """

    kind: str
    area: float
    seconds: float
    note: str = ""

    def __str__(self) -> str:
        if self.kind == "skipped":
            return "none, the picture is the base's"
        what = f"{self.area:.1%} of the sites with a border" if self.kind == "sparse" else "the whole picture"
        return f"{what}, {1000 * self.seconds:.1f} ms" + (f" ({self.note})" if self.note else "")


@dataclass(frozen=True)
class EditReport:
    """The cost of one edit; ``print(report)`` shows it.

    Attributes:
        mask_source: name of the detector, ``"user"`` or ``"none"`` (the base was returned without a run).
        area: share of the sites that the mask makes active, in [0, 1].
        detection: how an automatic mask was found; ``None`` if it was given.
        calls: ``(kind, seconds)`` of every UNet call, kind ``"dense"``, ``"sparse"``, ``"shallow"`` or
            ``"skipped"``. Of edits made in one run (``edit_many``) each has its share of the seconds.
        partial_calls: dense calls of which a part was recorded already, such as the unconditional half of the first.
        wall_seconds: duration of the whole edit, text encoder and decoder included; likewise a share.
        recording_bytes: size of the recordings the edit read from, those of all compiled parts.
        own_bytes: what the edit's own recordings added to them: the rows it wrote, of all compiled parts; 0 if it
            shares everything or was not recorded. ``edit.recording.own_nbytes`` is the UNet's share.
        restored_steps: steps after which latents outside the mask had to be set back to the base's: the end of
            an automatic mask's dense calls and the steps in which the scheduler remembers them. 0 with a mask
            given by the user, unless the base is an edit that had such steps itself or was feathered.
        regions: the connected regions of the mask, the largest first.
        feather: width in sites of the border in which the edit is blended with the base; 0 for a hard one.
        note: why nothing was run, or calls densely with a mask or without.
        decode: how the picture was decoded; ``None`` if nothing was run, or by the pipeline's VAE alone.
    """

    mask_source: str
    area: float
    detection: Detection | None = None
    calls: Sequence[tuple[str, float]] = field(default=(), repr=False)
    partial_calls: int = 0
    wall_seconds: float = 0.0
    recording_bytes: int = 0
    own_bytes: int = 0
    restored_steps: int = 0
    regions: Sequence[Region] = field(default=(), repr=False)
    feather: int = 0
    note: str = ""
    decode: Decoding | None = None

    @property
    def threshold(self) -> float | None:
        """The value above which the automatic mask took a site for changed."""
        return None if self.detection is None else self.detection.threshold

    @property
    def dense_calls(self) -> int:
        """UNet calls made densely: to find the mask, or above the break-even (see ``note``)."""
        return self._count("dense")

    @property
    def sparse_calls(self) -> int:
        """UNet calls that computed the active sites only."""
        return self._count("sparse")

    @property
    def shallow_calls(self) -> int:
        """Such calls that took what comes up from coarser levels from an earlier one (``reuse``)."""
        return self._count("shallow")

    @property
    def skipped_calls(self) -> int:
        """Calls answered from the recording alone."""
        return self._count("skipped")

    @property
    def dense_ms(self) -> float | None:
        """Median milliseconds of a dense call; ``None`` if there was none."""
        return self._median_ms("dense")

    @property
    def sparse_ms(self) -> float | None:
        """Median milliseconds of a sparse call; ``None`` if there was none."""
        return self._median_ms("sparse")

    @property
    def shallow_ms(self) -> float | None:
        """Median milliseconds of a shallow call; ``None`` if there was none."""
        return self._median_ms("shallow")

    def __str__(self) -> str:
        lines = [f"mask      {self.area:.1%} of the sites ({self.detection or self.mask_source})"]
        lines += self._regions()
        if self.feather:
            lines.append(
                f"feather   {self.feather} {'site' if self.feather == 1 else 'sites'} inside the mask's border"
            )
        for kind, count, median in (
            ("dense", self.dense_calls, self.dense_ms),
            ("sparse", self.sparse_calls, self.sparse_ms),
            ("shallow", self.shallow_calls, self.shallow_ms),
        ):
            if median is not None:
                partly = self._partly(count) if kind == "dense" else ""
                each = " each (median)" if count > 1 else ""
                lines.append(f"{kind:<9} {_calls(count)}{partly}, {median:.1f} ms{each}")
        if self.skipped_calls:
            lines.append(f"skipped   {_calls(self.skipped_calls)}")
        if self.decode is not None:
            lines.append(f"decoder   {self.decode}")
        read, added = self.recording_bytes / 2**20, self.own_bytes / 2**20
        lines.append(f"recording {read:.1f} MiB read, {added:.1f} MiB added")
        lines.append(f"wall      {self.wall_seconds:.2f} s")
        if self.note:
            lines.append(f"note      {self.note}")
        return "\n".join(lines)

    def _partly(self, count: int) -> str:
        """How many of the dense calls took a part of their result from the recording."""
        if not self.partial_calls:
            return ""
        return ", partly recorded already" if count == 1 else f" ({self.partial_calls} partly recorded already)"

    def _regions(self) -> list[str]:
        count = len(self.regions)
        lines = [f"{f'regions   {count}: ' if not i else ' ' * 13}{region}" for i, region in enumerate(self.regions)]
        more = [f"{' ' * 13}and {count - _REGIONS_SHOWN} smaller"] if count > _REGIONS_SHOWN else []
        return lines[:_REGIONS_SHOWN] + more

    def _count(self, kind: str) -> int:
        return sum(1 for seen, _ in self.calls if seen == kind)

    def _median_ms(self, kind: str) -> float | None:
        times = [seconds for seen, seconds in self.calls if seen == kind]
        return 1000.0 * statistics.median(times) if times else None


def _calls(count: int) -> str:
    return f"{count} call{'s' * (count != 1)}"
