"""From the arguments of a call to a :class:`Call`: what is found out about one form of arguments is kept.

Binding names, bringing arguments to one form and signing them takes a few hundred microseconds of Python, which a
sparse call on a GPU has not got. Calls of a run differ in their tensors only, so the second one looks up what the first
one found: under the structure of its arguments, their shapes, dtypes and plain values.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fisedit_compiler.capture.arguments import bind, flatten, sign
from fisedit_compiler.capture.known_models import KnownModel
from fisedit_compiler.graph.signatures import CallSignature, identifier

_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)
Path = tuple[Any, ...]


class CallTensors(Mapping[str, Tensor]):
    """The tensor arguments of a call by placeholder name.

    Most are taken from the arguments as they were passed; one that had to be converted (a timestep in another dtype) is
    converted when it is asked for, which a call whose timestep is known never does.
    """

    def __init__(self, arguments: Any, form: CallForm, convert: Callable[[], Mapping[str, Tensor]]) -> None:
        self._arguments, self._form, self._convert = arguments, form, convert
        self._converted: Mapping[str, Tensor] | None = None

    def __getitem__(self, name: str) -> Tensor:
        path = self._form.paths[name]
        if path is not None:
            value: Tensor = _follow(self._arguments, path)
            return value
        if self._converted is None:
            self._converted = self._convert()
        return self._converted[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._form.paths)

    def __len__(self) -> int:
        return len(self._form.paths)


@dataclass(frozen=True)
class CallForm:
    """What all calls with arguments of one structure have in common.

    Attributes:
        signature: what their program is compiled for.
        paths: by placeholder name, where in ``(args, kwargs)`` a tensor is; ``None`` for one that is converted.
        return_dict: whether the caller wants the model's output class.
        found: the program that served such a call, by the module's structure and the ambient state; whoever looks
            programs up keeps it here.
    """

    signature: CallSignature
    paths: Mapping[str, Path | None]
    return_dict: bool
    found: dict[Hashable, Any] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class BoundArguments:
    """One call's arguments, bound.

    Attributes:
        form: see :class:`CallForm`.
        tensors: tensor arguments by placeholder name.
        canonical: the arguments by name, in the form that is captured.
        run: runs the module on the arguments, with outputs as the program gives them.
        run_part: runs the module on some samples of the arguments (int64 ``[n]``, on their device); ``None`` if an
            argument may hide tensors, so that they cannot all be cut.
    """

    form: CallForm
    tensors: CallTensors
    canonical: Callable[[], dict[str, Any]]
    run: Callable[..., Any]
    run_part: Callable[[Tensor], Any] | None


class Binder:
    """Binds calls of one module."""

    def __init__(
        self, module: nn.Module, known: KnownModel | None, spatial: tuple[str, ...] | None, kept: int = 64
    ) -> None:
        self.module, self.known, self.kept = module, known, kept
        self.spatial = spatial or (known.spatial if known is not None else None)
        self._forms: dict[Hashable, CallForm] = {}

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> BoundArguments:
        """Bind one call.

        Raises:
            CaptureError: the arguments cannot be named, or none of them is spatial.
        """

        def canonical() -> dict[str, Any]:
            return self._canonical(self._arguments(args, kwargs))

        def tensors() -> Mapping[str, Tensor]:
            return {identifier(name): tensor for name, tensor in flatten(canonical())[0]}

        key = _structure((args, kwargs))
        form = self._forms.get(key) if key is not None else None
        if form is None:
            form = self._form(args, kwargs)
            if key is not None and len(self._forms) < self.kept:
                self._forms[key] = form

        def run() -> Any:
            return self._run(args, kwargs)

        def run_part(index: Tensor) -> Any:
            return self._call_module(**_samples(self._arguments(args, kwargs), form.signature, index))

        part = None if key is None else run_part
        return BoundArguments(form, CallTensors((args, kwargs), form, tensors), canonical, run, part)

    def forget(self) -> None:
        """Forget which program served a form of arguments."""
        for form in list(self._forms.values()):  # a copy: other threads may bind meanwhile
            form.found.clear()

    def sign(self, arguments: Mapping[str, Any]) -> tuple[CallSignature, dict[str, Any]]:
        """Signature and canonical form of arguments given by name."""
        canonical = self._canonical(self._arguments((), arguments))
        return sign(canonical, self.spatial)[0], canonical

    def _arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        return bind(self.module, args, kwargs, self.known.constants if self.known is not None else {})

    def _canonical(self, arguments: dict[str, Any]) -> dict[str, Any]:
        return arguments if self.known is None else self.known.canonical(arguments)

    def _call_module(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def _run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if self.known is None:
            return self._call_module(*args, **kwargs)
        return self._call_module(**self._arguments(args, kwargs))

    def _form(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> CallForm:
        canonical = self._canonical(self._arguments(args, kwargs))
        signature, tensors = sign(canonical, self.spatial)
        passed: dict[int, Path | None] = {}
        for path, value in _tensors((args, kwargs), ()):
            # Passed twice, a tensor does not tell which argument is which: such a call is bound anew every time.
            passed[id(value)] = None if id(value) in passed else path
        paths = {identifier(name): passed.get(id(tensor)) for name, tensor in tensors.items()}
        wanted = bind(self.module, args, kwargs, {}).get("return_dict", True)
        return CallForm(signature, paths, bool(wanted))


def _samples(arguments: Mapping[str, Any], signature: CallSignature, index: Tensor) -> dict[str, Any]:
    """Arguments by name with some samples of every tensor that has a batch axis."""
    batched = {spec.name for spec in signature.tensors if spec.axes and spec.axes[0] == "b"}

    def chosen(name: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.index_select(0, index) if name in batched else value
        if isinstance(value, Mapping):
            return {key: chosen(f"{name}.{key}", item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            items = [chosen(f"{name}.{number}", item) for number, item in enumerate(value)]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        return value

    return {name: chosen(name, value) for name, value in arguments.items()}


def _follow(value: Any, path: Path) -> Any:
    for step in path:
        value = value[step]
    return value


def _tensors(value: Any, path: Path) -> Iterator[tuple[Path, Tensor]]:
    """Every tensor inside an argument, with the way to it."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors(item, (*path, key))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _tensors(item, (*path, index))


def _structure(value: Any) -> Hashable:
    """A key that arguments share if and only if they differ in the contents of tensors alone; ``None`` without one."""
    if isinstance(value, Tensor):
        return (value.shape, value.dtype, value.device)
    if isinstance(value, _PLAIN):
        return (type(value), value)
    if isinstance(value, Mapping):
        items = tuple((key, _structure(item)) for key, item in value.items())
        return None if any(item is None for _, item in items) else ("mapping", items)
    if isinstance(value, (list, tuple)):
        parts = tuple(map(_structure, value))
        return None if any(part is None for part in parts) else (type(value), parts)
    return None
