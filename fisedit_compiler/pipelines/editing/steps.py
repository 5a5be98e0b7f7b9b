"""What happens between two steps of a run: the callbacks an Editor hands to a diffusers pipeline.

A callback sees the latents after every step and may replace them. That is the only way an Editor touches a
run.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from fisedit_compiler import masks
from fisedit_compiler.errors import MaskError, RecordingError
from fisedit_compiler.pipelines.callbacks import Tensors
from fisedit_compiler.pipelines.detectors import DetectedMask, MaskDetector
from fisedit_compiler.pipelines.editing.region import cut_found
from fisedit_compiler.pipelines.editing.report import Detection
from fisedit_compiler.runtime.sessions.edit_masks import EditMask
from fisedit_compiler.tensors.bits import differs
from fisedit_compiler.tensors.deferred import DeferredChecks


class KeepLatents:
    """Keeps the latents of every step and changes nothing."""

    def __init__(self) -> None:
        self.latents: list[torch.Tensor] = []

    def __call__(self, pipe: Any, step: int, timestep: Any, tensors: Tensors) -> Tensors:
        # A scheduler may reuse its buffers, so each step is copied.
        self.latents.append(tensors["latents"].detach().clone())
        return tensors


class FollowBase:
    """Keeps one edit on its base outside the mask, and finds the mask first if none was given.

    A mask is given or the detector that finds one. Until it is known the UNet runs densely under the new prompt,
    and the detector sees every step, ``dense_calls`` of them at most. From then on the latents outside the mask
    are set to the base's after every step. In a sparse step of a stateless scheduler they are so already, bit
    for bit; the step that ends the dense calls needs it, and so do multistep schedulers for as long as they
    remember a dense call. A mask that is found is grown by ``dilation``; an edit that finds nothing to change is the
    base from then on.

    With ``feather`` the latents of the sites along the mask's border (inside it) are a blend of the edit's and the
    base's after every step, by :func:`~fisedit_compiler.masks.feather_weights` and ``weights_per_step``. Outside
    the weight is 0, so nothing changes for what the UNet reads there. The blend is of the sample only: what a
    multistep scheduler remembers of earlier calls (DPM++, PNDM) is the edit's own, and one that keeps a sample of its
    own (Heun between its two calls, PNDM at its start, UniPC's corrector) sees the blend through the UNet's next
    prediction. ``region`` cuts a mask that is found.

    With ``strict`` nothing outside may need to be set back: the calls are sparse from the first on, and the base's were
    too. If something does, it is not the base's run that is followed, and what is inside the mask is wrong, too.

    Attributes:
        latents: the edit's after every step, ``[1, C, H, W]``.
        detected: what the detector found, ``None`` until then and without one.
        detection: how, likewise.
        kept: the mask outside which the base is kept; ``None`` until it is known, and if there is no outside.
        nothing: why there is nothing to change, once that is known.
    """

    def __init__(
        self,
        base_latents: Sequence[torch.Tensor],
        mask: EditMask | MaskDetector,
        dense_calls: int = 0,
        *,
        dilation: int = 0,
        region: torch.Tensor | None = None,
        feather: int = 0,
        strict: bool = False,
    ) -> None:
        self.latents: list[torch.Tensor] = []
        self.detected: DetectedMask | None = None
        self.detection: Detection | None = None
        self.kept: EditMask | None = None
        self.nothing: str | None = None
        self.base_latents = base_latents
        self._dense_calls = dense_calls
        self._detector = mask if isinstance(mask, MaskDetector) else None
        self._started = time.perf_counter()
        self._dilation = dilation
        self._region = region
        self._feather = feather
        self._mask: torch.Tensor | None = None
        self._weights: torch.Tensor | None = None
        self._restored: list[torch.Tensor] = []
        self._checks = DeferredChecks() if strict else None
        if isinstance(mask, EditMask):
            self._keep_outside(mask)

    @property
    def is_searching(self) -> bool:
        """Whether the mask is still looked for."""
        return self._detector is not None and self.detected is None

    @property
    def mask(self) -> torch.Tensor:
        """The mask as calls use it, grown by the configured dilation; bool ``[H, W]``, on the CPU. Not known before
        :attr:`is_searching` is over."""
        if self.kept is not None:
            return self.kept.grown.cpu()
        assert self.detected is not None  # a mask is given or found
        return self.detected.mask

    @property
    def restored_steps(self) -> int:
        """Steps after which latents outside the mask differed from the base's and were set back."""
        return int(torch.stack(self._restored).sum()) if self._restored else 0

    def __call__(self, pipe: Any, step: int, timestep: Any, tensors: Tensors) -> Tensors:
        latents = tensors["latents"]
        if step >= len(self.base_latents):
            raise RecordingError(
                f"the pipeline makes step {step + 1}, but the base has {len(self.base_latents)}; "
                "put the base's scheduler back"
            )
        base = self.base_latents[step]
        if self._detector is not None and self.detected is None:
            self._find_mask(self._detector, step, latents, base)
        if self.nothing is not None:
            return {"latents": base}
        if self._mask is not None:
            restored = torch.where(self._mask, latents, base)
            # The flag stays on the device: reading it here would make the GPU wait at every step.
            moved = differs(latents, restored).any()
            self._restored.append(moved)
            if self._checks is not None:
                self._checks.poll()
                self._checks.add(moved, lambda: _left_its_base(step))
            if self._weights is not None:
                # In float32, or half precision would round once a step more than the scheduler does.
                blended = torch.lerp(base.float(), latents.float(), self._weights).to(base.dtype)
                restored = torch.where(self._mask, blended, base)
            self.latents.append(restored.detach())
            # A pipeline may write to what it gets.
            return {"latents": restored.clone()}
        self.latents.append(latents.detach().clone())
        return {"latents": latents}

    def finish(self) -> None:
        """Judge what was not waited for while the run went on.

        Raises:
            RecordingError: sites outside the mask left the base.
        """
        if self._checks is not None:
            self._checks.wait()

    def _find_mask(self, detector: MaskDetector, step: int, latents: torch.Tensor, base: torch.Tensor) -> None:
        detector.update(latents, base)
        last = step + 1 >= self._dense_calls
        found = detector.decide(last)
        if found is None:
            if last:
                raise MaskError(f"the mask detector {detector.name!r} did not decide after its last step ({step + 1})")
            return
        self.detected = kept = cut_found(found, self._region)
        self.detection = Detection(
            detector=detector.name,
            steps=step + 1,
            threshold=found.threshold,
            quiet=found.quiet,
            area=masks.area(kept.mask),
            seconds=time.perf_counter() - self._started,
        )
        if kept.everywhere:
            return  # nothing to keep: without a mask the session runs the other calls densely, too
        if not bool(kept.mask.any()):
            beside = "nothing of the change that was found lies inside the box or polygon"
            self.nothing = beside if bool(found.mask.any()) else "the latents do not differ from the base's"
            return
        self._keep_outside(EditMask.of(kept.mask, self._dilation))

    def _keep_outside(self, mask: EditMask) -> None:
        device = self.base_latents[0].device
        self.kept, self._mask = mask, mask.grown.to(device)
        if self._feather:
            weights = masks.feather_weights(mask.grown, self._feather)
            self._weights = masks.weights_per_step(weights, len(self.base_latents)).to(device)


def _left_its_base(step: int) -> RecordingError:
    return RecordingError(
        f"After step {step + 1} latents outside the mask are not the base's, though every prediction there was: the "
        "run does not follow its base. Something draws other noise than the base's run did, or mixes all sites between "
        "two UNet calls (rescaled guidance, dynamic thresholding, a scheduler or a pipeline of your own). Use a "
        "scheduler whose step is element-wise and draws from the generator it is given; the base is untouched."
    )
