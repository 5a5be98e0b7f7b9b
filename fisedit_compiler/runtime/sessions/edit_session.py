"""Editing a recorded run: a session sees its calls one by one and decides how each of them runs.

Whether a call fits the recording is found out in ``agreement.py``, what the calls leave behind is put together in
``edit_recorder.py``. A session owns no graph: running is ``executable.py``'s business, entering and leaving the mode
``module.py``'s.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

from fisedit_compiler import masks
from fisedit_compiler.config import Reuse, SparsifyConfig
from fisedit_compiler.errors import ConfigError
from fisedit_compiler.geometry.site_plan import SitePlan
from fisedit_compiler.recordings.recording import CallRecord, Recording
from fisedit_compiler.recordings.upcoming import Upcoming
from fisedit_compiler.runtime.calls.call import Call, CallKind
from fisedit_compiler.runtime.calls.programs import ProgramStore
from fisedit_compiler.runtime.execution.executable import Executable
from fisedit_compiler.runtime.sessions.agreement import Agreement
from fisedit_compiler.runtime.sessions.copies import OwnSites
from fisedit_compiler.runtime.sessions.dense_calls import DenseCalls
from fisedit_compiler.runtime.sessions.edit_masks import EditMasks
from fisedit_compiler.runtime.sessions.edit_recorder import EditRecorder
from fisedit_compiler.runtime.sessions.fallback import dense_reason_of_grown, pin, pinning_plan, run_densely
from fisedit_compiler.runtime.sessions.measured import Measured
from fisedit_compiler.runtime.sessions.reuse import ReusePlan
from fisedit_compiler.slots.turn import Turn
from fisedit_compiler.tensors.contents import Later

logger = logging.getLogger(__name__)


class EditSession:
    """Runs calls against a recording: densely until a mask is set, sparsely (or pinned, see ``fallback``) from then on.

    Attributes:
        recording: the base run.
        copies: how many edits are made at once; a call has so many times the recorded batch.
        call: calls made so far.
        edit_masks: the masks of all edits, or ``None`` while calls run densely.
        fallback: why calls with the mask run densely, as a sentence; ``None`` if they run sparsely.
        timings: kind and wall seconds of every call (on CUDA: of its launch).
        computed_samples: how many samples of the batch every call computed: fewer than the batch where a dense call
            found some recorded already, none if it was skipped.
        reused_maps: for every call, whether columns of recorded cross-attention maps took part.
        is_empty: whether the mask is empty, so that calls give the recorded outputs back.
        ran: the program of the last sparse call, its batch, bytes of an element and type of device.
        reuse: which calls are shallow: they take what comes up from coarser levels from the last full one.
    """

    def __init__(
        self,
        recording: Recording,
        config: SparsifyConfig,
        mask: Any = None,
        record: bool = False,
        copies: int = 1,
        programs: ProgramStore | None = None,
        explain: Callable[[EditSession], Any] = str,
        reuse: Reuse | None = None,
    ) -> None:
        """``explain`` answers :meth:`explain`; other arguments are those of ``compiled.edit()``."""
        if isinstance(copies, bool) or not isinstance(copies, int) or copies < 1:
            raise ConfigError(f"copies={copies!r}: it is the number of edits made at once, a whole number from 1 on")
        self.recording, self.config, self.copies, self.programs = recording, config, copies, programs
        self._explain = explain
        self.call = 0
        self.edit_masks: EditMasks | None = None
        self.plan: SitePlan | None = None
        self.fallback: str | None = None
        self._recorder = EditRecorder(recording, copies, record)
        self.timings: list[tuple[CallKind, float]] = []
        self.computed_samples: list[int] = []
        self.reused_maps: list[bool] = []
        self._computed, self._reused = 0, False
        self._later: Later | None = None
        self._dense = DenseCalls(recording, config.skip_recorded, copies)
        named = () if programs is None else (programs.name_now,)
        self._agreement = Agreement(recording, config, copies, *named)
        self.is_empty = False
        self._mask_set_at = 0
        self.ran: tuple[Executable, int, int, str] | None = None
        self._turn: Turn | None = None
        self._own_sites: OwnSites | None = None
        self._compiled = False
        self.reuse = ReusePlan(recording, config.reuse if reuse is None else reuse)
        if mask is not None:
            self.set_mask(mask)
        self._upcoming = Upcoming(recording)

    @property
    def mask(self) -> Tensor | None:
        """bool ``[H, W]`` at the spatial input's resolution, of several masks their union; ``None`` without one."""
        return None if self.edit_masks is None else self.edit_masks.sites

    @property
    def masks(self) -> Tensor | None:
        """bool ``[copies, H, W]`` if the copies have different masks, else ``None``."""
        return None if self.edit_masks is None else self.edit_masks.each

    @property
    def result(self) -> Recording | None:
        """With ``record=True``, the edited run as a recording of its own; of several copies see ``results``."""
        return self.results[0] if self.copies == 1 and self.results else None

    @property
    def results(self) -> tuple[Recording, ...]:
        """With ``record=True``, the edited run as a recording of its own, one for each copy."""
        return self._recorder.results

    def set_mask(self, mask: Any, *, densely: str | None = None) -> None:
        """Edit inside the mask only from the next call on: sparsely, or densely above the break-even (``fallback``).

        Args:
            mask: what to change, as anything :func:`fisedit_compiler.masks.to_site_mask` accepts: bool or uint8 or
                float torch tensor or numpy array or PIL image or path, at latent resolution or a multiple of it. With
                ``copies``, one for all of them or a sequence or stack ``[copies, H, W]`` of one each. Or masks that
                were read already, as :class:`~fisedit_compiler.runtime.sessions.edit_masks.EditMasks`.
            densely: why calls are to run densely whatever the mask's area, as a sentence (becomes ``fallback``).

        Raises:
            MaskError: its size, dtype or contents do not fit the recording, or their number does not.
        """
        size = (self.recording.height, self.recording.width)
        edited = self.edit_masks = EditMasks.of(mask, self.copies, *size, self.config.dilation)
        self._agreement.set_masks(edited.each_grown)
        self.plan = self._turn = self._own_sites = None
        self.reuse.forget()
        self._mask_set_at = len(self.timings)
        self.is_empty = not bool(edited.sites.any())
        reason = densely or dense_reason_of_grown(edited.grown, self.config, self.recording.device)
        told, self.fallback = self.fallback, reason
        if self.fallback is not None and told is None:
            logger.info(self.fallback)

    def reuse_maps(self, columns: Tensor | None) -> None:
        """Take columns of the base's cross-attention maps in dense calls while no mask is set (prompt-to-prompt).

        Attention to a word that both prompts have then stays where it was in the base, so that the latents move less
        where nothing is to change. Calls that the recording has no maps of run as they would without.

        Args:
            columns: int64 ``[T]``, or ``[B, T]`` with a row for each sample of the batch (with guidance, a row of -1
                for the unconditional half): for every token of the edited prompt, padding included, the token of the
                base's prompt whose column it takes, or -1 for its own. See
                :func:`fisedit_compiler.pipelines.editing.words.token_columns`. ``None`` switches it off.

        Raises:
            ConfigError: another dtype or shape, or a token that the base's text does not have.
            RecordingError: the recording has no maps: record with ``compiled.record(maps=...)``.
        """
        self._dense.reuse(columns)

    def before(self) -> str | None:
        """Look whether the module is still the one that was recorded; see :mod:`.agreement`.

        Returns:
            The module's structure at this call: seen, or as it was recorded where a look at it comes behind the launch.

        Raises:
            RecordingError: its weights are not those of the recording any more.
        """
        if self.programs is None:
            return None
        if not self._agreement.looks_first(self.call) and self.call < self.recording.num_calls:
            return self.recording.calls[self.call].structure or None
        now = self.programs.glance()
        self._agreement.weights(now.weights, self.call)
        return now.structure

    def handle(self, call: Call) -> Any:
        self._upcoming.begin(self.call)
        base = self._agreement.before(call, self.call)
        self._later = self._recorder.later = self._agreement.later(call, self.call)
        start = time.perf_counter()
        self._computed, self._reused = base.batch, False
        kind, result = self._run(call, base)
        self.timings.append((kind, time.perf_counter() - start))
        self.computed_samples.append(self._computed)
        self.reused_maps.append(self._reused)
        self._agreement.after(call, self.call, base, result, self._later)
        if self.programs is not None and not self._agreement.looks_first(self.call):
            now = self.programs.glance()
            self._agreement.weights(now.weights, self.call)
            self._agreement.structure(call, now.structure, base, self.call)
        self.call += 1
        return result

    def finish(self) -> None:
        """Check that the run made as many calls as the recording has, with inputs that fit it.

        Raises:
            RecordingError: it made fewer, or the inputs of one of them were others.
        """
        if self.programs is not None:
            self._agreement.weights(self.programs.key.weights, self.call)
        self._agreement.finish(self.call)
        self._recorder.finish()

    def explain(self) -> Any:
        """What the calls of this edit run as: how much is active, in what blocks, at what cost, and why if densely.

        Returns:
            An :class:`~fisedit_compiler.inspect.explanation.Explanation`. Formulas are evaluated for the recorded calls
            and prompts of 77 tokens.
        """
        return self._explain(self)

    def measured(self) -> tuple[Measured, ...]:
        """The median times of this session's calls by kind; of calls that need a mask, those with the last one."""
        recorded = self.recording.calls[0]
        size = (recorded.batch * self.copies, recorded.height, recorded.width)
        area = 0.0 if self.edit_masks is None else masks.area(self.edit_masks.grown)
        found = []
        for kind in ("dense", "sparse", "shallow", "skipped"):
            timings = list(zip(self.timings, self.computed_samples, strict=True))
            if kind != "dense":
                timings = timings[self._mask_set_at :]
            # A dense call that computed a part of the batch says nothing about what a dense call costs.
            whole = 0 if kind == "skipped" else size[0]
            seconds = [took for (ran_as, took), samples in timings if ran_as == kind and samples == whole]
            if seconds:
                share = 1.0 if kind == "dense" else area
                found.append(Measured(kind, len(seconds), median(seconds), *size, share, self.recording.device))
        return tuple(found)

    def _run(self, call: Call, base: CallRecord) -> tuple[CallKind, Any]:
        executable, edited = call.executable, self.edit_masks
        if edited is None:
            ran = self._dense.run(call, base, record=bool(self._recorder))
            self._computed, self._reused = ran.samples, ran.reused
            if ran.kind == "skipped":
                self._recorder.unchanged(call, maps=True)
            else:
                self._recorder.dense(call, ran.slots)
            return ran.kind, ran.result
        if self.is_empty:
            recorded = executable.base_outputs(base.slots)
            if recorded is not None:
                self._computed = 0
                # Maps are of the base's text, which need not be this call's.
                self._recorder.unchanged(call, maps=False)
                return "skipped", executable.assemble(recorded)
        if self.fallback is not None:
            if self.plan is None:
                self.plan = pinning_plan(edited.grown, executable.program, 0, call.sample.device)
                # A run of one call, as a decoder's is, never saves what a compilation takes.
                self._compiled = self.recording.num_calls > 1 and executable.expect_dense(call.tensors)
            own = self._own(executable, call.sample.device)
            result, slots = run_densely(
                call, base, own or self.plan, record=bool(self._recorder), compiled=self._compiled
            )
            self._recorder.dense(call, slots)
            return "dense", result
        if self.plan is None:
            self.plan = executable.plans.of(edited.grown, 0, call.sample)
        scalars = {} if base.timestep is None else {"timestep": base.timestep}
        sample = call.sample
        self.ran = (executable, sample.shape[0], sample.element_size(), sample.device.type)
        update = bool(self._recorder)
        held = self.reuse.start(executable)
        shallow = held is not None and self.reuse.is_shallow(self.call, executable, self.plan, sample)
        outputs, updates = executable.step(
            call.tensors,
            base.slots,
            self.plan,
            update=update,
            scalars=scalars,
            later=self._later,
            held=held,
            shallow=shallow,
        )
        own = self._own(executable, sample.device)
        if own is not None:
            outputs = pin(outputs, executable.program, base.slots, own)
        if self._turn is None:
            self._turn = Turn(self.plan.active)
        self._recorder.sparse(call, self._turn, outputs, updates, own, self.reuse.full if shallow else None)
        return "shallow" if shallow else "sparse", executable.assemble(outputs)

    def _own(self, executable: Executable, device: torch.device) -> OwnSites | None:
        """What each copy may change, if that differs."""
        samples = self.recording.calls[self.call].batch
        edited, own = self.edit_masks, self._own_sites
        if edited is not None and edited.differ and (own is None or own.samples != samples):
            self._own_sites = OwnSites(edited.each_grown, samples, executable.program, device)
        return self._own_sites
