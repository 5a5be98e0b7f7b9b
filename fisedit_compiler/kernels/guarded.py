"""Providers of another package: what one raises or gives that its operation does not becomes an error that names it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fisedit_compiler.errors import FiseditError
from fisedit_compiler.kernels.providers import Provider
from fisedit_compiler.kernels.registry import KernelError


def guarded(provider: Provider, op: str, fake: Callable[..., Any]) -> Provider:
    """A provider whose faults name it.

    Args:
        provider: computes ``op``.
        op: qualified name.
        fake: gives an empty tensor of the result's shape and dtype; asked once for every form of arguments.
    """
    supports = provider.supports
    known: set[Any] = set()

    def refuse(problem: str, error: BaseException | None = None) -> NoReturn:
        raise KernelError(
            f"Provider {provider.name!r} of {op}: {problem}. Mend it, or leave it out of the providers: the reference "
            "computes the operation then."
        ) from error

    def kernel(*args: Any, **kwargs: Any) -> Any:
        try:
            result = provider.kernel(*args, **kwargs)
        except (FiseditError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            refuse(f"its kernel raised {type(error).__name__}: {error}", error)
        form = tuple((value.shape, value.dtype) for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        if form not in known:
            found, due = _form(result), _form(fake(*args, **kwargs))
            if found != due:
                refuse(f"its kernel gave {_words(found)} where the operation gives {_words(due)}")
            known.add(form)
        return result

    def asked(*args: Any, **kwargs: Any) -> Literal[True] | str:
        assert supports is not None
        try:
            answer = supports(*args, **kwargs)
        except Exception as error:
            refuse(f"its `supports` raised {type(error).__name__}: {error}", error)
        if answer is not True and not isinstance(answer, str):
            refuse(f"its `supports` gave {answer!r}, and gives True, or in a few words why it passes the operands over")
        return answer

    return Provider(provider.name, provider.dispatch_key, kernel, None if supports is None else asked)


def _form(result: Any) -> list[Any]:
    leaves = pytree.tree_leaves(result)
    return [(tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else type(leaf).__name__ for leaf in leaves]


def _words(form: list[Any]) -> str:
    texts = [
        leaf if isinstance(leaf, str) else f"{str(leaf[1]).removeprefix('torch.')} {list(leaf[0])}" for leaf in form
    ]
    return ", ".join(texts) or "nothing"
