"""Code as text: what tells a function or a class from an edited, replaced or differently bound one.

Code of installed packages is told apart by the package's version, all other code by what it compiles to.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import sys
import sysconfig
from collections.abc import Iterator
from functools import cache, lru_cache
from pathlib import Path
from types import CodeType, FunctionType

_INSTALLED = tuple({str(Path(sysconfig.get_paths()[name]).resolve()) for name in ("purelib", "platlib", "stdlib")})
_PLAIN = (bool, int, float, complex, str, bytes, type(None))


@cache
def is_installed(module_name: str) -> bool:
    """Whether a module belongs to Python itself or to an installed package, whose version stands for its code."""
    root = module_name.partition(".")[0]
    if root in sys.builtin_module_names:
        return True
    file = getattr(sys.modules.get(root), "__file__", None)
    if not file:
        return False
    path = str(Path(str(file)).resolve())
    return path.startswith(_INSTALLED) or _is_installed_elsewhere(root, path)


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


def names_read(code: CodeType) -> frozenset[str]:
    """Names that a function or its inner functions may look up among their module's globals."""
    inner = (names_read(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return frozenset(code.co_names).union(*inner)


def globals_read(function: FunctionType) -> dict[str, object]:
    """The globals that a function's code names, in order of their names."""
    return {
        name: function.__globals__[name]
        for name in sorted(names_read(function.__code__))
        if name in function.__globals__
    }


def file_digest(module_name: str) -> str:
    """Digest of the source file of a module, empty if there is none."""
    file = getattr(sys.modules.get(module_name), "__file__", None)
    if not file or not Path(file).is_file():
        return ""
    return _file_digest(file, Path(file).stat().st_mtime_ns)


@lru_cache(maxsize=256)
def _file_digest(file: str, modified: int) -> str:
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()
