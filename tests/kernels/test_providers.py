"""Providers: which kernel the dispatcher runs, and in words why it was no other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from fisedit_compiler.kernels.providers import ROUNDED, Choice, Provider, choose, half_precision, kernels_by_key
from fisedit_compiler.kernels.registry import define_op, registered_ops
from fisedit_compiler.kernels.traits import OpTraits, no_products
from tests.kernels.arguments import op_arguments

PROVIDED = sorted(name for name, op in registered_ops().items() if op.providers)


def add(number: float) -> Callable[[Tensor], Tensor]:
    return lambda x: x + number


def square(x: Tensor) -> Literal[True] | str:
    return x.shape[0] == x.shape[1] or "it is not square"


def small(x: Tensor) -> Literal[True] | str:
    return x.numel() <= 4 or "it has more than 4 elements"


PROVIDERS = [
    Provider("squares", "CPU", add(1.0), supports=square),
    Provider("few", "CPU", add(2.0), supports=small),
    Provider("gpu", "CUDA", add(3.0)),
]
OP = define_op(
    "fisedit_tests::shift(Tensor x) -> Tensor", add(0.5), torch.empty_like,
    traits=OpTraits(flops=no_products), providers=PROVIDERS,
)  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "added", "passed_over"),
    [
        ((3, 3), 1.0, {}),
        ((1, 3), 2.0, {"squares": "it is not square"}),
        (
            (3, 4),
            0.5,
            {
                "squares": "it is not square",
                "few": "it has more than 4 elements",
                "gpu": "it is for CUDA, calls run on cpu",
            },
        ),
    ],
    ids=str,
)
def test_the_first_provider_that_supports_the_operands_runs_else_the_reference(
    shape: tuple[int, int], added: float, passed_over: dict[str, str]
) -> None:
    choice = choose(OP.providers, "cpu", [torch.empty(shape, device="meta")])
    assert dict(choice.passed_over) == passed_over
    assert torch.equal(OP(torch.zeros(shape)), torch.full(shape, added)), "the dispatcher agrees"
    assert choice.name == {1.0: "squares", 2.0: "few", 0.5: "reference"}[added]


def test_a_provider_that_takes_everything_is_registered_as_it_is() -> None:
    """The dispatcher calls it, and nothing of ours stands between."""
    kernels = kernels_by_key(PROVIDERS, OP.reference)
    assert set(kernels) == {"CPU", "CUDA"}
    assert kernels["CUDA"] is PROVIDERS[2].kernel


def test_names_are_told_apart() -> None:
    with pytest.raises(ValueError, match=r"names of their own, got \['gpu', 'gpu'\]"):
        kernels_by_key([PROVIDERS[2], PROVIDERS[2]], OP.reference)


@pytest.mark.parametrize("name", PROVIDED)
def test_on_a_cpu_every_kernel_for_gpus_is_passed_over(name: str) -> None:
    op = registered_ops()[name]
    choice = choose(op.providers, "cpu", op_arguments(5)[name])
    assert choice.provider is None or choice.provider.dispatch_key == "CPU"
    for_gpus = [provider.name for provider in op.providers if provider.dispatch_key == "CUDA"]
    assert dict(choice.passed_over) == dict.fromkeys(for_gpus, "it is for CUDA, calls run on cpu")


def on_cuda(name: str, dtype: torch.dtype, *arguments: Any) -> Choice:
    """The choice for an op on a GPU, of which nothing is needed."""
    given = arguments or op_arguments(5)[name]
    halved = [x.to("meta", dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in given]
    return choose(registered_ops()[name].providers, "cuda", halved)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["attention_sites", "attention_rows", "attention_addressed", "cross_attention"])
def test_attention_in_half_precision_is_tritons(name: str, half: torch.dtype) -> None:
    assert on_cuda(name, half) == Choice(registered_ops()[name].providers[0], {})


@pytest.mark.parametrize("precise", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("name", "runs"),
    [("attention_sites", "reference"), ("attention_rows", "reference"), ("convolve", "reference"),
     ("cross_attention", "torch"), ("attention_addressed", "triton"), ("gather_taps", "triton")],
)  # fmt: skip
def test_tensor_cores_are_passed_over_where_they_would_round(name: str, runs: str, precise: torch.dtype) -> None:
    choice = on_cuda(name, precise)
    assert choice.name == runs
    assert dict(choice.passed_over) == ({} if runs == "triton" else {"triton": ROUNDED})
    assert "tf32" in ROUNDED and half_precision(torch.empty(1, dtype=precise)) == ROUNDED


def test_cross_attention_says_which_of_its_limits_is_passed() -> None:
    def operands(keys: int, size: int, value_size: int) -> list[Tensor]:
        return [torch.empty(1, 2, *rest) for rest in ((5, size), (keys, size), (keys, value_size))]

    assert on_cuda("cross_attention", torch.half, *operands(128, 256, 256)).name == "triton"
    for sizes, reason in (
        ((129, 64, 64), "one program holds all keys, 1 to 128"),
        ((0, 64, 64), "one program holds all keys, 1 to 128"),
        ((77, 264, 264), "queries and values must be of one size, 256 at most"),
        ((77, 64, 32), "queries and values must be of one size, 256 at most"),
    ):
        choice = on_cuda("cross_attention", torch.half, *operands(*sizes))
        assert choice.name == "torch" and choice.passed_over == {"triton": reason}


def test_a_convolution_with_few_outputs_reads_through_its_table() -> None:
    values, taps, places, _, _, *options = op_arguments(5)["convolve"]
    for outputs, runs in ((4, "triton"), (16, "reference")):
        weight = torch.empty(outputs, 72)
        choice = on_cuda("convolve", torch.half, values, taps, places, weight, None, *options)
        assert choice.name == runs
        assert all("gathering was measured to be faster" in reason for reason in choice.passed_over.values())
