"""The comfortable door: ``Editor`` makes images, edits them, and edits the edits.

It is a door only. What is compiled is ``pipelines.parts``'s business, the arguments of edits ``editing.arguments``'s,
edits ``editing.batch``'s, runs of the pipeline ``editing.driver``'s, pictures of the user's ``pipelines.inversion``'s,
the automatic mask's rules ``pipelines.detectors``'s, and the sparse work the compiled UNet's.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from fisedit_compiler.config import Reuse, SparsifyConfig
from fisedit_compiler.masks import Box, MaskLike, Polygon
from fisedit_compiler.module import SparseModule
from fisedit_compiler.pipelines.detectors import MaskDetector
from fisedit_compiler.pipelines.editing import refusals
from fisedit_compiler.pipelines.editing.arguments import Asked, requests
from fisedit_compiler.pipelines.editing.batch import run_edits
from fisedit_compiler.pipelines.editing.dense_runs import generate_base, run_dense
from fisedit_compiler.pipelines.editing.driver import Driver
from fisedit_compiler.pipelines.editing.one_run import only_run_of
from fisedit_compiler.pipelines.editing.runs import DenseRun, Edit, Generation
from fisedit_compiler.pipelines.editing.warm_up import warm_up
from fisedit_compiler.pipelines.inversion.load import DdimInversion, Loaded, Method, load
from fisedit_compiler.pipelines.inversion.pictures import ImageLike
from fisedit_compiler.pipelines.part_registry import usual_parts
from fisedit_compiler.pipelines.parts import UNET, Parts
from fisedit_compiler.pipelines.running.texts import Texts

Boxes = Box | Sequence[Box] | None
Polygons = Polygon | Sequence[Polygon] | None
Mask = MaskLike | MaskDetector | None
Names = Sequence[str] | Literal["usual"] | None
EDITOR_CONFIG = SparsifyConfig(norm="incremental", reuse="auto")
"""How an Editor compiles a UNet unless told otherwise. New objects change the statistics of every norm; with recorded
ones an edit looks less like the dense run, for less time and memory a call. Reuse across steps costs little of that
(``docs/quality.md`` has both)."""


class Editor:
    """Generate images with a diffusers pipeline and edit them, computing only what changes.

    The UNet is compiled on the first use (or ahead of it by ``prepare()``) and put into the pipeline; the original
    module is never patched, and ``close()`` or leaving a ``with`` block puts it back.

    ``pipe`` is a Stable-Diffusion-like pipeline that hands ``latents`` to its step callback; its UNet may be
    compiled already. ``config`` is a ``SparsifyConfig`` for that compilation, :data:`EDITOR_CONFIG` by default.
    ``progress`` switches the progress bars on or off; by default the pipeline's own setting counts
    (``pipe.set_progress_bar_config(disable=...)``). ``parts`` names what is compiled: with
    ``("unet", "vae.decoder")`` edits are decoded sparsely, too. ``"usual"`` is that on a GPU and the UNet alone
    elsewhere (:func:`~fisedit_compiler.pipelines.part_registry.usual_parts`); ``None`` stands for all that
    :data:`~fisedit_compiler.pipelines.parts.PARTS` knows.

    A pipeline makes one run at a time: its scheduler is the run's. Threads and tasks edit at once with a pipeline and
    an Editor each, which may share the compiled UNet and all other models.

    Raises:
        ConfigError: the pipeline is not of that kind, ``config`` was given for a compiled UNet, or a part is unknown.
    """

    def __init__(
        self, pipe: Any, config: SparsifyConfig | None = None, *, progress: bool | None = None, parts: Names = "usual"
    ) -> None:
        refusals.check_pipeline(pipe)
        self.pipe = pipe
        self.config = config
        self.progress = progress
        self._parts = Parts(pipe, config, EDITOR_CONFIG, (UNET,) if parts == "usual" else parts)
        self._chooses_parts = parts == "usual"
        self._texts = Texts()

    def __enter__(self) -> Editor:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def compiled(self) -> SparseModule:
        """The compiled UNet; compiles it if that has not happened yet. Same errors as :meth:`prepare`."""
        return self._ready[UNET]

    @property
    def _ready(self) -> Parts:
        if self._chooses_parts:  # not before: the pipeline may have been moved to its device meanwhile
            self._parts.add(usual_parts(self.pipe, self._parts.config), asked=False)
            self._chooses_parts = False
        self._parts.prepare(self._driver.shows_progress)
        return self._parts

    def prepare(
        self,
        *,
        height: int | None = None,
        width: int | None = None,
        guidance_scale: float = 5.0,
        options: Mapping[str, Any] | None = None,
    ) -> Editor:
        """Compile now instead of on the first use, and put what is compiled into the pipeline; returns the editor.

        On a GPU a short run and an edit of it are made, so that the first edit of this size waits for nothing. What is
        compiled stays on disk for the next process; ``fisedit compile`` does the same from a shell.

        Args:
            height: of the pictures to come, in pixels; the model's own size if left out.
            width: likewise.
            guidance_scale: of the runs to come; 1 or less turns guidance off and halves the batch.
            options: as in :meth:`generate`, for a pipeline that needs some.

        Raises:
            ConfigError: a setting is no number of its kind, or a size that the pipeline does not make.
            ModeError: the editor was closed, or someone else replaced ``pipe.unet`` meanwhile.
            CaptureError: the UNet cannot be captured.
            LoweringError: no code can be made for it, and its ``backend`` is ``"inductor"``.
        """
        self._driver.settings(
            seed=0, num_inference_steps=1, guidance_scale=guidance_scale, height=height, width=width, options=options
        )
        warm_up(self, height=height, width=width, guidance_scale=guidance_scale, options=options)
        return self

    def close(self) -> None:
        """Put the original modules back and forget encoded texts; closing twice is fine.

        Waits while another thread compiles.

        Raises:
            ModeError: another thread's run of the pipeline is going on; close the editor after it.
        """
        with only_run_of(self.pipe):  # exchanging a module in the middle of a run would spoil it
            self._parts.restore()
            self._texts.clear()

    def generate(
        self,
        prompt: str,
        *,
        seed: int,
        negative_prompt: str | None = None,
        num_inference_steps: int = 25,
        guidance_scale: float = 5.0,
        height: int | None = None,
        width: int | None = None,
        maps: int = 0,
        options: Mapping[str, Any] | None = None,
    ) -> Generation:
        """Make an image densely and record what its edits will need.

        Args:
            prompt: what to draw.
            seed: of the noise; drawn on the CPU, so that every machine draws the same.
            negative_prompt: what to keep away from.
            num_inference_steps: steps of the scheduler.
            guidance_scale: weight of classifier-free guidance; 1 or less turns it off. A UNet with embedded
                guidance gets it as an input.
            height: of the image in pixels; the model's own size if left out.
            width: likewise.
            maps: of how many UNet calls, from the first on, cross-attention maps are kept too: while an edit's mask
                is looked for, its unchanged words then attend as they did here.
            options: further arguments of the pipeline's call, by name, such as the ``image`` of a ControlNet; edits
                repeat them.

        Raises:
            PromptError: a prompt is no string, or longer than the text encoder reads.
            ConfigError: a setting is no number of its kind, the pipeline takes no argument of that name, or the Editor
                gives it itself.
            FiseditError: another of its subclasses, if the UNet cannot be compiled or recorded.
        """
        self._check_prompts(prompt, negative_prompt)
        settings = self._driver.settings(
            seed=seed,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            height=height,
            width=width,
            options=options,
        )
        return generate_base(self._driver, lambda: self._ready, prompt, negative_prompt, settings, maps)

    def load(
        self,
        image: ImageLike,
        prompt: str,
        *,
        seed: int = 0,
        negative_prompt: str | None = None,
        num_inference_steps: int = 25,
        guidance_scale: float = 5.0,
        inversion: Method | DdimInversion = "auto",
        resize: bool = False,
        measure: bool = True,
        maps: int = 0,
        options: Mapping[str, Any] | None = None,
    ) -> Loaded:
        """Take a picture that was not generated here, so that it can be edited like one that was.

        The picture is encoded, a path from its latents to noise is made, and a run is led along the path back and
        recorded. Edits follow the same corrections inside their mask; outside it the user's own pixels come back.
        See docs/inversion.md.

        Args:
            image: a PIL image, the path of an image file, a numpy array ``[height, width, 3]`` or a torch tensor
                ``[3, height, width]``, uint8 or float in [0, 1]; in full
                :func:`fisedit_compiler.pipelines.inversion.pictures.read_picture`.
            prompt: what the picture shows, in the model's words; the better it fits, the better edits are. It may be
                empty.
            seed: of edit-friendly noise, and of what the scheduler draws.
            negative_prompt: what edits keep away from.
            num_inference_steps: steps of the scheduler.
            guidance_scale: weight of classifier-free guidance in the recorded run and in edits.
            inversion: ``"ddim"``, ``"edit-friendly"``, DDIM with other settings as a
                :class:`~fisedit_compiler.pipelines.DdimInversion`, or ``"auto"``: DDIM if the noise it finds
                gives the picture back by itself, which is measured, otherwise edit-friendly noise.
            resize: scale and crop a picture of another size to one that the model takes; off, such a picture is
                refused.
            measure: run once more without the corrections, to report how well the noise alone gives the picture back;
                costs a UNet call a step. ``"auto"`` measures DDIM's in any case.
            maps: as in :meth:`generate`.
            options: as in :meth:`generate`.

        Raises:
            PictureError: the picture is unreadable, of a wrong type, size or mode, transparent, or holds NaN.
            PromptError: a prompt is no string, or longer than the text encoder reads.
            ConfigError: the pipeline has no VAE encoder or takes no such option, ``inversion`` is unknown, or the
                scheduler cannot do it.
        """
        self._check_prompts(prompt, negative_prompt)
        with only_run_of(self.pipe):
            return load(
                self._driver,
                lambda: self._ready,
                image,
                prompt,
                negative_prompt=negative_prompt,
                seed=seed,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                inversion=inversion,
                resize=resize,
                measure=measure,
                maps=maps,
                options=options,
            )

    def edit(
        self,
        base: Generation,
        prompt: str,
        *,
        mask: Mask = None,
        box: Boxes = None,
        polygon: Polygons = None,
        feather: int = 0,
        dense_calls: int | None = None,
        negative_prompt: str | None = None,
        record: bool = True,
        reuse: Reuse | None = None,
        seed: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
    ) -> Edit:
        """Change the prompt of ``base`` and compute only the sites of the mask again.

        Seed, steps, guidance, size and scheduler are the base's; ``seed``, ``num_inference_steps`` and
        ``guidance_scale`` may be repeated, but not changed. The same prompts, or an empty mask, return the
        base's image without a sparse call.

        Args:
            base: a generation, or an earlier edit made with ``record=True``.
            prompt: the new text.
            mask: what to change, in any form :func:`fisedit_compiler.masks.to_site_mask` takes, at the latent's
                or the image's size. ``None``, without ``box`` and ``polygon``, finds it: the first steps run densely,
                and the mask is where the latents leave the base's; if that is everywhere, the whole run is dense. The
                name of a detector (:func:`~fisedit_compiler.pipelines.detectors.mask_detectors`) or a
                :class:`~fisedit_compiler.pipelines.detectors.MaskDetector` finds it by another rule.
            box: ``(top, left, bottom, right)`` as fractions of the picture, or several of them. Without ``mask`` the
                boxes and polygons are the mask; a drawn mask counts inside them only, and so does one that is
                found (``mask="auto"``).
            polygon: three or more points ``(y, x)`` as fractions of the picture, or several such lists; as ``box``.
            feather: latent sites along the mask's border, inside it, in which the edit fades into the base; 0 for
                a hard border. See :func:`fisedit_compiler.masks.feather_weights`.
            dense_calls: steps the automatic mask is found in at most, each costs a dense UNet call; the detector's own
                number if left out.
            negative_prompt: the base's if left out.
            record: keep a recording of the edited run, so that the edit can be edited; costs the memory of what
                the edit wrote (``report.own_bytes``), the rest is shared with the base's. An edit keeps its base in
                memory either way (``edit.base``).
            reuse: whether calls may take what comes up from coarser levels from earlier calls of the edit, as
                ``SparsifyConfig.reuse``, whose value it is if left out.
            seed: the base's.
            num_inference_steps: the base's.
            guidance_scale: the base's.

        Raises:
            PromptError: a prompt is no string, or longer than the text encoder reads.
            MaskError: the mask has the wrong size, type or contents, a box or polygon is none or leaves the picture,
                or a drawn mask lies outside them.
            RecordingError: the scheduler was changed, or the base has no recording or another model's.
            ConfigError: ``base`` is no generation; another seed, number of steps or guidance than the base's, or
                ``dense_calls`` or ``feather`` out of range.
        """
        started = time.perf_counter()
        self._check(base, seed, num_inference_steps, guidance_scale)
        asked = Asked.of_one(prompt, negative_prompt, mask, box, polygon, feather, dense_calls)
        return self._edits(base, asked, record, reuse, started)[0]

    def edit_many(
        self,
        base: Generation,
        prompts: Sequence[str],
        *,
        mask: Mask | Sequence[Mask] = None,
        box: Box | Sequence[Boxes] | None = None,
        polygon: Polygon | Sequence[Polygons] | None = None,
        feather: int | Sequence[int] = 0,
        dense_calls: int | Sequence[int | None] | None = None,
        negative_prompt: str | Sequence[str | None] | None = None,
        record: bool = True,
        reuse: Reuse | None = None,
        seed: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
    ) -> list[Edit]:
        """Make several edits of ``base`` in one run: every UNet call computes all prompts.

        Arguments are those of :meth:`edit`, one for all edits or a list with one for each. A call computes the sites of
        all masks for every prompt; each edit keeps the base outside its own mask. With one mask for all, each is the
        edit that :meth:`edit` makes, up to float tolerance. Prompts and masks that change nothing return the base, as
        there. Where masks are found, calls are dense until the last one is; if one prompt changes the whole picture,
        all of them run densely. A mistake in what one edit has of its own is told as "edit 2 of 3: ...".

        Args:
            base: a generation, or an earlier edit made with ``record=True``.
            prompts: the new texts; the edits come in their order.
            mask: one for all, or a list, tuple or stack of one each, in any form :meth:`edit` takes. ``None`` finds
                one for each prompt. Masks are given to all edits, by ``mask`` or by shapes, or found for all.
            box: one box for all, or a list of one for each: a box, several of them, or ``None``.
            polygon: one polygon for all, or a list of one for each, likewise.
            feather: width of the border in which each edit fades into the base.
            dense_calls: steps automatic masks are found in at most; the detector's own number if left out.
            negative_prompt: the base's if left out, or where a list has ``None``.
            record: keep a recording of every edit, so that each can be edited in turn.
            reuse: as in :meth:`edit`; one for all.
            seed: the base's.
            num_inference_steps: the base's.
            guidance_scale: the base's.

        Raises:
            PromptError: no list of prompts, or one that is no string or too long.
            MaskError: a mask has the wrong size, type or contents, or there is another number of masks than of prompts;
                a box or polygon is none or leaves the picture, or a drawn mask lies outside them.
            RecordingError: the scheduler was changed, or the base has no recording or another model's.
            ConfigError: ``base`` is no generation; another seed, number of steps or guidance than the base's, or
                ``dense_calls`` or ``feather`` out of range.
        """
        started = time.perf_counter()
        self._check(base, seed, num_inference_steps, guidance_scale)
        asked = Asked.of_many(prompts, negative_prompt, mask, box, polygon, feather, dense_calls)
        return self._edits(base, asked, record, reuse, started)

    def _check(
        self, base: Generation, seed: int | None, num_inference_steps: int | None, guidance_scale: float | None
    ) -> None:
        """Refuse what no edit starts from, and settings that are not its own."""
        refusals.check_base(base)
        refusals.check_same("seed", seed, base.settings.seed)
        refusals.check_same("num_inference_steps", num_inference_steps, base.settings.num_inference_steps)
        refusals.check_same("guidance_scale", guidance_scale, base.settings.guidance_scale)

    def _edits(self, base: Generation, asked: Asked, record: bool, reuse: Reuse | None, started: float) -> list[Edit]:
        made = requests(self.pipe, base, asked, record=record, reuse=reuse, started=started)
        with only_run_of(self.pipe):
            return run_edits(self._driver, lambda: self._ready, made)

    def dense(self, base: Generation, prompt: str, *, negative_prompt: str | None = None) -> DenseRun:
        """Run ``prompt`` with the base's noise and settings through the UNet in no mode, for comparison.

        Raises:
            PromptError: a prompt is no string, or longer than the text encoder reads.
            ConfigError: ``base`` is no generation.
            RecordingError: the scheduler was changed since the base was made.
        """
        refusals.check_base(base)
        refusals.check_same_scheduler(base.settings.scheduler, self.pipe.scheduler, base.settings.num_inference_steps)
        negative = base.negative_prompt if negative_prompt is None else negative_prompt
        self._check_prompts(prompt, negative)
        return run_dense(self._driver, lambda: self.compiled, base, prompt, negative)

    @property
    def _driver(self) -> Driver:
        return Driver(self.pipe, self.progress, self._texts)

    def _check_prompts(self, prompt: str, negative_prompt: str | None) -> None:
        refusals.check_prompt(self.pipe, prompt)
        if negative_prompt is not None:
            refusals.check_negative_prompt(self.pipe, negative_prompt)
