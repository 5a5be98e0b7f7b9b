"""Sizes as text and back, by a grammar of our own: sympy's parser is Python's ``eval``.

    sum     = product (("+" | "-") product)*
    product = signed (("*" | "/" | "//") signed)*
    signed  = "-" signed | power
    power   = atom ["**" signed]
    atom    = integer | symbol | function "(" sum ("," sum)* ")" | "(" sum ")"

Symbols are ``b``, ``h``, ``w``, ``t``. Everything that could take long or much memory is bounded.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import sympy
from torch.utils._sympy import functions

from fisedit_compiler.graph.sizes import BATCH, HEIGHT, TEXT, WIDTH

LONGEST = 1000
"""Characters of a size."""
_DEEPEST = 40
_LARGEST_EXPONENT = 16
_SYMBOLS = {str(symbol): symbol for symbol in (BATCH, HEIGHT, WIDTH, TEXT)}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "floor": sympy.floor,
    "ceiling": sympy.ceiling,
    "Abs": sympy.Abs,
    "Min": sympy.Min,
    "Max": sympy.Max,
    "Mod": functions.Mod,
    "PythonMod": functions.PythonMod,
    "FloorDiv": functions.FloorDiv,
    "CleanDiv": functions.CleanDiv,
    "CeilDiv": functions.CeilDiv,
}
_TOKENS = re.compile(r"\s*(?:([0-9]{1,18})(?![0-9])|([A-Za-z_]+)|(\*\*|//|[-+*/(),]))")


def read_size(text: object) -> sympy.Expr:
    """The size that ``text`` stands for.

    Raises:
        ValueError: it is no size of this grammar.
    """
    if not isinstance(text, str) or len(text) > LONGEST:
        raise ValueError("a size is not text, or too long")
    try:
        found = _Parser(text).whole()
    except (ArithmeticError, TypeError, AttributeError, RecursionError) as error:  # such as a division by zero
        raise ValueError(f"{text!r} is no size ({error})") from error
    if not isinstance(found, sympy.Expr) or found.has(sympy.zoo, sympy.nan, sympy.oo, sympy.S.NegativeInfinity):
        raise ValueError(f"{text!r} is no size")
    return found


def write_size(size: sympy.Expr) -> str:
    """Text that reads back as exactly this size.

    Raises:
        ValueError: there is none.
    """
    text = str(size)
    if read_size(text) != size:
        raise ValueError(f"size {size} does not read back as itself")
    return text


class _Parser:
    def __init__(self, text: str) -> None:
        self.text, self.depth = text, 0
        self.tokens = self._split(text.rstrip())
        self.at = 0

    def _split(self, text: str) -> list[str]:
        found, end = [], 0
        while end < len(text):
            match = _TOKENS.match(text, end)
            if match is None:
                raise self._wrong()
            found.append(match.group(match.lastindex or 0))
            end = match.end()
        return found

    def _wrong(self) -> ValueError:
        return ValueError(f"{self.text!r} is no size")

    def _next(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def _take(self, *wanted: str) -> str:
        token = self._next()
        if token not in wanted or not token:
            return ""
        self.at += 1
        return token

    def _expect(self, token: str) -> None:
        if not self._take(token):
            raise self._wrong()

    def whole(self) -> Any:
        found = self._sum()
        if self.at != len(self.tokens):
            raise self._wrong()
        return found

    def _sum(self) -> Any:
        self.depth += 1
        if self.depth > _DEEPEST:
            raise self._wrong()
        found = self._product()
        while sign := self._take("+", "-"):
            term = self._product()
            found = found + term if sign == "+" else found - term
        self.depth -= 1
        return found

    def _product(self) -> Any:
        found = self._signed()
        while sign := self._take("*", "/", "//"):
            factor = self._signed()
            if sign == "*":
                found = found * factor
            else:
                found = found / factor if sign == "/" else functions.FloorDiv(found, factor)
        return found

    def _signed(self) -> Any:
        signs = 0
        while self._take("-"):
            signs += 1
        found = self._power()
        return -found if signs % 2 else found

    def _power(self) -> Any:
        base = self._atom()
        if not self._take("**"):
            return base
        negative = bool(self._take("-"))
        exponent = self._atom()
        # Powers of powers would grow without bound.
        if not exponent.is_Integer or abs(exponent) > _LARGEST_EXPONENT or base.has(sympy.Pow):
            raise self._wrong()
        if base.is_number and abs(base) > 2**31:
            raise self._wrong()
        return base**-exponent if negative else base**exponent

    def _atom(self) -> Any:
        token = self._next()
        self.at += 1
        if token.isdecimal():
            return sympy.Integer(int(token))
        if token in _SYMBOLS:
            return _SYMBOLS[token]
        if token in _FUNCTIONS:
            self._expect("(")
            arguments = [self._sum()]
            while self._take(","):
                arguments.append(self._sum())
            self._expect(")")
            return _FUNCTIONS[token](*arguments)
        if token != "(":
            raise self._wrong()
        found = self._sum()
        self._expect(")")
        return found
