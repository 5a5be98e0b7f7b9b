"""A provider of another package that raises, or gives what its operation does not, is named by an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fisedit_compiler.errors import ConfigError, FiseditError
from fisedit_compiler.extend import OpTraits, Provider, define_op
from fisedit_compiler.kernels.guarded import guarded

OP = "fisedit_tests::guarded"


def raises(*arguments: Any) -> Any:
    raise ZeroDivisionError("oh")


def shaped(change: Callable[[Tensor], Any]) -> Provider:
    return guarded(Provider("mine", "CPU", change), OP, torch.empty_like)


@pytest.mark.parametrize(
    ("kernel", "words"),
    [
        (raises, "its kernel raised ZeroDivisionError: oh"),
        (lambda x: None, r"its kernel gave NoneType where the operation gives float32 \[2, 3\]"),
        (lambda x: x[:1], r"gave float32 \[1, 3\] where the operation gives float32 \[2, 3\]"),
        (lambda x: x.double(), r"gave float64 \[2, 3\]"),
        (lambda x: (x, x), r"gave float32 \[2, 3\], float32 \[2, 3\] where"),
    ],
)
def test_a_kernel_that_is_wrong_is_named(kernel: Callable[..., Any], words: str) -> None:
    with pytest.raises(FiseditError, match=rf"Provider 'mine' of {OP}: .*{words}.*leave it out"):
        shaped(kernel).kernel(torch.ones(2, 3))


@pytest.mark.parametrize(
    ("supports", "words"),
    [
        (raises, r"its `supports` raised ZeroDivisionError: oh"),
        *((lambda x, a=a: a, "gives True, or") for a in (None, False, 1)),
    ],
)
def test_an_answer_that_is_none_is_named(supports: Callable[..., Any], words: str) -> None:
    provider = guarded(Provider("mine", "CPU", torch.clone, supports), OP, torch.empty_like)
    assert provider.supports is not None
    with pytest.raises(FiseditError, match=rf"Provider 'mine' of {OP}: .*{words}"):
        provider.supports(torch.ones(2))


def test_what_is_right_passes_and_memory_that_is_out_is_no_fault() -> None:
    def out_of_memory(x: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("no room")

    x = torch.ones(2)
    right = guarded(Provider("mine", "CPU", torch.neg, lambda x: "not today"), OP, torch.empty_like)
    assert torch.equal(right.kernel(x), -x) and right.supports is not None and right.supports(x) == "not today"
    with pytest.raises(torch.OutOfMemoryError):
        shaped(out_of_memory).kernel(x)


def test_the_dispatcher_asks_the_guarded_one() -> None:
    op = define_op(
        f"{OP}(Tensor x) -> Tensor",
        torch.neg,
        torch.empty_like,
        traits=OpTraits(),
        providers=[Provider("mine", "CPU", lambda x: x[:1])],
    )
    with pytest.raises(FiseditError, match=rf"Provider 'mine' of {OP}"):
        op(torch.ones(2))


MINE = Provider("mine", "CPU", torch.neg)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"schema": "fisedit_tests::no_schema(Tensor"}, "fisedit_tests::no_schema cannot be defined"),
        ({"reference": None}, "its reference is None"),
        ({"fake": 3}, "its fake is 3"),
        ({"traits": None}, "its traits are None"),
        ({"providers": [torch.neg]}, "no fisedit_compiler.extend.Provider"),
        ({"providers": [Provider("mine", "CPU", None)]}, "kernel of provider 'mine' is None"),  # type: ignore[arg-type]
        ({"providers": [Provider("mine", "CPU", torch.neg, 3)]}, "supports of provider 'mine' is 3"),  # type: ignore[arg-type]
        ({"providers": [MINE, MINE]}, "names of their own"),
        ({"providers": [Provider("mine", "Toaster", torch.neg)]}, "cannot be defined"),
    ],
)
def test_an_operation_that_is_none_is_refused(changes: dict[str, Any], words: str, request: Any) -> None:
    name = f"fisedit_tests::broken_{abs(hash(request.node.name))}"
    given = {
        "schema": f"{name}(Tensor x) -> Tensor",
        "reference": torch.neg,
        "fake": torch.empty_like,
        "traits": OpTraits(),
    }
    given |= changes
    with pytest.raises(ConfigError, match=words):
        define_op(given.pop("schema"), given.pop("reference"), given.pop("fake"), **given)
