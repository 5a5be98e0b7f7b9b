"""What ``sparsify()`` and its configuration refuse, each with its remedy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fisedit_compiler import SparsifyConfig, sparsify
from fisedit_compiler.errors import CaptureError, ConfigError, ModeError
from tests.support.compiled import model_and_compiled


def test_sparsify_of_a_sparsified():
    with pytest.raises(ModeError, match=r"pass the original \(`compiled.original`\)"):
        sparsify(model_and_compiled()[1])


class HoldsAUNet:
    def __init__(self, unet: nn.Module) -> None:
        self.unet = unet


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (HoldsAUNet, "got the class HoldsAUNet; pass an instance"),
        (nn.Conv2d, "got the class Conv2d; pass an instance"),
        (None, "got an object of type NoneType; pass a torch.nn.Module"),
        ("unet", "got an object of type str; pass a torch.nn.Module"),
        ({}, "got an object of type dict; pass a torch.nn.Module"),
    ],
)
def test_sparsify_of_what_is_no_module(wrong: Any, words: str):
    with pytest.raises(ConfigError, match=words):
        sparsify(wrong)


def test_sparsify_of_a_whole_pipeline_names_its_unet():
    with pytest.raises(ConfigError, match=r"got a HoldsAUNet; pass its UNet, pipe.unet = sparsify\(pipe.unet\)"):
        sparsify(HoldsAUNet(model_and_compiled()[1].original))  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", ["inductor", {"norm": "recorded"}, SparsifyConfig])
def test_a_configuration_of_another_type(wrong: Any):
    with pytest.raises(ConfigError, match="pass a SparsifyConfig"):
        sparsify(model_and_compiled()[1].original, wrong)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ((torch.zeros(1, 4, 8, 8),), "example_inputs is of type tuple; pass the keyword arguments of one call"),
        (torch.zeros(1, 4, 8, 8), "example_inputs is of type Tensor; pass the keyword arguments of one call"),
        ({}, r"do not fit Conv2d.forward \(missing a required argument: 'input'\); pass"),
        ({"sample": torch.zeros(1, 4, 8, 8)}, r"do not fit Conv2d.forward \(.*\); pass"),
        ({1: torch.zeros(1, 4, 8, 8)}, r"do not fit Conv2d.forward \(.*\); pass"),
    ],
)
def test_example_inputs_that_are_no_arguments_of_a_call(wrong: Any, words: str):
    with pytest.raises(ConfigError, match=words):
        sparsify(nn.Conv2d(4, 4, 1).eval(), example_inputs=wrong)


class NoImage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.linear(tokens)


def test_a_module_without_spatial_input():
    module, tokens = NoImage().eval(), torch.zeros(2, 3, 4)
    remedy = r"no spatial input.*arguments: \['tokens'\].*SparsifyConfig\(spatial_inputs"
    with pytest.raises(CaptureError, match=remedy):
        sparsify(module, example_inputs={"tokens": tokens})
    # Unknown modules are compiled at their first call.
    compiled = sparsify(module)
    with pytest.raises(CaptureError, match=remedy), compiled.record():
        compiled(tokens)
    assert torch.equal(compiled(tokens), module(tokens))
    with pytest.raises(CaptureError, match=r"must be \[batch, channels, height, width\], got \[2, 3, 4\]"):
        sparsify(module, SparsifyConfig(spatial_inputs=("tokens",)), example_inputs={"tokens": tokens})
    with pytest.raises(CaptureError, match=r"'image' is no tensor argument of this call; it has \['tokens'\]"):
        sparsify(module, SparsifyConfig(spatial_inputs=("image",)), example_inputs={"tokens": tokens})


WRONG_OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "norm": ({"norm": "batch"}, r"norm='batch' is unknown; choose one of \('recorded', 'incremental'\)"),
    "attention": ({"attention": "none"}, r"attention='none' is unknown; choose one of \('cached', 'active'\)"),
    "backend": ({"backend": "tpu"}, "backend='tpu' is unknown; choose one of"),
    "dilation": ({"dilation": -1}, "dilation=-1 must be a whole number of sites, 0 or more"),
    "dilation bool": ({"dilation": True}, "dilation=True must be a whole number"),
    "dilation float": ({"dilation": 1.5}, "dilation=1.5 must be a whole number"),
    "dense_above": ({"dense_above": 1.5}, "dense_above=1.5 must be a share of the sites from 0.0 to 1.0"),
    "dense_above nan": ({"dense_above": float("nan")}, "dense_above=nan must be a share of the sites"),
    "dense_above text": ({"dense_above": "half"}, "dense_above='half' must be .*None for the measured break-even"),
    "dense_above bool": ({"dense_above": True}, "dense_above=True must be a share of the sites"),
    "block_size": ({"block_size": 3}, r"block_size=3 must be one of \(1, 2, 4, 8\) sites, or None"),
    "block_size bool": ({"block_size": True}, "block_size=True must be one of"),
    "multiple": ({"multiple": 0}, "multiple=0 must be 1 or more"),
}


@pytest.mark.parametrize("name", sorted(WRONG_OPTIONS))
def test_wrong_options(name: str):
    options, remedy = WRONG_OPTIONS[name]
    with pytest.raises(ConfigError, match=remedy):
        SparsifyConfig(**options)


def test_unknown_passes():
    for name, remedy in (("conv", "'conv', which is no pass; the passes are"), ("outputs", "cannot be disabled")):
        with pytest.raises(ConfigError, match=remedy):
            sparsify(model_and_compiled()[1].original, SparsifyConfig(disabled_passes=frozenset({name})))
