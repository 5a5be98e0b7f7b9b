"""The rewrite passes, and the order in which they run: computed from what each says in ``after`` and ``before``.

Passes that say nothing of each other run as they are registered here. A user's passes come among the package's own,
whose order they leave as it is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from typing import Any

from fisedit_compiler.errors import ConfigError
from fisedit_compiler.passes.base import EVERY_OTHER, GraphPass, Pass
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

Passes = tuple[type[GraphPass], ...]

REGISTERED: Passes = (
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
"""The package's own passes."""

REQUIRED = frozenset({Outputs.name})


def in_order(passes: Sequence[type[GraphPass]]) -> Passes:
    """Passes of the package in the order they ask for; where they ask for none, as they are given.

    Raises:
        ValueError: one names a pass that is not there, or what they ask for contradicts itself.
    """
    by_name = {item.name: item for item in passes}
    earlier: dict[str, set[str]] = {name: set() for name in by_name}
    for item in passes:
        for name in _named(item.after, item, by_name):
            earlier[item.name].add(name)
        for name in _named(item.before, item, by_name):
            earlier[name].add(item.name)
    given = list(by_name)
    return tuple(by_name[name] for name in _sorted(earlier, given.index))


def _named(names: Iterable[str], item: type[GraphPass], known: Mapping[str, Any]) -> list[str]:
    found = [other for name in names for other in (known if name == EVERY_OTHER else [name]) if other != item.name]
    unknown = [name for name in found if name not in known]
    if unknown:
        raise ValueError(f"pass {item.name!r} is ordered by {unknown[0]!r}, which is no pass")
    return found


def _sorted(earlier: Mapping[str, Iterable[str]], rank: Callable[[str], Any]) -> list[str]:
    """Names, each behind those that are to come earlier; of several that may come next, the lowest in rank.

    Raises:
        CycleError: there is no such order.
    """
    sorter = TopologicalSorter(earlier)
    sorter.prepare()
    ready: list[str] = []
    result: list[str] = []
    while sorter.is_active():
        ready.extend(sorter.get_ready())
        chosen = min(ready, key=rank)
        ready.remove(chosen)
        sorter.done(chosen)
        result.append(chosen)
    return result


REWRITES: Passes = in_order(REGISTERED)
"""The package's own passes as they run."""


def ordered(extra: Iterable[type[GraphPass]], disabled: Iterable[str] = ()) -> Passes:
    """All passes that run: a user's pass comes as early as what it names in ``after`` allows, ``Outputs`` last.

    Without ``after`` it comes right before the first pass it names in ``before``, without both before ``Outputs``.

    Raises:
        ConfigError: an extra pass is none, its name is taken, its constraints name no pass or contradict each other, or
            ``disabled`` names an unknown or a required pass.
    """
    waiting = list(extra)
    for item in waiting:
        _check(item, [p.name for p in (*REWRITES, *(other for other in waiting if other is not item))])
    passes = _among_own(waiting)
    names = [p.name for p in passes]
    for name in disabled:
        if name not in names:
            raise ConfigError(f"disabled_passes names {name!r}, which is no pass; the passes are {names}.")
        if name in REQUIRED:
            raise ConfigError(f"Pass {name!r} cannot be disabled: it pins the outputs outside the mask.")
    return tuple(p for p in passes if p.name not in set(disabled))


def _among_own(extra: Sequence[type[GraphPass]]) -> Passes:
    by_name = {p.name: p for p in (*REWRITES, *extra)}
    own = [p.name for p in REWRITES]
    earlier: dict[str, set[str]] = {name: set(own[:position][-1:]) for position, name in enumerate(own)}
    for item in extra:
        earlier[item.name] = set(item.after)
    for item in extra:
        for name in (*item.before, Outputs.name):
            earlier[name].add(item.name)
    places = _Places(own, {p.name: p for p in extra})
    given = list(by_name)
    try:
        # A pass of the package stands behind the user's passes of its place.
        names = _sorted(earlier, lambda name: (places.of(name), name in own, given.index(name)))
    except CycleError as error:
        raise ConfigError(_contradiction(extra, own, error.args[1])) from None
    return tuple(by_name[name] for name in names)


class _Places:
    """Before which pass of the package a pass would like to come, by number."""

    def __init__(self, own: list[str], extra: Mapping[str, type[GraphPass]]) -> None:
        self.own, self.extra = own, extra

    def of(self, name: str, asking: frozenset[str] = frozenset()) -> int:
        """``asking`` are user's passes whose place depends on this one's."""
        if name in self.own:
            return self.own.index(name)
        item, asking = self.extra[name], asking | {name}
        after, before = ([other for other in names if other not in asking] for names in (item.after, item.before))
        if after:
            return max(self._behind(other, asking) for other in after)
        return min(self.of(other, asking) for other in (*before, Outputs.name))

    def _behind(self, name: str, asking: frozenset[str]) -> int:
        return self.own.index(name) + 1 if name in self.own else self.of(name, asking)


def _contradiction(extra: Sequence[type[GraphPass]], own: list[str], circle: Sequence[str]) -> str:
    concerned = [p for p in extra if p.name in circle]
    if len(concerned) > 1 and not any(name in own for name in circle):
        return (
            f"The passes {[p.name for p in concerned]} of extra_passes wait for each other (`after`, `before`); drop "
            "one of the constraints."
        )
    asked = [
        f"{p.name!r} of extra_passes cannot come after {list(p.after)} and before {list(p.before) or [Outputs.name]}"
        for p in concerned
    ]
    return f"Pass {', and '.join(asked)}: the order is {own}."


def _check(extra: object, names: list[str]) -> None:
    if not (isinstance(extra, type) and issubclass(extra, GraphPass)):
        raise ConfigError(
            f"extra_passes has {extra!r}, which is no subclass of fisedit_compiler.extend.Pass or GraphPass; pass the "
            "class itself."
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
    if inspect.isabstract(extra):
        missing = " and ".join(f"{name}()" for name in sorted(extra.__abstractmethods__))
        raise ConfigError(f"Pass {extra.__qualname__} of extra_passes does nothing: define {missing}.")
    if (
        issubclass(extra, Pass)
        and not extra.targets
        and not _defines(extra, "looks_for")
        and not _defines(extra, "run")
    ):
        raise ConfigError(
            f"Pass {extra.__qualname__} of extra_passes looks for no operation: name them in `targets`, or define "
            "looks_for() or run()."
        )


def _defines(extra: type[Pass], method: str) -> bool:
    return inspect.getattr_static(extra, method) is not inspect.getattr_static(Pass, method)
