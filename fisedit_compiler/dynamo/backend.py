"""``torch.compile(unet, backend="fisedit")``: the passes and the runtime of ``sparsify``, behind Dynamo's guards.

    unet = torch.compile(pipe.unet, backend="fisedit", options={"norm": "incremental"})
    with dynamo.record(unet) as recording: ...
    with dynamo.edit(unet, recording, mask): ...

Dynamo guards calls and cuts out graphs; in no mode its graph runs as it is. In a mode, the graph's flat inputs are put
back into the arguments of the module's forward, and the call goes to a :class:`SparseModule` of the same module.

The sparse program is captured from the module, not from Dynamo's graph. Dynamo makes the first graph for one size and
gives equal sizes one symbol (every square image has such), so that height and width, which the compiler tells sites
by, cannot be got back from it. A capture of the module serves every graph that Dynamo makes of it, hence every size
and batch, and is the one that ``sparsify`` makes, on disk too. What Dynamo has specialised on (a flag, a scale) it
guards, and those values are handed on. The price: a graph has to be the whole forward of the compiled module. Graph
breaks and compiled functions are refused with the remedy. What a mode does with a call is written in ``runtime/``.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from torch import fx, nn
from torch._dynamo.eval_frame import OptimizedModule, innermost_backend

from fisedit_compiler.api import sparsify
from fisedit_compiler.compiling import computing, made_once
from fisedit_compiler.config import Reuse, SparsifyConfig
from fisedit_compiler.dynamo.traced_call import REMEDY, TracedCall
from fisedit_compiler.errors import ConfigError, ModeError
from fisedit_compiler.module import SparseModule
from fisedit_compiler.recordings.recording import Recording
from fisedit_compiler.runtime.sessions.edit_session import EditSession
from fisedit_compiler.runtime.sessions.modes import Body, Entered, Mode

__all__ = ["edit", "fisedit", "record", "sparse_module"]

T = TypeVar("T")


def fisedit(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """The backend; torch.compile calls it, once per graph, at the first call of the compiled module.

    Args:
        graph_module: Dynamo's graph, parameters among its placeholders.
        example_inputs: not used; real calls bring the sizes.
        mode: torch.compile's ``mode=``, which must be left at its default.
        options: torch.compile's ``options=``: fields of :class:`SparsifyConfig` by name.

    Returns:
        What runs instead of the graph, on its flat inputs: the graph itself, or the active mode's version of the call.

    Raises:
        ConfigError: an option is unknown or has a wrong value. As everything that a backend raises, it reaches the
            caller inside a ``torch._dynamo.exc.BackendCompilerFailed``, whose text contains this one.
        CaptureError: the graph is not the whole forward of a module.
    """
    config = _config(mode, options)
    call = TracedCall.of_current_frame(graph_module)

    def run(*inputs: Any) -> Any:
        active = _active_on(call.module())
        if active is None or active.sparse.sparsify_config != config:
            with computing():
                return graph_module.forward(*inputs)
        args, kwargs = call.arguments(inputs)
        result = active.sparse(*args, **kwargs)
        active.calls += 1
        return call.outputs(result)

    return run


def record(compiled: nn.Module, maps: int = 0) -> Mode[Recording]:
    """Record every call made inside the block: ``with record(compiled) as recording: pipe(...)``.

    Args:
        compiled: what ``torch.compile(module, backend="fisedit")`` returned; it need not have been called yet.
        maps: calls whose cross-attention maps are kept, as in :meth:`SparseModule.record`.

    Raises:
        ConfigError: the options given to torch.compile are wrong.
        ModeError: ``compiled`` is something else, its module is in a mode already or in training mode, or a call did
            not get to the backend.
        CaptureError: the module cannot be captured.
    """
    sparse = _ready(compiled)
    return Mode(sparse._modes, "record", _through(compiled, sparse, sparse._record(maps)))


def edit(
    compiled: nn.Module,
    recording: Recording,
    mask: Any = None,
    *,
    record: bool = False,
    copies: int = 1,
    reuse: Reuse | None = None,
) -> Mode[EditSession]:
    """Replay a recorded run under changed inputs: ``with edit(compiled, recording, mask): pipe(new_prompt)``.

    Args:
        compiled: what ``torch.compile(module, backend="fisedit")`` returned.
        recording: a complete recording of the same module and options, made here or through ``sparsify``.
        mask: what may change, as in :meth:`SparseModule.edit`.
        record: also make a recording of the edited run (``session.result``).
        copies: make so many edits at once, as in :meth:`SparseModule.edit`.
        reuse: whether calls may take values from earlier ones, as in :meth:`SparseModule.edit`.

    Raises:
        ConfigError, ModeError, CaptureError: as :func:`record`.
        RecordingError, MaskError: as :meth:`SparseModule.edit`.
    """
    sparse = _ready(compiled)
    body = sparse._edit(recording, mask, record, copies, reuse)
    return Mode(sparse._modes, "edit", _through(compiled, sparse, body))


def sparse_module(compiled: nn.Module) -> SparseModule:
    """What a compiled module's modes run, for its ``explain()``, ``stages()`` and ``programs``.

    Enter modes by :func:`record` and :func:`edit`: its own ones do not see calls of ``compiled``.

    Raises:
        ConfigError, ModeError, CaptureError: as :func:`record`.
    """
    original, config = _opened(compiled)
    return made_once(_sparse_modules, compiled, lambda: sparsify(original, config))


# -- modes ---------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Active:
    """The mode that a module is in.

    Attributes:
        sparse: whose mode it is.
        entered: the mode; when it is over, so is this, whether or not anybody could clear it.
        calls: calls that came through the backend.
        seen: how many of them had come when the compiled module last returned.
    """

    sparse: SparseModule
    entered: Entered | None
    calls: int = 0
    seen: int = 0

    @property
    def alive(self) -> bool:
        """Whether the mode is the calling context's, and not over."""
        return self.entered is not None and self.sparse._modes.active is self.entered

    def check(self, compiled: nn.Module, args: Any, output: Any) -> None:
        """A forward hook of the compiled module: refuse a call that torch.compile ran without the backend."""
        if not self.alive:
            return  # a call of another thread or task, or an interrupt kept the hook from being removed
        if self.calls == self.seen:
            raise ModeError(
                "torch.compile ran this call without its backend, so it was neither recorded nor edited: "
                "torch.compiler.disable or set_stance, suppress_errors, or more versions of the module than "
                "torch._dynamo.config.recompile_limit. Compile with dynamic=True to need fewer versions, " + REMEDY
            )
        self.seen = self.calls


_active: ContextVar[tuple[weakref.ref[_Active], ...]] = ContextVar("fisedit_dynamo_active", default=())
"""The modes of this context, the last first; whoever is in one holds it."""
_sparse_modules: weakref.WeakKeyDictionary[nn.Module, SparseModule] = weakref.WeakKeyDictionary()
"""By what torch.compile returned; keyed by the original, an entry would keep its own key alive."""


def _ready(compiled: nn.Module) -> SparseModule:
    """What runs the modes of a compiled module that can have some; errors as :func:`record`."""
    original, _ = _opened(compiled)
    if original._forward_hooks or original._forward_pre_hooks:
        raise ModeError(
            f"{type(original).__name__} has forward hooks, which torch.compile runs outside its graph: they would run "
            "twice. Remove them, " + REMEDY
        )
    return sparse_module(compiled)


def _through(compiled: nn.Module, sparse: SparseModule, body: Body[T]) -> Body[T]:
    """A mode of ``sparse`` that calls of ``compiled`` go through."""
    active = _Active(sparse, sparse._modes.active)
    if _active_on(sparse.original) is not None:
        raise ModeError(
            "A mode was entered while the same module, compiled with other options, is in one already. Modes do "
            "not nest: leave the first `with` block before entering the next."
        )
    _active.set((weakref.ref(active), *(known for known in _active.get() if known() is not None)))
    hook = compiled.register_forward_hook(active.check)
    try:
        yield from body
    finally:
        hook.remove()


def _active_on(original: nn.Module | None) -> _Active | None:
    """The mode that a module is in, seen from this context."""
    modes = (known() for known in _active.get())
    return next((mode for mode in modes if mode is not None and mode.sparse.original is original and mode.alive), None)


def _opened(compiled: nn.Module) -> tuple[nn.Module, SparsifyConfig]:
    """The user's module and the configuration behind what torch.compile returned.

    Raises:
        ModeError: torch.compile did not return it, or was given another backend.
        ConfigError: its options are wrong.
    """
    remedy = 'Pass what `torch.compile(module, backend="fisedit")` returned.'
    if type(compiled) is SparseModule:
        raise ModeError(f"This is the result of sparsify(); use its own record() and edit(). {remedy}")
    if not isinstance(compiled, OptimizedModule):
        # module.compile() puts the compiled call into the module itself, where the original cannot be told from it.
        raise ModeError(f"torch.compile did not return this {type(compiled).__name__}. {remedy}")
    callback = compiled.dynamo_ctx.callback
    backend = innermost_backend(callback) if callable(callback) else None
    if getattr(backend, "compiler_fn", backend) is not fisedit:
        raise ModeError(f"This module was compiled with another backend than fisedit, or with disable=True. {remedy}")
    original: nn.Module = compiled._orig_mod
    return original, _config(**getattr(backend, "kwargs", {}))


def _config(mode: str | None = None, options: Mapping[str, Any] | None = None) -> SparsifyConfig:
    valid = sorted(field.name for field in fields(SparsifyConfig))
    if mode is not None and mode != "default":
        raise ConfigError(
            f"torch.compile(mode={mode!r}) is not for backend='fisedit': its modes are Inductor's. Leave mode= away; "
            'sparse calls are compiled by Inductor with options={"backend": "inductor"}.'
        )
    if unknown := sorted(map(repr, set(options or {}) - set(valid))):
        raise ConfigError(
            f"torch.compile(options=...) has {', '.join(unknown)}, unknown to backend='fisedit'; valid options are the "
            f"fields of SparsifyConfig: {', '.join(valid)}."
        )
    return SparsifyConfig(**(options or {}))
