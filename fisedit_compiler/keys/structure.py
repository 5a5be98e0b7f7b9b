"""The structure of a module as a key: everything that its forward can read, apart from the contents of its weights.

Read are all attributes of all submodules, private ones too (PEFT keeps its active adapters there, torch its hooks), and
whatever they lead to: plain values, containers, objects, bound arguments, closures, the globals that the user's own
functions name, forwards replaced on an instance or a class. Two modules with one key compute the same from the same
weights. What cannot be read (an object of another language without attributes) is told apart by identity, and makes the
key one of this process only (:attr:`Structure.portable`).
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import sys
import types
import weakref
import zlib
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Set
from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import Enum
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.library import CustomOpDef

from fisedit_compiler.keys.code import (
    code_digest,
    file_digest,
    globals_read,
    imported_by,
    is_installed,
    names_read,
    package_version,
)
from fisedit_compiler.keys.surroundings import Place, is_of_torch_or_python, of_package, of_torch
from fisedit_compiler.keys.watch import Watch, checksum

Note = tuple[str, str]
"""A submodule's path and an attribute that its own forward writes and never reads first."""

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.layout)
_WITH_ATTRIBUTES = (int, float, complex, str, bytes)
_PLAIN_TOO = (torch.memory_format, torch.Size, range, slice, PurePath, type(Ellipsis), np.generic, np.dtype)
# Of a module's own attributes, those that no forward reads.
_SILENT = frozenset(
    {
        "_non_persistent_buffers_set",
        "_backward_hooks",
        "_backward_pre_hooks",
        "_is_full_backward_hook",
        "_state_dict_hooks",
        "_state_dict_pre_hooks",
        "_load_state_dict_pre_hooks",
        "_load_state_dict_post_hooks",
        "_compiled_call_impl",  # torch's compiled form of the same forward
        "_is_torch_compile",  # torch.compile says that it was called
        "_hf_peft_config_loaded",  # diffusers notes that adapters were loaded once; its layers say what they are
    }
)
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_HOOK_FLAGS = ("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")
# Of a class's own members, those that no forward reads.
_CLASS_SILENT = frozenset(
    {"_abc_impl", "__init__", "__new__", "__init_subclass__", "__repr__", "__str__", "__reduce__"}
)
_DESCRIPTORS = (types.MemberDescriptorType, types.GetSetDescriptorType, types.WrapperDescriptorType)
_MAX_ITEMS, _MAX_DEPTH = 500_000, 150
REPLACED = "functions or switches of torch or of another package"
"""Name of the part of a structure that is no submodule."""


@dataclass
class Structure:
    """What was read of a module.

    Attributes:
        key: hex digest; equal structures have equal keys in every process if ``portable``.
        portable: whether everything could be read, so that the key may name a file.
        parts: digest of every submodule by path, to tell where two structures differ.
        tensors: parameters and buffers by path, whose contents are ``weights.py``'s business.
        constants: other tensors that were read, whose contents are part of ``key``, by number.
        watch: notices that what was read has changed since.
    """

    key: str = ""
    portable: bool = True
    parts: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    constants: dict[str, Tensor] = field(default_factory=dict)
    watch: Watch = field(default_factory=Watch)

    def differences(self, other: Structure) -> list[str]:
        """Paths of the submodules that are not as in ``other``, in the module's order."""
        paths = dict.fromkeys((*self.parts, *other.parts))
        return [path or "the module itself" for path in paths if self.parts.get(path) != other.parts.get(path)]


def structure_key(module: nn.Module) -> str:
    """Hex digest of a module's structure; see :func:`read_structure`."""
    return read_structure(module).key


def read_structure(module: nn.Module, notes: frozenset[Note] = frozenset()) -> Structure:
    """Read everything that a module's forward can read, weights' contents apart.

    Args:
        module: any module; it is not run.
        notes: attributes to leave out, because the forward only writes to them.

    About 50 ms for a UNet of SD2.1's size; :class:`Watch` tells within a fraction of a millisecond whether it must be
    read again.
    """
    return _Reader(notes).read(module)


class _Reader:
    """Writes down one module after the other.

    What is met again is written as before, so that it makes no difference whether two parts share one object (one
    attention processor for all layers) or have equal ones; whether a forward depends on that is the self-check's to
    find. Only parts of the module itself are named by their paths.
    """

    def __init__(self, notes: frozenset[Note]) -> None:
        self.notes, self.result = notes, Structure()
        self.out: list[str] = []
        self.paths: dict[int, str] = {}
        self.weights: dict[int, str] = {}
        self.digests: dict[int, str] = {}
        self.packages: set[str] = set()
        self.open: dict[int, int] = {}
        self.alive: list[Any] = []  # identities above stay unique while these live

    def read(self, module: nn.Module) -> Structure:
        self.paths = {id(part): path for path, part in module.named_modules()}
        total = hashlib.sha256()
        for path, part in module.named_modules():
            digest = self._digest(lambda path=path, part=part: self._module(path, part))  # type: ignore[misc]
            self.result.parts[path] = digest
            total.update(f"{path}={digest};".encode("utf-8", "surrogatepass"))
        self.result.parts[REPLACED] = self._digest(self._surroundings)
        total.update(self.result.parts[REPLACED].encode())
        self.result.key = total.hexdigest()
        return self.result

    def _digest(self, write: Callable[[], None]) -> str:
        """Digest of what ``write`` writes."""
        outer, self.out = self.out, []
        try:
            write()
            return hashlib.sha256("\x1f".join(self.out).encode("utf-8", "surrogatepass")).hexdigest()
        finally:
            self.out = outer

    def _surroundings(self) -> None:
        """What hangs on no module, of torch and of the packages that were met."""
        self._places(of_torch())
        seen: set[str] = set()
        while new := sorted(self.packages - seen):
            for name in new:
                self._places(of_package(name, seen))
            seen.update(new)

    def _places(self, places: Iterable[Place]) -> None:
        for values, found in places:
            self.result.watch.attributes(values)
            for name, value in found:
                self.out.append(name)
                self._visit(value)

    # -- modules ---------------------------------------------------------------------------------

    def _module(self, path: str, part: nn.Module) -> None:
        watch, attributes = self.result.watch, vars(part)
        watch.attributes(attributes)
        self._visit(type(part))
        for name in sorted(attributes):
            value = attributes[name]
            if name in _SILENT or name in _HOOK_FLAGS or (path, name) in self.notes:
                continue
            if name != "_modules" and isinstance(part, torch._dynamo.OptimizedModule):
                continue
            if name in ("_parameters", "_buffers"):
                watch.tensors_of(value)
                for own, tensor in value.items():
                    self._weight(f"{path}.{own}" if path else own, own, tensor)
            elif name == "_modules":
                watch.container(value)
                for child, submodule in value.items():
                    self.out.append(f"child {child}")
                    self._visit(submodule)
            elif name in _HOOKS:
                watch.container(value)
                flags = [attributes.get(flag, {}) for flag in _HOOK_FLAGS]
                for number, hook in value.items():
                    # Torch numbers hooks as they come, so numbers say nothing; their order and flags do.
                    self.out.append(f"{name} {[number in flag for flag in flags]}")
                    self._visit(hook)
            elif not _is_class_default(part, name, value):
                self.out.append(f".{name}")
                self._visit(value)

    def _weight(self, path: str, name: str, tensor: Tensor | None) -> None:
        if tensor is None:
            self.out.append(f"{name} none")
            return
        if id(tensor) in self.weights:
            self.out.append(f"{name} tied to {self.weights[id(tensor)]}")
            return
        while path in self.result.tensors:
            path += "'"  # of a module that is no part of the tree, and has no path of its own
        self.weights[id(tensor)] = path
        self.result.tensors[path] = tensor
        self._tensor_form(name, tensor)

    def _tensor_form(self, name: str, tensor: Tensor) -> None:
        form = (tuple(tensor.shape), tensor.dtype, tensor.device.type, tensor.layout)
        self.out.append(f"{name} {form}")
        if type(tensor) not in (Tensor, nn.Parameter) and hasattr(tensor, "__tensor_flatten__"):
            self.out.append(f"{type(tensor).__module__}.{type(tensor).__qualname__}")
            self._visit(tensor.__tensor_flatten__()[1])

    # -- values ----------------------------------------------------------------------------------

    def _visit(self, value: Any) -> None:
        if type(value) in _PLAIN:
            self.out.append(f"{type(value).__name__} {value!r}")
        elif isinstance(value, Enum):
            self.out.append(f"{type(value).__qualname__}.{value.name}")
            self._visit(type(value))
        elif isinstance(value, _PLAIN_TOO) or _is_plain_tuple(value):
            self.out.append(f"{type(value).__name__} {value!r}")
        elif id(value) in self.paths:
            self.out.append(f"part {self.paths[id(value)]}")
        elif id(value) in self.weights:
            self.out.append(f"weight {self.weights[id(value)]}")
        elif id(value) in self.digests:
            self.out.append(self.digests[id(value)])
        elif id(value) in self.open:
            self.out.append(f"inside {self.open[id(value)]}")
        else:
            self._first_visit(value)

    def _first_visit(self, value: Any) -> None:
        self.alive.append(value)
        self.open[id(value)] = len(self.open)
        large = len(self.open) > _MAX_DEPTH or len(self.alive) > _MAX_ITEMS
        digest = self._digest(lambda: self._opaque(value) if large else self._compound(value))
        del self.open[id(value)]
        self.digests[id(value)] = digest
        self.out.append(digest)

    def _compound(self, value: Any) -> None:
        if isinstance(value, nn.Module):
            self._module(f"<{type(value).__name__}>", value)
        elif isinstance(value, Tensor):
            self._constant(value)
        elif isinstance(value, np.ndarray):
            self._array(value)
        elif isinstance(value, type):
            self._class(value)
        elif isinstance(value, (types.FunctionType, types.MethodType, functools.partial, functools.partialmethod)):
            self._callable(value)
        elif isinstance(value, (staticmethod, classmethod)):
            self._visit(value.__func__)
        elif isinstance(value, property):
            for part in (value.fget, value.fset):
                self._visit(part)
        elif isinstance(value, Mapping):
            self._mapping(value)
        elif isinstance(value, (list, tuple, deque)):
            if not isinstance(value, tuple):
                self.result.watch.container(value)
            self.out.append(f"{type(value).__qualname__} of {len(value)}")
            for item in value:
                self._visit(item)
            self._object(value)
        elif isinstance(value, Set):
            self._set(value)
        else:
            self._other(value)

    def _constant(self, value: Tensor) -> None:
        """A tensor that is no parameter and no buffer: a graph closes over it, so its contents count here."""
        self._tensor_form("tensor", value)
        self.result.watch.tensor(value)
        self.result.constants[str(len(self.result.constants))] = value
        if value.is_meta or type(value) not in (Tensor, nn.Parameter):
            return
        self.out.append(str(_bytes_of(value)))

    def _array(self, value: np.ndarray) -> None:
        self.out.append(f"array {value.shape} {value.dtype}")
        if value.dtype.hasobject:
            self._visit(value.tolist())
            return
        self.out.append(str(checksum(value)))
        self.result.watch.array(value)

    def _mapping(self, value: Mapping[Any, Any]) -> None:
        self.result.watch.container(value)
        # diffusers' configs note where a model came from and, in an order that differs from process to process,
        # which values were defaults.
        private = type(value).__name__ == "FrozenDict"
        items = [(key, item) for key, item in value.items() if not (private and str(key).startswith("_"))]
        self.out.append(f"{type(value).__qualname__} of {len(items)}")
        for key, item in items:
            self._visit(key)
            self._visit(item)

    def _set(self, value: Set[Any]) -> None:
        self.result.watch.container(value)
        if all(type(item) in _PLAIN for item in value):
            self.out.append(f"set {sorted(map(repr, value))}")
        else:
            for item in sorted(value, key=lambda item: f"{type(item).__module__}.{type(item).__qualname__} {item!r}"):
                self._visit(item)

    def _callable(self, value: Any) -> None:
        if isinstance(value, (functools.partial, functools.partialmethod)):
            self.out.append("partial")
            self._visit(value.func)
            self._visit(value.args)
            self._visit(value.keywords)
            return
        if isinstance(value, types.MethodType):
            self.out.append("method")
            self._visit(value.__func__)
            self._visit(value.__self__)
            return
        if (compiled := vars(value).get("_torchdynamo_orig_callable")) is not None:
            self._visit(compiled)  # what torch.compile keeps beside it changes as it compiles
            return
        module = str(value.__module__)
        self.out.append(f"function {module}.{value.__qualname__}")
        self.out.append(self._package(module) if is_installed(module) else code_digest(value.__code__))
        for name in ("__code__", "__defaults__", "__kwdefaults__"):
            self.result.watch.attribute(value, name)
        self._visit(value.__defaults__)
        self._visit(value.__kwdefaults__)
        self.result.watch.container(vars(value))
        for name, read in vars(value).items():
            if not name.startswith("_torchdynamo"):  # Dynamo's notes
                self.out.append(f".{name}")
                self._visit(read)
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            self.out.append(f"closure {name}")
            self.result.watch.cell(cell)
            try:
                self._visit(cell.cell_contents)
            except ValueError:
                self.out.append("empty")
        if not is_installed(module):
            names = names_read(value.__code__)
            for name, read in globals_read(value).items():
                self.out.append(f"global {name}")
                self.result.watch.item(value.__globals__, name)
                self._visit(read)
                if isinstance(read, types.ModuleType):
                    self._attributes_of_module(read, names)
            for name, imported in imported_by(value).items():
                self.out.append(f"import {name}")
                self.result.watch.item(sys.modules, name)
                self._attributes_of_module(imported, names)

    def _attributes_of_module(self, module: types.ModuleType, names: frozenset[str]) -> None:
        """What a function that names a module may read of it: ``settings.SCALE``, ``os.environ["SCALE"]``."""
        if module is os and names & {"environ", "environb", "getenv", "getenvb"}:
            self.out.append("environment")
            self._mapping(os.environ)
        installed = is_installed(module.__name__)
        if id(module) in self.open or is_of_torch_or_python(module.__name__):
            return
        self.open[id(module)] = len(self.open)
        for name in sorted(names & vars(module).keys()):
            read = vars(module)[name]
            if installed and not isinstance(read, (*_PLAIN, Enum, types.ModuleType)):
                continue
            self.out.append(f"attribute {name}")
            self.result.watch.item(vars(module), name)
            self._visit(read)
            if isinstance(read, types.ModuleType):
                self._attributes_of_module(read, names)
        del self.open[id(module)]

    def _package(self, module: str) -> str:
        self.packages.add(module)
        return package_version(module)

    def _class(self, value: type) -> None:
        self.out.append(f"class {value.__module__}.{value.__qualname__}")
        for base in value.__mro__:
            if base.__module__ in ("builtins", "abc", "typing", "enum"):
                continue
            if base is not value:
                self._visit(base)
                continue
            self.result.watch.attributes(vars(base))
            # A class that a function made holds what the function was called with.
            installed = is_installed(base.__module__) and "<locals>" not in base.__qualname__
            self.out.append(f"base {base.__module__}.{base.__qualname__}")
            self.out.append(self._package(base.__module__) if installed else file_digest(base.__module__))
            for name in sorted(vars(base)):
                member = vars(base)[name]
                function = getattr(member, "__func__", member)
                if name in _CLASS_SILENT or isinstance(member, _DESCRIPTORS):
                    continue
                if _is_dunder(name) and not isinstance(function, types.FunctionType):
                    continue
                own = getattr(function, "__module__", base.__module__) or base.__module__
                # An installed class is known by its version, unless somebody replaced a method of it.
                foreign = isinstance(function, types.FunctionType) and not is_installed(own)
                if not installed or foreign:
                    self.out.append(f"member {name}")
                    self._visit(member)

    def _other(self, value: Any) -> None:
        if isinstance(value, types.ModuleType):
            self.out.append(f"module {value.__name__} {self._package(value.__name__)}")
        elif isinstance(value, logging.Logger):
            self.out.append(f"logger {value.name}")
        elif isinstance(value, (weakref.ref, weakref.WeakSet, weakref.WeakKeyDictionary, weakref.WeakValueDictionary)):
            self.out.append(
                "weak"
            )  # does not own what it leads to; the module reaches it by another way if it is its own
        elif isinstance(value, (types.BuiltinFunctionType, types.BuiltinMethodType)):
            self.out.append(f"builtin {value.__module__}.{value.__qualname__}")
            if value.__self__ is not None and not isinstance(value.__self__, types.ModuleType):
                self._visit(value.__self__)
        elif isinstance(value, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
            self.out.append(f"operation {value}")
        elif isinstance(value, CustomOpDef):
            self.out.append(f"operation {value}")
            self._visit(value._init_fn)
        elif isinstance(value, ContextVar):
            self.out.append(f"context variable {value.name}")
            self.result.watch.asked(functools.partial(value.get, None))
            self._visit(value.get(None))
        elif type(value).__name__ in ("lock", "RLock", "_RLock"):
            self.out.append("lock")
        elif isinstance(value, (bytearray, memoryview, array)):
            self.out.append(f"{type(value).__name__} {checksum(value)}")
            self.result.watch.array(value)
        else:
            plain = next((base for base in _WITH_ATTRIBUTES if isinstance(value, base)), None)
            if plain is not None:  # a number or text with attributes of its own
                self.out.append(plain.__repr__(value))
            if not self._object(value) and plain is None:
                self._opaque(value)

    def _object(self, value: Any) -> bool:
        """Attributes and slots of an object; whether it has any place for them."""
        attributes = getattr(value, "__dict__", None)
        slots = [name for base in type(value).__mro__ for name in _slots(base)]
        if attributes is None and not slots:
            return False
        self.out.append("object")
        self._visit(type(value))
        if isinstance(attributes, dict):
            self.result.watch.attributes(attributes)
            for name in sorted(attributes, key=str):
                self.out.append(f".{name}")
                self._visit(attributes[name])
        for name in slots:
            if hasattr(value, name):
                self.out.append(f".{name}")
                self.result.watch.attribute(value, name)
                self._visit(getattr(value, name))
        return True

    def _opaque(self, value: Any) -> None:
        self.result.portable = False
        self.out.append(f"opaque {type(value).__module__}.{type(value).__qualname__} {id(value)}")


def _slots(base: type) -> list[str]:
    slots = vars(base).get("__slots__", ())
    names = [slots] if isinstance(slots, str) else list(slots)
    return [_mangled(base, name) for name in names if name not in ("__dict__", "__weakref__")]


def _mangled(base: type, name: str) -> str:
    """A private name as Python keeps it."""
    return f"_{base.__name__.lstrip('_')}{name}" if name.startswith("__") and not name.endswith("__") else name


def _is_plain_tuple(value: Any) -> bool:
    """Whether an equal tuple may stand for this one: which of them are one object differs from process to process."""
    return type(value) is tuple and all(type(item) in _PLAIN for item in value)


def _is_dunder(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


def _is_class_default(part: nn.Module, name: str, value: Any) -> bool:
    """Whether an instance only repeats what its class says, so that it may stop to."""
    default = getattr(type(part), name, part)
    return type(value) in _PLAIN and type(default) is type(value) and default == value


def _bytes_of(tensor: Tensor) -> int:
    """CRC of a tensor's contents, in logical order."""
    plain = tensor.detach().resolve_conj().resolve_neg()
    dense = plain.to_dense() if plain.layout is not torch.strided else plain
    flat = dense.cpu().contiguous().reshape(-1)
    return zlib.crc32(flat.view(torch.uint8).numpy().data) if flat.numel() else 0
