"""Names in what the package says to its users: calls, their arguments, classes, options, files; each exists.

A message is any string of the package with a space in it that is no docstring. What an f-string fills in is left out.
"""

from __future__ import annotations

import ast
import asyncio
import builtins
import contextvars
import copy
import dataclasses
import inspect
import re
import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy
import pytest
import sympy
import torch
import typer
from diffusers import StableDiffusionPipeline
from diffusers.schedulers import DDIMScheduler
from PIL import Image

from fisedit_compiler.cli import app
from tests.documents.test_names import PACKAGE, ROOT, wrong_names

FILLED_IN = "\0"
"""Stands for what an f-string fills in."""
OTHERS = (
    asyncio, builtins, contextvars, copy, dataclasses, threading, torch, torch.Tensor, torch.nn.Module, numpy,
    numpy.ma.MaskedArray, sympy, Image, Image.Image, StableDiffusionPipeline, DDIMScheduler,
)  # fmt: skip
"""Whose functions and methods messages may name beside the package's own."""
DOORS = ("api", "config", "module", "pipelines/editor", "dynamo/backend")
"""What users call; a name that is defined there means that one, whatever else has it."""
VARIABLES = {"pipe"}
"""What is called in messages and is the user's own."""

_CALL = re.compile(r"(?<![\w\\])([A-Za-z_][\w.]*)\(((?:[^()]|\([^()]*\))*)\)")
_ARGUMENT = re.compile(r"(?<![\w.\-])([a-z_]\w*)=(?!=)")
_ATTRIBUTE = re.compile(r"\b([A-Z]\w+)\.([a-z_]\w*)")
_OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*")


def test_messages_name_what_there_is() -> None:
    wrong = {
        f"{file.relative_to(ROOT)}:{line}": names
        for file in sorted(PACKAGE.rglob("*.py"))
        for line, text in messages(file.read_text(encoding="utf-8"))
        if (names := wrong_in_message(text, file.parent))
    }
    assert wrong == {}


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("use SparsifyConfig(backend='eager') or sparsify(unet, SparsifyConfig(norm=...))", []),
        ("use SparsifyConfig(backends='eager')", ["SparsifyConfig(backends=)"]),
        ("use sparsify(unet, SparsifyConfig(norms=...))", ["SparsifyConfig(norms=)"]),
        ("use compiled.edit(recording, masks=mask)", ["edit(masks=)"]),
        ("use compiled.edits(recording)", ["edits()"]),
        ("call eval(), or image.convert('RGB'), or pipe(prompt)", []),
        ("dense_calls=3 is too many, and dense_cals=3 too", ["dense_cals="]),
        ("SparsifyConfig.dense_above is set, SparsifyConfig.sparse_above is not", ["SparsifyConfig.sparse_above"]),
        ("see docs/masks.md and docs/gone.md", ["docs/gone.md"]),
        ("name another folder by --output, or by --target", ["--target"]),
        (f"{FILLED_IN}=3 and {FILLED_IN}(x=3) are filled in", []),
    ],
)
def test_names_that_are_wrong_are_found(text: str, wrong: list[str]) -> None:
    assert wrong_in_message(text, PACKAGE) == wrong


def test_a_message_is_every_string_but_docstrings_and_words() -> None:
    source = (
        '"""No message."""\nWORD = "word"\n\ndef f(x):\n    """Nor this."""\n    raise E(f"no {x} in " "it", "a b")\n'
    )
    assert [text for _, text in messages(source)] == [f"no {FILLED_IN} in it", "a b"]


def messages(source: str) -> Iterator[tuple[int, str]]:
    """Every message of a module with its line. Regular expressions and HTML are none."""
    tree = ast.parse(source)
    apart = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    apart |= {
        id(part)
        for node in ast.walk(tree)
        if isinstance(node, ast.JoinedStr)
        for part in node.values
        if isinstance(part, ast.Constant)
    }
    for node in ast.walk(tree):
        text = ""
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in apart:
            text = node.value
        elif isinstance(node, ast.JoinedStr):
            text = "".join(str(part.value) if isinstance(part, ast.Constant) else FILLED_IN for part in node.values)
        if " " in text and "\\" not in text and not text.startswith("<"):
            yield node.lineno, text


def wrong_in_message(text: str, folder: Path) -> list[str]:
    """The names in a message that stand for nothing. ``folder`` is where the message is."""
    found = wrong_names(text, folder)
    called = list(calls(text))
    for name, arguments in called:
        if name not in parameters() and name not in VARIABLES and not any(hasattr(owner, name) for owner in OTHERS):
            found.append(f"{name}()")
        elif name in parameters():
            found += [f"{name}({argument}=)" for argument in arguments if argument not in parameters()[name]]
    outside = _CALL.sub(FILLED_IN, text)
    found += [f"{name}=" for name in _ARGUMENT.findall(outside) if name not in words()]
    found += [
        f"{owner}.{name}"
        for owner, name in _ATTRIBUTE.findall(text)
        if owner in attributes() and name not in attributes()[owner]
    ]
    return found + [option for option in _OPTION.findall(text) if option not in options()]


def calls(text: str) -> Iterator[tuple[str, list[str]]]:
    """Names of what a text calls, each with the names of arguments; calls inside of calls too."""
    for name, arguments in _CALL.findall(text):
        yield name.rpartition(".")[2], _ARGUMENT.findall(_CALL.sub(FILLED_IN, arguments))
        yield from calls(arguments)


@cache
def definitions(files: tuple[Path, ...]) -> list[ast.FunctionDef | ast.ClassDef]:
    nodes = (node for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    return [node for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))]


def everywhere() -> tuple[Path, ...]:
    return tuple(sorted(PACKAGE.rglob("*.py")))


@cache
def parameters() -> dict[str, set[str]]:
    """Names of everything in the package that can be called, each with the names of all its arguments."""
    return called_in(everywhere()) | called_in(tuple((PACKAGE / door).with_suffix(".py") for door in DOORS))


def called_in(files: tuple[Path, ...]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for node in definitions(files):
        names = found.setdefault(node.name, set())
        if isinstance(node, ast.ClassDef):
            names |= {field for field in attributes()[node.name] if not field.startswith("_")}
        made = node.body if isinstance(node, ast.ClassDef) else [node]
        for function in made:
            if isinstance(function, ast.FunctionDef) and function.name in ("__init__", node.name):
                names |= arguments_of(function)
    return found


@cache
def words() -> set[str]:
    """Names of all arguments: the package's, and those of functions that messages speak of."""
    others = (StableDiffusionPipeline.__call__, DDIMScheduler.__init__, torch.compile, dataclasses.dataclass)
    found = {name for function in others for name in inspect.signature(function).parameters}
    return found.union(*parameters().values())


def arguments_of(function: ast.FunctionDef) -> set[str]:
    given = function.args
    return {argument.arg for argument in (*given.posonlyargs, *given.args, *given.kwonlyargs)}


@cache
def attributes() -> dict[str, set[str]]:
    """Names of the package's classes, each with what their bodies define; those of base classes count too."""
    classes = [node for node in definitions(everywhere()) if isinstance(node, ast.ClassDef)]
    own: dict[str, set[str]] = {}
    for node in classes:
        names = own.setdefault(node.name, set())
        for part in ast.walk(node):
            if isinstance(part, ast.FunctionDef):
                names.add(part.name)
            elif isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
                names.add(part.target.id)
            elif isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name) and part.value.id == "self":
                names.add(part.attr)
    for node in classes:
        for base in node.bases:
            own[node.name] |= own.get(ast.unparse(base).rpartition(".")[2], set())
    return own


@cache
def options() -> set[str]:
    """Options of ``fisedit`` and of every module of the package with a command line of its own."""
    command = typer.main.get_command(app)
    known = [parameter for one in getattr(command, "commands", {"": command}).values() for parameter in one.params]
    found = {"--help", *(option for parameter in known for option in (*parameter.opts, *parameter.secondary_opts))}
    for file in PACKAGE.rglob("*.py"):
        found |= set(re.findall(r'add_argument\(\s*"(--[\w-]+)"', file.read_text(encoding="utf-8")))
    return found
