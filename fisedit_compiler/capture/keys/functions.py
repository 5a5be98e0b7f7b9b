"""How functions, classes and modules of Python are written down: what they do, and what they are bound to."""

from __future__ import annotations

import builtins
import functools
import os
import sys
import types
from collections import namedtuple
from enum import Enum
from typing import Any

import torch
from torch.library import CustomOpDef

from fisedit_compiler.capture.keys.code import (
    code_digest,
    computed_lookups,
    file_digest,
    globals_read,
    home,
    imported_by,
    is_installed,
    missing_globals,
    names_read,
    package_version,
)
from fisedit_compiler.capture.keys.reader import PLAIN, Reader
from fisedit_compiler.capture.keys.values import write_attributes

# Of a class's own members, those that no forward reads.
_CLASS_SILENT = frozenset({"_abc_impl", "__init_subclass__", "__repr__", "__str__", "__reduce__"})
_MAKING = frozenset({"__init__", "__new__"})
"""What a forward calls that makes an object; layers are made before it."""
_FIELD = type(namedtuple("_Any", "a").a)  # type: ignore[attr-defined]
_DESCRIPTORS = (types.MemberDescriptorType, types.GetSetDescriptorType, types.WrapperDescriptorType, _FIELD)


def write_partial(reader: Reader, value: functools.partial[Any] | functools.partialmethod[Any]) -> None:
    reader.say("partial")
    for name in ("func", "args", "keywords"):
        reader.watch.attribute(value, name, reader.place)
    reader.visit(value.func, ".func")
    reader.visit(value.args, ".args")
    reader.visit(value.keywords, ".keywords")
    write_attributes(reader, value)


def write_method(reader: Reader, value: types.MethodType) -> None:
    reader.say("method")
    reader.visit(value.__func__, ".__func__")
    reader.visit(value.__self__, ".__self__")


def write_wrapped(reader: Reader, value: staticmethod[..., Any] | classmethod[Any, ..., Any]) -> None:
    reader.visit(value.__func__, ".__func__")


def write_property(reader: Reader, value: property) -> None:
    reader.visit(value.fget, ".fget")
    reader.visit(value.fset, ".fset")


def write_builtin(reader: Reader, value: Any) -> None:
    reader.say(f"builtin {value.__module__}.{value.__qualname__}")
    if value.__self__ is not None and not isinstance(value.__self__, types.ModuleType):
        reader.visit(value.__self__, ".__self__")


def write_operation(reader: Reader, value: Any) -> None:
    """An operation of ``torch.ops``, or what ``torch.library.custom_op`` makes, which notes how it was used."""
    reader.say(f"operation {value}")
    if isinstance(value, CustomOpDef):
        reader.visit(value._init_fn, "()")


def write_function(reader: Reader, value: types.FunctionType) -> None:
    if (compiled := vars(value).get("_torchdynamo_orig_callable")) is not None:
        reader.visit(compiled)  # what torch.compile keeps beside it changes as it compiles
        return
    module = home(value)
    installed = is_installed(module)
    reader.say(f"function {module} {value.__module__}.{value.__qualname__}")
    reader.say(_package(reader, module) if installed else code_digest(value.__code__))
    for name in ("__code__", "__defaults__", "__kwdefaults__", "__dict__"):
        reader.watch.attribute(value, name, reader.place)
    reader.visit(value.__defaults__, ".__defaults__")
    reader.visit(value.__kwdefaults__, ".__kwdefaults__")
    read = reader.attributes(vars(value))
    for name in read:
        if not name.startswith("_torchdynamo"):  # Dynamo's notes
            reader.say(f".{name}")
            reader.visit(read[name], f".{name}")
    for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
        reader.say(f"closure {name}")
        reader.visit(cell, f" of {name} in {value.__qualname__}")
    if not installed:
        _write_names(reader, value)


def write_cell(reader: Reader, value: types.CellType) -> None:
    """What a function closes over."""
    if not reader.attribute(value, "cell_contents"):
        return
    try:
        reader.visit(value.cell_contents)
    except ValueError:
        reader.say("empty")


def _write_names(reader: Reader, value: types.FunctionType) -> None:
    names = names_read(value.__code__)
    place = home(value)
    computed = computed_lookups(value.__code__)
    for name, read in globals_read(value).items():
        reader.say(f"global {name}")
        if reader.item(value.__globals__, name, place):
            _write_named(reader, read, f" {place}.{name}", names)
            if isinstance(read, types.ModuleType) and computed:
                _write_all_of(reader, read)
    for name in missing_globals(value):
        reader.item(value.__globals__, name, place)
        if name in vars(builtins) and reader.item(vars(builtins), name, "builtins"):
            reader.visit(vars(builtins)[name])
    if "globals" in computed and (own := sys.modules.get(place)) and vars(own) is value.__globals__:
        _write_all_of(reader, own)
    for name, imported in imported_by(value).items():
        reader.say(f"import {name}")
        reader.watch.item(sys.modules, name)
        _write_attributes_of(reader, imported, names)
        if computed:
            _write_all_of(reader, imported)


def _write_named(reader: Reader, value: Any, step: str, names: frozenset[str]) -> None:
    """What a name leads to; of a module only what is named of it."""
    if isinstance(value, types.ModuleType):
        _write_name_of(reader, value)
        _write_attributes_of(reader, value, names)
    else:
        reader.visit(value, step)


def _write_all_of(reader: Reader, module: types.ModuleType) -> None:
    """Everything in a user's module."""
    root = module.__name__.partition(".")[0]
    if is_installed(module.__name__) or root == __name__.partition(".")[0] or not reader.enter(vars(module)):
        return
    for name, read in sorted(vars(module).items()):
        if not _is_dunder(name) and reader.item(vars(module), name, module.__name__):
            reader.say(f"attribute {name}")
            _write_named(reader, read, f" {module.__name__}.{name}", frozenset())
    reader.leave(vars(module))


def _write_attributes_of(reader: Reader, module: types.ModuleType, names: frozenset[str]) -> None:
    """What a function that names a module may read of it: ``settings.SCALE``, ``os.environ["SCALE"]``."""
    if module is os and names & {"environ", "environb", "getenv", "getenvb"}:
        reader.say("environment")
        reader.visit(os.environ, " os.environ")
    if not reader.enter(module):
        return
    installed = is_installed(module.__name__)
    for name in sorted(names & vars(module).keys()):
        read = vars(module)[name]
        if installed and not isinstance(read, (*PLAIN, Enum, types.ModuleType)):
            continue
        reader.say(f"attribute {name}")
        if reader.item(vars(module), name, module.__name__):
            _write_named(reader, read, f" {module.__name__}.{name}", names)
    if not installed:
        for name in sorted(names - vars(module).keys()):
            reader.item(vars(module), name, module.__name__)
    reader.leave(module)


def write_module_of_python(reader: Reader, value: types.ModuleType) -> None:
    """A module that is kept like any other value: nobody knows what is read of it."""
    _write_name_of(reader, value)
    _write_all_of(reader, value)


def _write_name_of(reader: Reader, value: types.ModuleType) -> None:
    reader.say(f"module {value.__name__} {_package(reader, value.__name__)}")


def _package(reader: Reader, module: str) -> str:
    reader.packages.add(module)
    return package_version(module)


def write_class(reader: Reader, value: type) -> None:
    reader.say(f"class {value.__module__}.{value.__qualname__}")
    reader.watch.attribute(value, "__bases__", reader.place)
    if not is_installed(type(value).__module__):
        reader.visit(type(value), f" of the class of {value.__qualname__}")
    for base in value.__mro__:
        if base.__module__ in ("builtins", "abc", "typing", "enum"):
            continue
        if base is not value:
            reader.visit(base, f" of {base.__qualname__}")
            continue
        # A class that a function made holds what the function was called with.
        installed = is_installed(base.__module__) and "<locals>" not in base.__qualname__
        reader.say(f"base {base.__module__}.{base.__qualname__}")
        reader.say(_package(reader, base.__module__) if installed else file_digest(base.__module__))
        read = reader.attributes(vars(base), base)
        for name in sorted(read):
            if _is_read(base, name, read[name], installed):
                reader.say(f"member {name}")
                reader.visit(read[name], f".{name}")


def _is_read(base: type, name: str, member: Any, installed: bool) -> bool:
    """Whether a member of a class is written down: of an installed one only what somebody put there."""
    function = getattr(member, "__func__", member)
    while isinstance(function, functools._lru_cache_wrapper):
        function = function.__wrapped__
    if isinstance(member, (functools.partial, functools.partialmethod)):
        function = member.func
    elif isinstance(member, property):
        function = member.fget
    if name in _CLASS_SILENT or isinstance(member, _DESCRIPTORS):
        return False
    if name in _MAKING and issubclass(base, torch.nn.Module):
        return False
    if isinstance(function, types.FunctionType):
        return not installed or not is_installed(home(function))
    if _is_dunder(name) or name.startswith("___"):  # Dynamo's notes on classes
        return False
    return not installed or isinstance(member, (*PLAIN, Enum)) or type(member) is torch.Tensor or _is_of_a_user(member)


def _is_of_a_user(member: Any) -> bool:
    return not isinstance(member, type) and not is_installed(type(member).__module__)


def _is_dunder(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


OPERATIONS = (torch._ops.OpOverload, torch._ops.OpOverloadPacket, CustomOpDef)
