"""Capture: one graph for every size and batch, sharing the module's parameters, or an error that helps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fisedit_compiler import SparsifyConfig, sparsify
from fisedit_compiler.capture import export as capture_module
from fisedit_compiler.capture.arguments import bind, sign
from fisedit_compiler.capture.captured import CapturedGraph
from fisedit_compiler.capture.export import capture
from fisedit_compiler.capture.known_models import known_model
from fisedit_compiler.errors import CaptureError
from fisedit_compiler.graph.sizes import BATCH, HEIGHT, WIDTH
from fisedit_compiler.graph.specs import spec_of
from fisedit_compiler.kernels.tolerances import max_error
from fisedit_compiler.runtime.execution.executable import Executable
from tests.support.compiled_zoo import (
    base_inputs,
    compiled_model,
    edit_inputs,
    edited,
    make_mask,
    output_of,
    record_run,
    zoo_model,
)
from tests.support.zoo import UNETS, ZOO


class Small(nn.Module):
    """One convolution, and whatever a subclass does with it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, sample: Tensor) -> Any:
        return self.conv(sample)


def captured(module: nn.Module, inputs: dict[str, Any] | None = None, multiple: int | None = 1) -> CapturedGraph:
    inputs = inputs or {"sample": torch.zeros(2, 4, 8, 12)}
    signature, _ = sign(inputs, None)
    return capture(module.eval(), inputs, signature, multiple)


def compiled(module: nn.Module, **options: Any) -> Any:
    config = SparsifyConfig(cache=False, **options)
    return sparsify(module.eval(), config, example_inputs={"sample": torch.zeros(2, 4, 8, 12)})


def test_sizes_are_symbols() -> None:
    graph = captured(Small(), multiple=2)
    assert spec_of(graph.spatial).shape == (BATCH, sympy.Integer(4), 2 * HEIGHT, 2 * WIDTH)
    conv = next(node for node in graph.graph.nodes if node.target is torch.ops.aten.conv2d.default)
    assert spec_of(conv).shape == (BATCH, sympy.Integer(4), 2 * HEIGHT, 2 * WIDTH)
    assert conv.meta["path"] == "conv"
    assert "self.conv(sample)" in conv.meta["source"]


@pytest.mark.parametrize("name", ZOO)
def test_one_program_serves_every_size_and_batch(name: str) -> None:
    module = compiled_model(name)
    before = len(module.programs)
    for batch, size in ((1, (4, 8)), (2, (8, 24)), (3, (20, 12))):
        inputs = base_inputs(name, batch, size)
        base = record_run(module, inputs)
        mask = make_mask("block", size)
        edited(module, base, edit_inputs(name, batch, size, mask), mask)
    assert len(module.programs) == before


def test_a_large_batch_after_a_small_one() -> None:
    module = compiled_model("sd15")
    inputs = base_inputs("sd15", 9, (4, 8))
    with torch.no_grad():
        expected = module.original(**inputs)[0]
    assert torch.equal(record_run(module, inputs).output, expected)


@torch.enable_grad()
def _with_gradients(hidden: Tensor) -> Tensor:
    return hidden * 2


def _in_full_precision(hidden: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return hidden * 2


@pytest.mark.parametrize(
    "transformed",
    [
        lambda hidden: torch.vmap(lambda sample: sample * 2 + sample.mean(0, keepdim=True))(hidden),
        lambda hidden: torch.func.jvp(torch.sin, (hidden,), (hidden,))[1],
        _with_gradients,
        _in_full_precision,
    ],
    ids=["vmap", "jvp", "enable_grad", "autocast off"],
)
def test_regions_in_which_operations_mean_something_else_are_taken_apart(
    transformed: Callable[[Tensor], Tensor],
) -> None:
    class Transformed(Small):
        def forward(self, sample: Tensor) -> Tensor:
            return transformed(self.conv(sample))

    module, sample = Transformed().eval(), torch.randn(2, 4, 8, 12)
    sparse = compiled(module)
    with torch.no_grad():
        expected, edited = module(sample), module(sample + 1)
    with sparse.record() as recording:
        assert torch.equal(sparse(sample), expected)
    with sparse.edit(recording, make_mask("full", (8, 12))):
        torch.testing.assert_close(sparse(sample + 1), edited, rtol=1e-4, atol=1e-5)


def test_writes_in_place_are_functionalized() -> None:
    class InPlace(Small):
        def forward(self, sample: Tensor) -> Tensor:
            hidden = self.conv(sample)
            hidden += 1
            F.relu_(hidden)
            hidden[:, :1] = hidden[:, 1:2] * 2
            return hidden

    module = InPlace().eval()
    graph = captured(module)
    assert not [
        n for n in graph.graph.nodes if isinstance(n.target, torch._ops.OpOverload) and n.target._schema.is_mutable
    ]
    sparse = compiled(module)
    sample = torch.randn(2, 4, 8, 12)
    with torch.no_grad():
        expected = module(sample)
    with sparse.record() as recording:
        assert torch.equal(sparse(sample), expected)
    with sparse.edit(recording, make_mask("full", (8, 12))):
        torch.testing.assert_close(sparse(sample + 1), module(sample + 1).detach(), rtol=1e-4, atol=1e-5)


def test_a_module_without_a_spatial_input() -> None:
    class Words(nn.Module):
        def forward(self, text: Tensor) -> Tensor:
            return text * 2

    with pytest.raises(CaptureError, match=r"no spatial input.*\['text'\].*spatial_inputs="):
        sparsify(Words().eval(), example_inputs={"text": torch.zeros(2, 7, 8)})


def test_a_spatial_input_that_is_not_there() -> None:
    with pytest.raises(CaptureError, match=r"'latents' is no tensor argument of this call; it has \['sample'\]"):
        compiled(Small(), spatial_inputs=("latents",))


def test_a_spatial_input_of_another_rank() -> None:
    class Words(nn.Module):
        def forward(self, text: Tensor) -> Tensor:
            return text * 2

    with pytest.raises(CaptureError, match=r"text must be \[batch, channels, height, width\]"):
        sparsify(
            Words().eval(), SparsifyConfig(spatial_inputs=("text",)), example_inputs={"text": torch.zeros(2, 7, 8)}
        )


def test_a_module_in_training_mode() -> None:
    with pytest.raises(CaptureError, match=r"training mode; call \.eval\(\)"):
        sparsify(Small().train())


def test_control_flow_on_data_names_the_module_and_the_remedy() -> None:
    class Branching(Small):
        def forward(self, sample: Tensor) -> Tensor:
            return self.conv(sample) if sample.mean() > 0 else sample

    with pytest.raises(CaptureError, match=r"(?s)could not capture Branching.*Remedy: .*sparsify the submodule"):
        compiled(Branching())


def test_positional_inputs_need_names() -> None:
    class Anything(Small):
        def forward(self, *maps: Tensor) -> Tensor:  # type: ignore[override]
            return self.conv(maps[0])

    with pytest.raises(CaptureError, match="by keyword"):
        bind(Anything(), (torch.zeros(1, 4, 8, 8),), {}, {})


def test_the_multiple_is_found_by_trying() -> None:
    class Strided(Small):
        def forward(self, sample: Tensor) -> Tensor:
            return F.interpolate(self.conv(sample)[:, :, ::2, ::2], scale_factor=2.0)

    class Down(Small):
        def __init__(self) -> None:
            super().__init__()
            self.down = nn.Conv2d(4, 4, 3, stride=2, padding=1)

        def forward(self, sample: Tensor) -> Tensor:
            return self.conv(F.interpolate(self.down(self.down(sample)), scale_factor=4.0))

    assert captured(Small(), multiple=None).multiple == 1
    assert captured(Strided(), multiple=None).multiple == 2
    assert captured(Down(), multiple=None).multiple == 4
    assert captured(zoo_model("plain_conv").module, base_inputs("plain_conv", 2, (8, 24)), None).multiple == 2


class Shrinks(Small):
    """A map of ``1 / by`` of height and width, made large again."""

    def __init__(self, by: int) -> None:
        super().__init__()
        self.by = by

    def forward(self, sample: Tensor) -> Tensor:
        return self.conv(F.interpolate(F.avg_pool2d(sample, self.by), scale_factor=float(self.by)))


def test_a_multiple_that_no_try_finds() -> None:
    with pytest.raises(CaptureError, match=r"SparsifyConfig\(multiple=k\)"):
        captured(Shrinks(5), multiple=None)
    sparse = sparsify(
        Shrinks(5).eval(),
        SparsifyConfig(cache=False, multiple=5),
        example_inputs={"sample": torch.zeros(1, 4, 10, 15)},
    )
    with sparse.record() as recording:
        sparse(torch.zeros(1, 4, 20, 15))
    assert recording.height == 20


class Windows(Small):
    """Attention would run in windows of 8 by 8 sites."""

    def forward(self, sample: Tensor) -> Tensor:
        batch, channels, height, width = sample.shape
        windows = sample.view(batch, channels, height // 8, 8, width // 8, 8)
        return self.conv((windows - windows.mean((3, 5), keepdim=True)).reshape(sample.shape))


class Unpadded(Small):
    """A convolution without padding, whose map is one site short of half."""

    def forward(self, sample: Tensor) -> Tensor:
        small = F.max_pool2d(self.conv(sample), 3, stride=2)
        return F.interpolate(F.pad(small, (0, 1, 0, 1)), scale_factor=2.0)


class SecondLook(Small):
    """Sizes fit; the code is none that a graph can hold."""

    def forward(self, sample: Tensor) -> Tensor:
        small = F.avg_pool2d(self.conv(sample), 4)
        if small.mean() > 0:
            small = small * 2
        return F.interpolate(small, scale_factor=4.0)


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The divisors that are exported for."""
    divisors: list[int] = []
    export = capture_module._export

    def watched(*args: Any) -> Any:
        divisors.append(args[-1])
        return export(*args)

    monkeypatch.setattr(capture_module, "_export", watched)
    return divisors


@pytest.mark.parametrize(
    ("module", "divisor"),
    [(Shrinks(3), 3), (Shrinks(6), 6), (Windows(), 8), (Unpadded(), 2)],
    ids=["thirds", "sixths", "windows", "unpadded"],
)
def test_the_first_divisor_that_is_tried_is_the_modules_own(tried: list[int], module: nn.Module, divisor: int) -> None:
    assert captured(module, multiple=None).multiple == divisor
    assert tried == [divisor]


def test_an_error_that_no_divisor_mends_is_told_at_once(tried: list[int]) -> None:
    with pytest.raises(CaptureError, match=r"(?s)divisor 4\).*data-dependent"):
        captured(SecondLook(), multiple=None)
    assert set(tried) == {4}


def test_the_search_is_over_after_a_time(tried: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture_module, "SEARCH_SECONDS", 0)
    with pytest.raises(CaptureError, match=r"divisor 1\)"):
        captured(Shrinks(5), multiple=None)
    assert set(tried) == {1}


def test_what_is_scaled_down_by_three_is_right() -> None:
    module = Shrinks(3).eval().requires_grad_(False)
    sparse = sparsify(module, SparsifyConfig(cache=False))
    base, other = (torch.randn(1, 4, 12, 18, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    mask = torch.zeros(12, 18, dtype=torch.bool)
    mask[4:7, 7:9] = True
    with torch.no_grad(), sparse.record() as recording:
        assert torch.equal(sparse(base), module(base))
    with torch.no_grad(), sparse.edit(recording, torch.ones_like(mask)):
        torch.testing.assert_close(sparse(other), module(other))
    mixed = torch.where(mask, other, base)
    with torch.no_grad(), sparse.edit(recording, mask):
        edited = sparse(mixed)
    assert torch.equal(edited[..., ~mask], module(base)[..., ~mask])
    torch.testing.assert_close(edited[..., mask], module(mixed)[..., mask])


def test_long_text_needs_no_second_program() -> None:
    """Another number of tokens (long prompts) runs on the same program."""
    module, size = compiled_model("sd21"), (8, 24)
    before = len(module.programs)
    mask = make_mask("block", size)
    base = record_run(module, base_inputs("sd21", 2, size))
    longer = dict(base.inputs, encoder_hidden_states=torch.randn(2, 19, 24))
    with module.edit(base.recording, mask):
        result = module(**longer)[0]
    assert not torch.equal(result, base.output)
    again = record_run(module, longer)
    with torch.no_grad():
        assert torch.equal(again.output, module.original(**longer)[0])
    assert len(module.programs) == before


def test_a_long_negative_text() -> None:
    """Text whose batch does not follow the latents' is no business of the mask: it is computed as given."""
    module, size = compiled_model("sd15"), (8, 24)
    inputs = base_inputs("sd15", 1, size)
    base = record_run(module, inputs)
    with module.edit(base.recording, make_mask("site", size)):
        again = output_of(module(**inputs))
    assert max_error(again, base.output) < 1e-5


@pytest.mark.parametrize("name", ["sd15", "plain_conv"])
def test_parameters_are_shared(name: str) -> None:
    module = compiled_model(name)
    size = (8, 24)
    edited(module, record_run(module, base_inputs(name, 2, size)), base_inputs(name, 2, size), make_mask("site", size))
    owned = {tensor.data_ptr() for tensor in (*module.original.parameters(), *module.original.buffers())}
    (executable,) = list(module._programs._executables.values())[:1]
    assert isinstance(executable, Executable)
    bound = [value for key, value in executable._attributes.items() if key not in executable.program.constants]
    assert bound and all(tensor.data_ptr() in owned for tensor in bound)
    for graph in (executable._graph("step"), executable._graph("recording")):
        held = [*graph.parameters(), *graph.buffers()]
        constants = {tensor.data_ptr() for tensor in executable.program.constants.values()}
        assert {tensor.data_ptr() for tensor in held} <= owned | constants


@pytest.mark.parametrize("name", UNETS)
def test_the_original_is_left_alone(name: str) -> None:
    """Same parameters, same forward, no hooks, no state left by capture."""
    original = zoo_model(name).module
    compiled_model(name)
    assert "forward" not in vars(original)
    assert not original._forward_hooks and not original._forward_pre_hooks
    assert not original.training and not any(parameter.requires_grad for parameter in original.parameters())
    assert known_model(original) is not None


@pytest.mark.parametrize("name", ["input", "torch", "lambda_", "x_1"])
def test_an_input_may_have_any_name(name: str) -> None:
    """torch.fx renames what would hide a builtin."""
    scope: dict[str, Any] = {}
    exec(f"def forward(self, {name}): return self.conv({name})", scope)
    module = type("Named", (nn.Module,), {"forward": scope["forward"]})()
    module.conv = nn.Conv2d(4, 4, 3, padding=1)
    compiled = sparsify(module.eval(), SparsifyConfig(cache=False), example_inputs={name: torch.zeros(1, 4, 8, 8)})
    base, mask = torch.randn(1, 4, 8, 8), torch.zeros(8, 8, dtype=torch.bool)
    mask[2:5, 3:6] = True
    with compiled.record() as recording:
        before = compiled(**{name: base})
    with compiled.edit(recording, mask):
        after = compiled(**{name: torch.where(mask, base + 1, base)})
    assert torch.equal(after[..., ~mask], before[..., ~mask]) and not torch.equal(after, before)
