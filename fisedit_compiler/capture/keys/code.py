"""Code as text: what tells a function or a class from an edited, replaced or differently bound one.

Code of installed packages is told apart by the package's version, all other code by what it compiles to.
"""

from __future__ import annotations

import dis
import hashlib
import importlib
import importlib.metadata
import importlib.util
import os
import re
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import suppress
from functools import cache, lru_cache
from pathlib import Path
from types import CodeType, FunctionType, ModuleType

_INSTALLED = tuple({str(Path(sysconfig.get_paths()[name]).resolve()) for name in ("purelib", "platlib", "stdlib")})
_BY_NAME = frozenset(
    {"globals", "vars", "locals", "eval", "exec", "getattr", "__import__", "sys", "importlib", "operator"}
)
"""What looks things up by a text."""
_SHORT = 200
_PLAIN = (bool, int, float, complex, str, bytes, type(None))


@cache
def is_installed(module_name: str) -> bool:
    """Whether a module belongs to Python itself or to an installed package, whose version stands for its code."""
    root, _, path = module_name.partition(".")
    if root in sys.builtin_module_names or (root == __name__.partition(".")[0] and not path.startswith("models")):
        return True
    file = getattr(sys.modules.get(root), "__file__", None)
    if not file:
        return False
    place = str(Path(str(file)).resolve())
    return place.startswith(_INSTALLED) or _is_installed_elsewhere(root, place)


def _is_installed_elsewhere(root: str, path: str) -> bool:
    """Whether a wheel put the package there (``pip install --target``, another site); not so for editable installs."""
    try:
        distribution = importlib.metadata.distribution(root)
    except importlib.metadata.PackageNotFoundError:
        return False
    return distribution.read_text("RECORD") is not None and path.startswith(
        str(Path(str(distribution.locate_file(""))).resolve()) + os.sep
    )


@cache
def package_version(module_name: str) -> str:
    """The version of the package that a module belongs to; Python's own for modules of Python."""
    root = module_name.partition(".")[0]
    try:
        return importlib.metadata.version(root)
    except importlib.metadata.PackageNotFoundError:
        return str(getattr(sys.modules.get(root), "__version__", sys.version.split()[0]))


def home(function: FunctionType) -> str:
    """Name of the module that a function was written in; what ``functools.wraps`` copies says where another is from."""
    return str(function.__globals__.get("__name__") or "")


def code_digest(code: CodeType) -> str:
    """What a function does, apart from what it is bound to: its instructions, names and constants, inner ones too."""
    return hashlib.sha256(repr(tuple(_code_parts(code))).encode()).hexdigest()


def _code_parts(code: CodeType) -> Iterator[object]:
    yield code.co_code, code.co_names, code.co_varnames, code.co_freevars
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield tuple(_code_parts(constant))
        elif isinstance(constant, frozenset):
            yield "frozenset", tuple(sorted(map(repr, constant)))
        else:
            yield type(constant).__name__, repr(constant)


@lru_cache(maxsize=4096)
def names_read(code: CodeType) -> frozenset[str]:
    """Names that a function or its inner functions use for anything: globals, attributes, and quoted ones."""
    inner = (names_read(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return frozenset(code.co_names).union(_quoted(code), *inner)


@lru_cache(maxsize=4096)
def global_names(code: CodeType) -> frozenset[str]:
    """Names that a function or its inner functions may look up among their module's globals."""
    names = {str(step.argval) for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    if names & _BY_NAME:
        names |= _quoted(code)
    inner = (global_names(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return frozenset(names).union(*inner)


def _quoted(code: CodeType) -> set[str]:
    """Words of short texts: ``globals()["SCALE"]``, ``getattr(settings, "SCALE")``, ``eval("SCALE * 2")``."""
    texts = [constant for constant in code.co_consts if isinstance(constant, str) and len(constant) <= _SHORT]
    return {word for text in texts for word in (text, *re.findall(r"[^\W\d]\w*", text))}


def globals_read(function: FunctionType) -> dict[str, object]:
    """The globals that a function's code names, in order of their names."""
    names = sorted(global_names(function.__code__) & function.__globals__.keys())
    return {name: function.__globals__[name] for name in names}


def missing_globals(function: FunctionType) -> list[str]:
    """Names that the code would look up among the globals and that are not there: builtins, and those to come."""
    return sorted(global_names(function.__code__) - function.__globals__.keys())


_BY_GLOBAL_NAME = ("LOAD_GLOBAL", "LOAD_NAME")
_BETWEEN = frozenset({"CACHE", "PRECALL", "PUSH_NULL", "NOP", "EXTENDED_ARG", "RESUME"})


@lru_cache(maxsize=4096)
def computed_lookups(code: CodeType) -> frozenset[str]:
    """Where a function looks up names that it computes: ``"globals"`` or ``"attributes"`` (of modules, for one)."""
    steps = [step for step in dis.get_instructions(code) if step.opname not in _BETWEEN]
    found: set[str] = set()
    for number, step in enumerate(steps):
        by_name = step.opname in _BY_GLOBAL_NAME
        after = number + 1
        if by_name and step.argval == "getattr":
            while after < len(steps) and (after == number + 1 or steps[after].opname == "LOAD_ATTR"):
                after += 1
            kind = "attributes"
        elif by_name and step.argval in ("globals", "locals", "vars"):
            while after < len(steps) and not steps[after - 1].opname.startswith("CALL"):
                after += 1
            kind = "attributes" if step.argval == "vars" else "globals"
        elif by_name and step.argval in ("eval", "exec"):
            kind = "globals"
        elif step.opname == "LOAD_ATTR" and step.argval == "__dict__":
            kind = "attributes"
        else:
            continue
        if not _takes_a_constant(steps[after:]):
            found.add(kind)
    inner = (computed_lookups(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return frozenset(found).union(*inner)


def _takes_a_constant(steps: list[dis.Instruction]) -> bool:
    """Whether what was looked up in is next asked for a text that is written there."""
    if steps and steps[0].opname in ("LOAD_METHOD", "LOAD_ATTR"):
        steps = steps[1:]
    if not steps or steps[0].opname == "CONTAINS_OP":
        return True
    if steps[0].opname != "LOAD_CONST" or not isinstance(steps[0].argval, str):
        return False
    taking = next((step for step in steps if not step.opname.startswith("LOAD_")), steps[0])
    return taking.opname.startswith("CALL") or taking.opname == "BINARY_SUBSCR" or taking.argrepr == "[]"


def imported_by(function: FunctionType) -> dict[str, ModuleType]:
    """Modules of the user's that a function imports when it runs, under their full names.

    What was not imported yet is imported now, as the function would: that it did must not look like a change.
    """
    package = str(function.__globals__.get("__package__") or "")
    for name in sorted(_imports(function.__code__)):
        for full in (name, f"{package}.{name}"):
            if full not in sys.modules and _is_of_the_user(full):
                with suppress(Exception):
                    importlib.import_module(full)
    found: dict[str, ModuleType] = {}
    names = _imports(function.__code__) | (global_names(function.__code__) & sys.modules.keys())
    if names & _BY_NAME:
        names |= names_read(function.__code__)
    for name in sorted(names - function.__globals__.keys()):
        for full in (name, f"{package}.{name}"):
            module = sys.modules.get(full)
            if isinstance(module, ModuleType) and (full == "os" or not is_installed(full)):
                found[full] = module
    return found


def _is_of_the_user(module_name: str) -> bool:
    """Whether a module that is not imported yet would come from a file outside of Python and its packages."""
    try:
        spec = importlib.util.find_spec(module_name.partition(".")[0])
    except (ImportError, ValueError):
        return False
    return spec is not None and bool(spec.origin) and not str(Path(str(spec.origin)).resolve()).startswith(_INSTALLED)


@lru_cache(maxsize=4096)
def _imports(code: CodeType) -> frozenset[str]:
    inner = (_imports(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    names = {str(step.argval) for step in dis.get_instructions(code) if step.opname == "IMPORT_NAME"}
    return frozenset(names).union(*inner)


def file_digest(module_name: str) -> str:
    """Digest of the source file of a module, empty if there is none."""
    file = getattr(sys.modules.get(module_name), "__file__", None)
    if not file or not Path(file).is_file():
        return ""
    return _file_digest(file, Path(file).stat().st_mtime_ns)


@lru_cache(maxsize=256)
def _file_digest(file: str, modified: int) -> str:
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()
