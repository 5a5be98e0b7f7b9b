"""The rewrite passes in order: the package's own, and where a user's come among them."""

from __future__ import annotations

from collections.abc import Iterable

from fisedit_compiler.errors import ConfigError
from fisedit_compiler.passes.base import Pass
from fisedit_compiler.passes.rewrites.attention import CrossAttention, SelfAttention
from fisedit_compiler.passes.rewrites.channels import ChannelAxis, Concatenation, Split
from fisedit_compiler.passes.rewrites.convolution import Convolution
from fisedit_compiler.passes.rewrites.extensions import Extensions
from fisedit_compiler.passes.rewrites.group_norm import GroupNorm
from fisedit_compiler.passes.rewrites.merge_linears import MergeLinears
from fisedit_compiler.passes.rewrites.outputs import Outputs
from fisedit_compiler.passes.rewrites.pointwise import Pointwise
from fisedit_compiler.passes.rewrites.rowwise import Rowwise
from fisedit_compiler.passes.rewrites.upsample import Upsample
from fisedit_compiler.passes.rewrites.views import Permute, RankChange, View

REWRITES: tuple[type[Pass], ...] = (
    Extensions,
    Convolution,
    Upsample,
    GroupNorm,
    SelfAttention,
    CrossAttention,
    Concatenation,
    Split,
    ChannelAxis,
    Rowwise,
    Pointwise,
    View,
    Permute,
    RankChange,
    MergeLinears,
    Outputs,
)
REQUIRED = frozenset({Outputs.name})


def ordered(extra: Iterable[type[Pass]], disabled: Iterable[str] = ()) -> tuple[type[Pass], ...]:
    """All passes that run: a user's pass comes as early as what it names in ``after`` allows, ``Outputs`` last.

    Without ``after`` it comes right before the first pass it names in ``before``, without both before ``Outputs``.

    Raises:
        ConfigError: an extra pass is none, its name is taken, its constraints name no pass or contradict each other, or
            ``disabled`` names an unknown or a required pass.
    """
    passes = list(REWRITES)
    waiting = list(extra)
    for item in waiting:
        _check(item, [p.name for p in passes] + [other.name for other in waiting if other is not item])
    while waiting:
        names = [p.name for p in passes]
        ready = next((p for p in waiting if all(name in names for name in (*p.after, *p.before))), None)
        if ready is None:
            raise ConfigError(
                f"The passes {[p.name for p in waiting]} of extra_passes wait for each other (`after`, `before`); drop "
                "one of the constraints."
            )
        passes.insert(_position(ready, names), ready)
        waiting.remove(ready)
    names = [p.name for p in passes]
    for name in disabled:
        if name not in names:
            raise ConfigError(f"disabled_passes names {name!r}, which is no pass; the passes are {names}.")
        if name in REQUIRED:
            raise ConfigError(f"Pass {name!r} cannot be disabled: it pins the outputs outside the mask.")
    return tuple(p for p in passes if p.name not in set(disabled))


def _position(extra: type[Pass], names: list[str]) -> int:
    earliest = max((names.index(name) + 1 for name in extra.after), default=None)
    latest = min((names.index(name) for name in extra.before), default=names.index(Outputs.name))
    if earliest is None:
        return latest
    if earliest > latest:
        raise ConfigError(
            f"Pass {extra.name!r} of extra_passes cannot come after {list(extra.after)} and before "
            f"{list(extra.before) or [Outputs.name]}: the order is {names}."
        )
    return earliest


def _check(extra: object, names: list[str]) -> None:
    if not (isinstance(extra, type) and issubclass(extra, Pass)):
        raise ConfigError(
            f"extra_passes has {extra!r}, which is no subclass of fisedit_compiler.extend.Pass; pass the class itself."
        )
    if not getattr(extra, "name", ""):
        raise ConfigError(f"Pass {extra.__qualname__} of extra_passes has no `name`; give it one that no other has.")
    if extra.name in names:
        raise ConfigError(
            f"Pass {extra.__qualname__} of extra_passes is called {extra.name!r} like another; rename it."
        )
    for name in (*extra.after, *extra.before):
        if name not in names:
            raise ConfigError(f"Pass {extra.name!r} is ordered by {name!r}, which is no pass; the passes are {names}.")
