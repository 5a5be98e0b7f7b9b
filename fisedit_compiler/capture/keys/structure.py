"""The structure of a module as a key: everything that its forward can read, apart from the contents of its weights.

Read are all attributes of all submodules, private ones too (PEFT keeps its active adapters there, torch its hooks), and
whatever they lead to; at the end what hangs on no module (``surroundings.py``). Two modules with one key compute the
same from the same weights. What cannot be read (an object of another language without attributes) is told apart by
identity, and makes the key one of this process only (:attr:`Structure.portable`). How a module is written stands here,
how values are in ``values.py``, functions and classes in ``functions.py``.
"""

from __future__ import annotations

import functools
import hashlib
import types
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fisedit_compiler.capture.keys import functions, values
from fisedit_compiler.capture.keys.notes import Note
from fisedit_compiler.capture.keys.reader import PLAIN, Reader, is_of_this_package
from fisedit_compiler.capture.keys.surroundings import Place, of_package, of_torch
from fisedit_compiler.capture.keys.watch import Watch

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
        notes: places to leave out, because the forward only writes to them.

    About 50 ms for a UNet of SD2.1's size; :class:`Watch` tells within a fraction of a millisecond whether it must be
    read again.
    """
    parts = {id(part): path for path, part in module.named_modules()}
    reader, structure = Reader(_write, notes, parts), Structure()
    total = hashlib.sha256()
    for path, part in module.named_modules():
        reader.start_at(path)
        structure.parts[path] = reader.digest(lambda path=path, part=part: _write_part(reader, path, part))  # type: ignore[misc]
        total.update(f"{path}={structure.parts[path]};".encode("utf-8", "surrogatepass"))
    structure.parts[REPLACED] = reader.digest(lambda: _write_surroundings(reader))
    total.update(structure.parts[REPLACED].encode())
    structure.key, structure.portable, structure.watch = total.hexdigest(), reader.portable, reader.watch
    structure.tensors, structure.constants = reader.tensors, reader.constants
    return structure


def _write(reader: Reader, value: Any) -> None:
    """Write a value by its kind."""
    for kinds, write in _KINDS:
        if isinstance(value, kinds):
            write(reader, value)
            return
    values.write_object(reader, value)


def _write_module(reader: Reader, value: nn.Module) -> None:
    """A module that is no part of the tree, such as one in a list."""
    _write_part(reader, f"<{type(value).__name__}>", value)


def _write_script(reader: Reader, path: str, part: torch.jit.ScriptModule) -> None:
    """A module of TorchScript, which keeps its attributes where Python cannot watch them; it cannot be captured."""
    reader.say(f"script {part.original_name}")
    for name, tensor in (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)):
        _write_weight(reader, f"{path}.{name}", name, tensor)
    reader.opaque(part)


def _write_part(reader: Reader, path: str, part: nn.Module) -> None:
    if isinstance(part, torch.jit.ScriptModule):
        _write_script(reader, path, part)
        return
    if isinstance(part, torch._dynamo.OptimizedModule) or is_of_this_package(part):
        attributes: Mapping[str, Any] = {"_modules": vars(part)["_modules"]}  # the rest says what was compiled
    else:
        attributes = reader.attributes(vars(part))
    reader.watch.form_of(part)
    reader.visit(type(part), f" of {type(part).__qualname__}")
    for name in sorted(attributes):
        value = attributes[name]
        if name in _SILENT or name in _HOOK_FLAGS:
            continue
        if name in ("_parameters", "_buffers"):
            reader.watch.tensors_of(value)
            for own, tensor in value.items():
                _write_weight(reader, f"{path}.{own}" if path else own, own, tensor)
        elif name == "_modules":
            reader.watch.container(value, f"{reader.place}.{name}")
            for child, submodule in value.items():
                reader.say(f"child {child}")
                reader.visit(submodule, f".{child}")
        elif name in _HOOKS:
            reader.watch.container(value, f"{reader.place}.{name}")
            flags = [vars(part).get(flag, {}) for flag in _HOOK_FLAGS]
            for number, hook in value.items():
                # Torch numbers hooks as they come, so numbers say nothing; their order and flags do.
                reader.say(f"{name} {[number in flag for flag in flags]}")
                reader.visit(hook, f".{name}[{number}]")
        elif not _is_class_default(part, name, value):
            reader.say(f".{name}")
            reader.visit(value, f".{name}")


def _write_weight(reader: Reader, path: str, name: str, tensor: Tensor | None) -> None:
    if tensor is None:
        reader.say(f"{name} none")
    elif reader.weight(path, name, tensor):
        values.write_form(reader, name, tensor)
        values.write_attributes_of_tensor(reader, tensor, f".{name}")


def _is_class_default(part: nn.Module, name: str, value: Any) -> bool:
    """Whether an instance only repeats what its class says, so that it may stop to."""
    default = getattr(type(part), name, part)
    return type(value) in PLAIN and type(default) is type(value) and default == value


def _write_surroundings(reader: Reader) -> None:
    """What hangs on no module, of torch and of the packages that were met."""
    _write_places(reader, of_torch())
    seen: set[str] = set()
    while new := sorted(reader.packages - seen):
        for name in new:
            _write_places(reader, of_package(name, seen))
        seen.update(new)


def _write_places(reader: Reader, places: Iterable[Place]) -> None:
    for name, namespace, found in places:
        reader.start_at(name)
        read = reader.attributes(namespace)
        for own, value in found:
            if own in read:
                reader.say(f"{name}.{own}" if isinstance(own, str) else name)  # a hook's number says nothing
                reader.visit(value, f".{own}")


_KINDS: tuple[tuple[Any, Callable[[Reader, Any], None]], ...] = (
    (nn.Module, _write_module),
    (Tensor, values.write_constant),
    (np.ndarray, values.write_array),
    ((bytearray, memoryview, array), values.write_bytes),
    (type, functions.write_class),
    (types.FunctionType, functions.write_function),
    (types.MethodType, functions.write_method),
    ((functools.partial, functools.partialmethod), functions.write_partial),
    ((staticmethod, classmethod), functions.write_wrapped),
    (property, functions.write_property),
    ((types.BuiltinFunctionType, types.BuiltinMethodType), functions.write_builtin),
    (types.CellType, functions.write_cell),
    (types.ModuleType, functions.write_module_of_python),
    (functions.OPERATIONS, functions.write_operation),
    (Mapping, values.write_mapping),
    ((list, tuple, deque), values.write_sequence),
    (Set, values.write_set),
)
"""How what is no plain value is written, by its type; the first that fits. Anything else is an object."""
