"""Whatever leaves the graph is pinned to the recording outside the mask, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fisedit_compiler.errors import ConfigError, LayoutError
from tests.support.compiled_zoo import edited, make_mask, output_of, record_run
from tests.support.pass_tools import Forward, TextForward, compile_small, counts, example, program_of


def conv() -> nn.Module:
    return nn.Conv2d(8, 8, 3, padding=1)


def test_the_output_of_an_island_is_pinned() -> None:
    compiled = compile_small(Forward(lambda m, x: torch.cumsum(m.conv(x), 3), conv=conv()))
    program = program_of(compiled)
    assert counts(program.step)["fisedit.scatter_sites"] == 2, "one behind the convolution, one at the end"
    (output,) = program.outputs
    assert output.slot is not None
    inputs, mask = example(compiled.original), make_mask("block", (12, 20))
    base = record_run(compiled, inputs)
    changed = {"sample": torch.where(mask, inputs["sample"] + 1, inputs["sample"])}
    result, _ = edited(compiled, base, changed, mask)
    assert torch.equal(result[..., ~mask], base.output[..., ~mask])
    assert not torch.equal(result[..., mask], base.output[..., mask])


def test_an_input_handed_through_is_an_output() -> None:
    compiled = compile_small(Forward(lambda m, x: (m.conv(x), x), conv=conv()))
    inputs, mask = example(compiled.original), make_mask("block", (12, 20))
    with compiled.record() as recording:
        _, base = compiled(**inputs)
    assert torch.equal(base, inputs["sample"])
    changed = torch.where(mask, inputs["sample"] + 1, inputs["sample"])
    with compiled.edit(recording, mask):
        _, result = compiled(changed)
    assert torch.equal(result, changed)


def test_several_outputs_keep_their_structure() -> None:
    def forward(module: Any, x: Tensor, text: Tensor) -> dict[str, Any]:
        fine = module.conv(x)
        return {"fine": fine, "more": [fine.mean(1), text.mean()], "shape": fine.flatten(2).transpose(1, 2)}

    compiled = compile_small(TextForward(forward, conv=conv()))
    inputs, mask = example(compiled.original), make_mask("block", (12, 20))
    with compiled.record() as recording:
        base = compiled(**inputs)
    expected = compiled.original(**inputs)
    assert base.keys() == expected.keys() and isinstance(base["more"], list)
    changed = {**inputs, "text": inputs["text"] + 1}
    with compiled.edit(recording, mask):
        result = compiled(**changed)
    torch.testing.assert_close(result["fine"], base["fine"], rtol=1e-5, atol=1e-5)  # no text in the picture
    assert torch.equal(result["fine"][..., ~mask], base["fine"][..., ~mask])
    torch.testing.assert_close(result["more"][1], changed["text"].mean())
    assert result["shape"].shape == expected["shape"].shape
    # An output without sites is not recorded, so an empty mask cannot be answered from the recording alone.
    with compiled.edit(recording, make_mask("empty", (12, 20))) as session:
        nothing = compiled(**changed)
    torch.testing.assert_close(nothing["more"][1], changed["text"].mean())
    assert torch.equal(nothing["fine"], base["fine"]) and session.timings[0][0] == "sparse"


def test_an_output_that_mixes_sites_is_refused() -> None:
    def forward(module: Any, x: Tensor) -> Tensor:
        tokens = module.conv(x).flatten(2)
        return tokens.transpose(1, 2) @ tokens

    with pytest.raises(LayoutError, match=r"attention matrix.*Sparsify the submodule"):
        compile_small(Forward(forward, conv=conv()))


def test_an_output_without_sites_only_is_allowed_and_computed() -> None:
    compiled = compile_small(Forward(lambda m, x: m.conv(x).mean((2, 3)), conv=conv()), norm="incremental")
    inputs, mask = example(compiled.original), make_mask("full", (12, 20))
    base = record_run(compiled, inputs)
    changed = example(compiled.original, seed=1)
    result, _ = edited(compiled, base, changed, mask)
    torch.testing.assert_close(result, output_of(compiled.original(**changed)), rtol=1e-4, atol=1e-5)


def test_the_pass_cannot_be_disabled() -> None:
    with pytest.raises(ConfigError, match="outputs"):
        compile_small(Forward(lambda m, x: m.conv(x), conv=conv()), disabled_passes={"outputs"})


def test_an_unknown_pass_cannot_be_disabled() -> None:
    with pytest.raises(ConfigError, match=r"'convolutoin', which is no pass; the passes are .*convolution"):
        compile_small(Forward(lambda m, x: m.conv(x), conv=conv()), disabled_passes={"convolutoin"})
