"""Where the samples of a batch are in a value, and which operations mix them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fisedit_compiler.capture.arguments import sign
from fisedit_compiler.capture.export import capture
from fisedit_compiler.graph.batch_axes import Mixed, Samples, samples_of

Function = Callable[[Tensor], Tensor]

# By name: the operation on a map [b, 4, h, w], and the axis on which its result has the samples.
APART: dict[str, tuple[Function, int]] = {
    "pointwise": (lambda y: torch.tanh(y) + 1, 0),
    "channels folded into the batch": (lambda y: y.reshape(y.shape[0] * 2, 2, *y.shape[2:]), 0),
    "a sum over channels": (lambda y: y.sum(1), 0),
    "a norm over the last axes": (lambda y: F.layer_norm(y.permute(0, 2, 3, 1), (4,)), 0),
    "another order of axes": (lambda y: y.permute(1, 0, 2, 3), 1),
    "a new first axis": (lambda y: y.unsqueeze(0), 1),
    "a softmax along channels": (lambda y: y.softmax(1), 0),
    "products of every sample": (lambda y: y.flatten(2) @ y.flatten(2).transpose(1, 2), 0),
}
MIXED: dict[str, Function] = {
    "a mean of the batch": lambda y: y.mean(0),
    "a sum over batch and channels": lambda y: y.sum((0, 1)),
    "a softmax along the batch": lambda y: y.softmax(0),
    "zeros around the samples": lambda y: F.pad(y.permute(1, 2, 0, 3), (0, 0, 1, 1)),
    "the batch behind channels": lambda y: y.transpose(0, 1).reshape(-1, *y.shape[2:]),
    "a running sum": lambda y: y.cumsum(0),
    "another order of samples": lambda y: y.flip(0),
    "the first sample": lambda y: y[0],
    "the size of the batch": lambda y: y / y.shape[0],
    "similarities between samples": lambda y: y.flatten(1) @ y.flatten(1).T,
}


class Applied(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, sample: Tensor) -> Tensor:
        return self.function(sample)


def samples(function: Function) -> Samples:
    """Of the result of a function of a map."""
    inputs = {"sample": torch.zeros(2, 4, 8, 12)}
    signature, _ = sign(inputs, None)
    graph = capture(Applied(function).eval(), inputs, signature, 4).graph
    (result,) = next(node for node in graph.nodes if node.op == "output").args[0]
    return samples_of(graph, signature)[result]


@pytest.mark.parametrize("name", APART)
def test_samples_stay_apart(name: str) -> None:
    function, axis = APART[name]
    assert samples(function) == axis


@pytest.mark.parametrize("name", MIXED)
def test_samples_are_mixed(name: str) -> None:
    assert isinstance(samples(MIXED[name]), Mixed)
