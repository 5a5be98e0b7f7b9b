"""The ten mistakes a user is most likely to meet while a model is compiled, word for word.

Each message names the node or module, its place in the user's model, the source line and the remedy. What torch.export
itself says stands as ``...``: it differs between versions.
"""

# Messages stand here as they are printed.
# ruff: noqa: E501

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fisedit_compiler import SparsifyConfig, sparsify
from fisedit_compiler.errors import FiseditError
from fisedit_compiler.extend import Pass, Program, Rewriter

FILE = "test_compile_errors.py"


class Branch(nn.Module):
    def forward(self, sample: Tensor) -> Tensor:
        if sample.mean() > 0:  # depends on data
            return sample
        return sample * 2


class Model(nn.Module):
    """A convolution and what a test puts behind it."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.block = nn.Sequential(*layers)

    def forward(self, sample: Tensor) -> Tensor:
        out: Tensor = self.block(self.conv(sample))
        return out


class Similarity(nn.Module):
    def forward(self, sample: Tensor) -> Tensor:
        tokens = sample.flatten(2)
        return tokens.transpose(1, 2) @ tokens


class Conditional(nn.Module):
    def forward(self, sample: Tensor) -> Any:
        return torch.cond(sample.mean() > 0, lambda x: x * 2, lambda x: x - 1, (sample,))


class Fifths(nn.Module):
    def forward(self, sample: Tensor) -> Tensor:
        return F.interpolate(F.avg_pool2d(sample, 5, 5), size=sample.shape[2:])


class Rounded(nn.Module):
    def forward(self, sample: Tensor) -> Tensor:
        small = F.max_pool2d(F.pad(sample, (4, 4, 4, 4)), 5, 5)
        return sample + F.interpolate(small, size=sample.shape[2:])


class Tokens(nn.Module):
    def forward(self, tokens: Tensor) -> Tensor:
        return tokens * 2


class Numpy(nn.Module):
    def forward(self, sample: Tensor) -> Tensor:
        return torch.from_numpy(sample.numpy())


class Forgets(Pass):
    """A pass of a user that leaves a node without a spec."""

    name = "forgets"
    after = ("convolution",)

    def run(self, program: Program) -> None:
        next(node for node in program.graph.nodes if node.target is torch.ops.aten.silu.default).meta.pop("spec")

    def rewrite(self, node: torch.fx.Node, rewriter: Rewriter) -> str | None:
        raise AssertionError


class Writes(Forgets):
    """One that writes in place."""

    name = "writes"

    def run(self, program: Program) -> None:
        node = next(node for node in program.graph.nodes if node.target is torch.ops.aten.silu.default)
        node.target = torch.ops.aten.silu_.default


SAMPLE = {"sample": torch.zeros(1, 4, 16, 16)}
REMEDY = (
    "Remedy: make the forward free of data-dependent Python control flow, or sparsify the submodule that is; pass "
    "SparsifyConfig(multiple=k) if sizes must be divisible by k."
)
DEFECT = "This is a defect of the pass, not of your model; SparsifyConfig(disabled_passes={{'{0}'}}) avoids it until it is mended."

MISTAKES: dict[str, tuple[nn.Module, dict[str, Tensor], dict[str, Any], str]] = {
    "control flow on data": (
        Model(Branch()), SAMPLE, {},
        "torch.export could not capture Model with symbolic batch, height and width (divisor 1) in block.0 "
        f"({FILE}:LINE: if sample.mean() > 0:  # depends on data): ...\n{REMEDY}",
    ),
    "an operation on numpy arrays": (
        Model(Numpy()), SAMPLE, {},
        "torch.export could not capture Model with symbolic batch, height and width (divisor 1) in block.0 "
        f"({FILE}:LINE: return torch.from_numpy(sample.numpy())): ...\n{REMEDY}",
    ),
    "a captured branch": (
        Model(Conditional()), SAMPLE, {},
        "Model contains control flow captured as a subgraph: cond = cond in block.0 "
        f"({FILE}:LINE: return torch.cond(sample.mean() > 0, lambda x: x * 2, lambda x: x - 1, (sample,))). Sparsify the "
        "submodule without it.",
    ),
    "sizes that do not divide": (
        Model(Fifths()), SAMPLE, {},
        "torch.export could not capture Model with symbolic batch, height and width (divisor 1) in block.0 "
        f"({FILE}:LINE: return F.interpolate(F.avg_pool2d(sample, 5, 5), size=sample.shape[2:])): ...\n{REMEDY}",
    ),
    "sizes that are rounded": (
        Model(Rounded()), SAMPLE, {},
        f"Model rounds its sizes for every divisor of height and width that was tried (1, 2, 4, 8, 16, 32, 64): max_pool2d = aten.max_pool2d in block.0 "
        f"({FILE}:LINE: small = F.max_pool2d(F.pad(sample, (4, 4, 4, 4)), 5, 5)) has shape [b, 4, floor(h/5 + 3/5) + 1, floor(w/5 + 3/5) + 1]. Pass SparsifyConfig(multiple=k) "
        "with the model's total downsampling.",
    ),
    "no image among the inputs": (
        Tokens(), {"tokens": torch.zeros(2, 3, 4)}, {},
        "The module has no spatial input: none of its tensor arguments is a 4-D floating point map [batch, channels, "
        "height, width] (arguments: ['tokens']). Sparse editing needs one; name it with "
        "SparsifyConfig(spatial_inputs=(...)) if it has another form.",
    ),
    "a spatial input of another name": (
        Model(), SAMPLE, {"spatial_inputs": ("image",)},
        "Spatial input 'image' is no tensor argument of this call; it has ['sample'].",
    ),
    "an output that mixes sites": (
        Model(Similarity()), SAMPLE, {},
        f"Output matmul = aten.matmul in block.0 ({FILE}:LINE: return tokens.transpose(1, 2) @ tokens) is opaque (shape "
        "[b, h*w, h*w] relates sites to sites (such as an attention matrix)): its sites cannot be told apart, so nothing "
        "outside the mask could be kept. Sparsify the submodule whose output is a map [batch, channels, height, width].",
    ),
    "a pass that forgets": (
        Model(nn.SiLU()), SAMPLE, {"extra_passes": (Forgets,)},
        f"After pass forgets: silu = aten.silu in block.0 ({FILE}:LINE: out: Tensor = self.block(self.conv(sample))) has no "
        "spec. " + DEFECT.format("forgets"),
    ),
    "a pass that writes in place": (
        Model(nn.SiLU()), SAMPLE, {"extra_passes": (Writes,)},
        f"After pass writes: silu = aten.silu_ in block.0 ({FILE}:LINE: out: Tensor = self.block(self.conv(sample))) mutates "
        "an argument; passes must stay functional. " + DEFECT.format("writes"),
    ),
    "a pass that is none": (
        Model(), SAMPLE, {"disabled_passes": frozenset({"convolutions"})},
        "disabled_passes names 'convolutions', which is no pass; the passes are [...].",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_the_message_word_for_word(name: str) -> None:
    module, inputs, options, expected = MISTAKES[name]
    with pytest.raises(FiseditError) as caught:
        sparsify(module.eval(), SparsifyConfig(cache=False, **options), example_inputs=inputs)
    message = re.sub(rf"{FILE}:\d+:", f"{FILE}:LINE:", str(caught.value))
    # What torch.export says is between the place and the remedy.
    message = re.sub(r"(\(divisor 1\)(?: in \S+ \([^\n]*\))?): .*\nRemedy", r"\1: ...\nRemedy", message, flags=re.S)
    message = re.sub(r"the passes are \[.*\]", "the passes are [...]", message)
    assert message == expected


def test_what_torch_says_is_kept_and_how_to_debug_torch_is_not() -> None:
    with pytest.raises(FiseditError, match="data-dependent expression") as caught:
        sparsify(Model(Branch()).eval(), SparsifyConfig(cache=False), example_inputs=SAMPLE)
    assert "TORCH_LOGS" not in str(caught.value) and "docs.google.com" not in str(caught.value)
    assert caught.value.__cause__ is not None, "all of it is in the cause"
