"""The object ``sparsify`` returns: the user's module with two modes.

In no mode it *is* the original module (one attribute look-up and one call away). What a mode does with a call is
written in ``runtime/sessions/``, how programs are found or compiled in ``runtime/calls/programs.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fisedit_compiler.capture import ambient
from fisedit_compiler.compiling import computing
from fisedit_compiler.config import Reuse, SparsifyConfig
from fisedit_compiler.errors import ConfigError, ModeError, RecordingError
from fisedit_compiler.inspect.explain import TEXT_TOKENS, explain_module
from fisedit_compiler.inspect.explain_session import explain_session
from fisedit_compiler.inspect.explanation import Explanation
from fisedit_compiler.inspect.stages import Stages, choose_program, stages_of
from fisedit_compiler.lowering.program import CompiledProgram
from fisedit_compiler.recordings.finite import check_finite
from fisedit_compiler.recordings.recording import Recording
from fisedit_compiler.runtime.calls.programs import ProgramStore
from fisedit_compiler.runtime.sessions.edit_session import EditSession
from fisedit_compiler.runtime.sessions.measured import Measured
from fisedit_compiler.runtime.sessions.modes import OTHER_THREADS, Body, Mode, Modes
from fisedit_compiler.runtime.sessions.record_session import RecordSession

if TYPE_CHECKING:
    from fisedit_compiler.inspect.bisect import BisectReport
    from fisedit_compiler.inspect.check import CheckReport
    from fisedit_compiler.inspect.subject import CheckOptions, Subject


class SparseModule(nn.Module):
    """A module that can record its calls and replay them sparsely under another prompt.

    Threads and asyncio tasks may each be in a mode of their own, on one set of weights; one that is in none calls the
    original. A thread has a part in the run of another one if it was given its context (``asyncio.to_thread``,
    ``contextvars.copy_context().run``).

    Made by :func:`fisedit_compiler.sparsify`. Attributes the wrapper does not have (``config``, ``dtype``,
    ``device``, ``add_embedding``, ...) are the original module's, so a stock diffusers pipeline accepts it.

    Attributes:
        original: the user's module, unpatched.
        sparsify_config: the configuration it was compiled with.
    """

    def __init__(self, original: nn.Module, config: SparsifyConfig) -> None:
        super().__init__()
        self.original = original
        self.sparsify_config = config
        self._programs = ProgramStore(original, config)
        self._modes = Modes()
        self._measured: dict[str, Measured] = {}
        self._recorded_calls: int | None = None
        self.training = original.training
        # diffusers writes module and class name of every part into model_index.json; see also __class__.
        self.__module__ = type(original).__module__

    # -- calls -----------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original's forward, or the active mode's version of it; same arguments, same output type."""
        if not self._modes.is_idle:
            return self._in_mode(args, kwargs)
        if torch.compiler.is_dynamo_compiling():  # `is_compiling` says what any thread does
            return self.original(*args, **kwargs)
        with computing():
            return self.original(*args, **kwargs)

    @torch.compiler.disable(reason="calls inside record() and edit() run programs of their own")  # type: ignore[untyped-decorator]
    def _in_mode(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        run = self._modes.session()
        if run is None:
            with computing():
                return self.original(*args, **kwargs)
        ambient.refuse_foreign_modes()
        ambient.refuse_arguments(args, kwargs)
        state = ambient.Ambient.now()
        with run.one_call(), computing(), state.neutral(), torch.no_grad():
            call, wrap = self._programs.bind(args, kwargs, state, run.session.before())
            return wrap(run.session.handle(call))

    # -- modes -----------------------------------------------------------------------------------

    def record(self, maps: int = 0, *, outputs: Sequence[Any] | None = None) -> Mode[Recording]:
        """Record every call made inside the block: ``with compiled.record() as recording: pipe(...)``.

        Outputs are exactly those of the original module. A recording whose run raised stays ``complete=False``.

        Args:
            maps: of how many calls, from the first on, cross-attention maps are kept too, for
                :meth:`EditSession.reuse_maps`; each has ``heads * sites * tokens`` values per layer and sample.
            outputs: what the module itself gave for the first call, if that is known: compared instead of calling it.

        Raises:
            ConfigError: ``maps`` is no number of calls.
            ModeError: another mode is active in this thread or task, or the module is in training mode.
            RecordingError: maps are asked for and the module has no cross-attention that has one.
        """
        return Mode(self._modes, "record", self._record(maps, outputs))

    def _record(self, maps: int, outputs: Sequence[Any] | None = None) -> Body[Recording]:
        if isinstance(maps, bool) or not isinstance(maps, int) or maps < 0:
            raise ConfigError(f"record(maps={maps!r}) must be a number of calls, 0 or more.")
        self._check_evaluating()
        run = self._modes.active
        recording = Recording(self._refresh(), self.sparsify_config.program_key())
        session = RecordSession(recording, self._programs, maps, outputs)
        with self._followed():
            yield session, recording
        if not recording.calls and run is not None and run.passed_by:
            raise RecordingError(f"record() ended after 0 calls, while others called the module. {OTHER_THREADS}")
        session.finish()
        self._recorded_calls = recording.num_calls

    def edit(
        self,
        recording: Recording,
        mask: Any = None,
        *,
        record: bool = False,
        copies: int = 1,
        reuse: Reuse | None = None,
    ) -> Mode[EditSession]:
        """Replay a recorded run under changed inputs: ``with compiled.edit(recording, mask): pipe(new_prompt)``.

        Args:
            recording: a complete recording of this module.
            mask: what may change; until one is set (here or by ``session.set_mask``) calls run densely. An empty
                mask gives the recorded outputs back without running the model; one above the break-even
                (``SparsifyConfig.dense_above``) runs densely, too, and ``session.fallback`` says so.
            record: also make a recording of the edited run (``session.result``), so that it can be edited in turn.
                It holds what the edit wrote and shares the rest with ``recording``.
            copies: make so many edits at once. Calls have ``copies`` times the recorded batch, every recorded sample
                repeated in place: ``[uncond] * copies + [cond] * copies``, as a pipeline lays out that many prompts.
                ``mask`` is one for all, or a sequence or stack ``[copies, H, W]`` of one each: then every copy computes
                the sites of all masks, and outside its own returns what was recorded. With ``record``,
                ``session.results`` has a recording for each copy.
            reuse: whether calls may take what comes up from coarser levels from an earlier call; by default what
                ``SparsifyConfig.reuse`` says.

        Raises:
            ModeError: another mode is active in this thread or task, or the module is in training mode.
            ConfigError: ``copies`` is not a positive whole number, or ``reuse`` no tolerance that the model allows.
            NonFiniteError: the recorded run or the edit overflowed: NaN or infinity in its outputs.
            RecordingError: the recording is missing, unfinished, of another model or configuration, or the run
                differs from it (resolution, batch, timesteps, number of calls, input outside the mask).
            MaskError: the mask does not fit the recording.
        """
        return Mode(self._modes, "edit", self._edit(recording, mask, record, copies, reuse))

    def _edit(
        self, recording: Recording, mask: Any, record: bool, copies: int, reuse: Reuse | None
    ) -> Body[EditSession]:
        self._check_evaluating()
        self._check(recording)
        config, programs = self.sparsify_config, self._programs
        session = EditSession(recording, config, mask, record, copies, programs, explain_session, reuse)
        self._programs.serve(self._modes.count())
        try:
            with self._followed():
                yield session, session
        finally:
            self._measured.update({calls.kind: calls for calls in session.measured()})
        session.finish()

    def reset(self) -> None:
        """Leave all modes the module is in, from anywhere, and be the original module again.

        A mode ends with its ``with`` block, however that ends. One that was entered without (by ``ExitStack``, by
        ``__enter__``) may outlive an interrupt as long as something, such as a kept traceback, holds it. Recordings and
        programs stay as they are; a block that is still running, in whatever thread, ends in a ``ModeError``, its
        recording unfinished.
        """
        self._modes.reset()

    @contextmanager
    def _followed(self) -> Iterator[None]:
        """Read the module's weights when a run ends, however it ends: what was computed from others is forgotten."""
        try:
            yield
        finally:
            self._refresh()

    def _check_evaluating(self) -> None:
        ambient.refuse_foreign_modes()
        if self.original.training:
            raise ModeError(
                "The module is in training mode, where dropout would make every run another one; call .eval() first."
            )

    def _check(self, recording: Recording) -> None:
        if not isinstance(recording, Recording):
            raise RecordingError(
                f"edit() needs a recording, got {_called(recording)}. Make one first: "
                "`with compiled.record() as recording: pipe(prompt, ...)`."
            )
        if not recording.complete:
            raise RecordingError(
                f"The recording is unfinished ({recording.num_calls} calls): its run was interrupted or is still going "
                "on. Record the base run again; if it is an edit's, make that edit again: what it edited is untouched."
            )
        if not recording.calls:
            raise RecordingError(
                "The recording is empty: no call went through the compiled module inside `with compiled.record()`. "
                f"Set `pipe.unet = compiled` before running the pipeline. {OTHER_THREADS}"
            )
        check_finite(recording)
        if recording.config != self.sparsify_config.program_key():
            raise RecordingError(
                f"The recording was made with {dict(recording.config)}, this module is compiled with "
                f"{dict(self.sparsify_config.program_key())}. Record again, or sparsify with the recorded options."
            )
        now = self._refresh()
        self._programs.follow_renames(recording)
        now = now._replace(structure=self._programs.name_now(now.structure))
        then = recording.model
        if then != now:
            places = self._programs.state.differences(now.structure, then.structure)
            where = f" (in {', '.join(places[:3])}{', ...' if len(places) > 3 else ''})" if places else ""
            raise RecordingError(
                f"The recording is of another model: the structure or the weights differ{where}: another checkpoint, a "
                "LoRA loaded, fused or re-scaled, a processor, hook or attribute exchanged since. Record the base run "
                "again with this model, or bring the model back to what was recorded."
            )

    def _refresh(self) -> Any:
        """The module's key now; whatever was computed from weights that changed since is dropped."""
        with computing():
            return self._programs.refresh()

    # -- inspection ------------------------------------------------------------------------------

    def stages(self, program: int = 0) -> Stages:
        """The graph after every pass, with what the pass changed and how long it took.

        ``print(compiled.stages())`` is a table, ``compiled.stages()["convolution"].print()`` one graph,
        ``compiled.stages().diff("capture", "step")`` what changed between two.

        Args:
            program: which of :attr:`programs`.

        Raises:
            ConfigError: nothing is compiled yet, or there is no such program.
        """
        return stages_of(choose_program(self.programs, program))

    def check(
        self,
        mask: Any,
        *,
        inputs: Mapping[str, Any] | None = None,
        edited: Mapping[str, Any] | None = None,
        recording: Recording | None = None,
        call: int = 0,
        program: int = 0,
        tolerance: float | None = None,
        seed: int = 0,
        lowered: bool = False,
    ) -> CheckReport:
        """Run the packed program beside the pinned one and name the first node that differs.

        The pinned program is the meaning of an edit: the dense graph whose inactive sites are overwritten by the base
        run's after every node. ``print(compiled.check(mask))`` says what differs; the report is true if nothing does.
        Nothing that the module keeps is changed, and nothing falls back to dense calls.

        Args:
            mask: the sites to edit, at latent resolution (with ``inputs``, also at a multiple of it).
            inputs: keyword arguments of the base call; without them, random ones of the mask's size.
            edited: those of the edit; without them, ``inputs`` changed inside the mask and where they have no sites.
            recording: check this recording of ``inputs`` instead of a fresh one.
            call: which call of the recording ``inputs`` are.
            program: which of :attr:`programs`, without ``inputs``.
            tolerance: error relative to a value's largest element; ``None`` for that of its precision.
            seed: of everything random.
            lowered: also compare the step as Inductor and CUDA graphs run it, and narrow a difference down to a node.
                Compiles the step if no edit has, and keeps it; narrowing compiles parts of it, which takes minutes.

        Raises:
            ModeError: a mode is active, or the module is in training mode.
            MaskError: the mask is empty or does not fit.
            ConfigError: nothing is compiled yet, arguments are missing, or nothing is lowered on this device.
            RecordingError: the calls or the recording do not belong together.
        """
        from fisedit_compiler.inspect.check import check_subject
        from fisedit_compiler.inspect.subject import CheckOptions

        options = CheckOptions(inputs, edited, recording, call, program, tolerance, seed, lowered)
        with Mode(self._modes, "check", self._checking(mask, options)) as subject:
            return check_subject(subject, subject.executable.hoisted.fork())

    def bisect(self, mask: Any, **options: Any) -> BisectReport:
        """Find the rewrite pass with which :meth:`check` begins to fail.

        Args:
            mask: as for :meth:`check`.
            options: as for :meth:`check`, without ``lowered``: no pass is at fault where only compiled code differs.

        Raises:
            FiseditError: as :meth:`check` does.
        """
        from fisedit_compiler.inspect.bisect import bisect_subject
        from fisedit_compiler.inspect.subject import CheckOptions

        with Mode(self._modes, "bisect", self._checking(mask, CheckOptions(**options))) as subject:
            return bisect_subject(subject)

    def _checking(self, mask: Any, options: CheckOptions) -> Body[Subject]:
        from fisedit_compiler.inspect.subject import full_precision, make_subject

        with full_precision():
            self._check_evaluating()
            self._refresh()
            yield None, make_subject(self, mask, options)

    @property
    def programs(self) -> list[CompiledProgram]:
        """Programs compiled so far, one per call signature."""
        return self._programs.compiled()

    def explain(
        self,
        mask: Any = None,
        *,
        batch: int = 2,
        size: tuple[int, int] | None = None,
        tokens: int = TEXT_TOKENS,
    ) -> Explanation:
        """What was rewritten, what stays dense and why, and what a call costs; with a mask, its rows and block sizes.

        ``print(compiled.explain(mask))`` shows tables, ``.to_dict()`` gives the same as plain values. Nothing is
        compiled or run.

        Args:
            mask: as for :meth:`edit`; without one, what depends on a mask stays a formula.
            batch: samples of a call; 2 is one image with guidance.
            size: height and width of the spatial input; by default those of the mask, without a mask those that the
                model's config names.
            tokens: tokens of a prompt.

        Raises:
            MaskError: the mask does not fit the size, or is an image, whose size says nothing, and no size is given.
            PlanError: the size is none that the model takes.
        """
        return explain_module(self, mask, batch, size, tokens)

    # -- being the original ----------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("original"), name)

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # type: ignore[override]
        """The original's class, for ``isinstance`` and diffusers' ``save_pretrained``; ``type()`` tells the truth.

        So a pipeline that asks for a ``UNet2DConditionModel`` takes the wrapper, and saves the original.
        """
        original = self.__dict__.get("_modules", {}).get("original")
        return SparseModule if original is None else type(original)

    def __repr__(self) -> str:
        active = self._modes.active
        others = self._modes.count() - (active is not None)
        state = "in no mode" if active is None else f"inside {active.name}()"
        state += f", {others} run{'s' * (others != 1)} elsewhere" * bool(others)
        programs = len(self.programs)
        return f"SparseModule({type(self.original).__name__}, {programs} program{'s' * (programs != 1)}, {state})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles carry the original and the configuration, no program, mode or recording.

        Programs are found again, in the disk cache if it is on, when the copy records its first call.
        """
        return SparseModule, (self.original, self.sparsify_config)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The original's state dict, with the original's keys."""
        return self.original.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load weights into the original module."""
        return self.original.load_state_dict(*args, **kwargs)


def _called(value: Any) -> str:
    return "record() without `with ... as`" if isinstance(value, Mode) else type(value).__name__
