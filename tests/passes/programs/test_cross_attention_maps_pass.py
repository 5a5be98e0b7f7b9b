"""Dense graphs that record cross-attention maps, and dense graphs that take columns of them from a recording."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fisedit_compiler.errors import RecordingError, VerificationError
from fisedit_compiler.graph.sizes import TEXT
from fisedit_compiler.kernels.tolerances import assert_close
from fisedit_compiler.lowering.lowered import LOWERABLE
from fisedit_compiler.passes.programs.maps import MAP, WITH_MAP, verify_maps
from fisedit_compiler.runtime.samples.recorded_samples import are_independent
from tests.passes.rewrites.test_attention_pass import SDPA, cross_attention, heads, layers, self_attention
from tests.support.compiled_zoo import compiled_model
from tests.support.pass_tools import TEXT_TOKENS, Forward, TextForward, compile_small, counts, example, program_of


def map_names(compiled: Any) -> list[str]:
    return [slot.name for slot in program_of(compiled).maps.slots]


def test_the_attention_stays_and_its_map_is_stored_beside_it() -> None:
    compiled = compile_small(cross_attention())
    program = program_of(compiled)
    maps = program.maps
    before, after = counts(program.recording), counts(maps.recording)
    assert after - before == {"fisedit.attention_map": 1} and not before - after
    assert [slot.kind.name for slot in maps.slots] == ["map"] and map_names(compiled) == ["map"]
    assert maps.tokens == TEXT_TOKENS and not maps.refusals


def test_reuse_replaces_the_attention_and_nothing_else() -> None:
    program = program_of(compile_small(cross_attention()))
    before, after = counts(program.captured.graph), counts(program.maps.reuse)
    assert after - before == {"fisedit.attention_with_map": 1} and before - after == {SDPA: 1}
    after = counts(program.maps.reuse_recording)
    assert after["fisedit.attention_with_map"] == after["fisedit.attention_map"] == 1 and after[SDPA] == 0


@pytest.mark.parametrize("scale", [None, 0.3])
def test_results(scale: float | None) -> None:
    """Against the module's own arithmetic, written out with the base's map."""
    compiled = compile_small(cross_attention(lambda text: {"scale": scale}))
    module, inputs, changed = compiled.original, example(compiled.original), example(compiled.original, seed=1)
    with compiled.record(maps=1) as recording, torch.no_grad():
        output = compiled(**inputs)
        assert torch.equal(output, module(**inputs)), "bit for bit, with maps too"
    columns = torch.tensor([3, -1, 0, -1, 4])

    def map_of(sample: Tensor, text: Tensor) -> Tensor:
        query = heads(module.q(module.conv(sample).flatten(2).transpose(1, 2)))
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        return (query @ heads(module.k(text)).transpose(-1, -2) * factor).softmax(-1)

    with torch.no_grad():
        base, mixed = map_of(**inputs), map_of(**changed)
        mixed[..., columns >= 0] = base[..., columns[columns >= 0]]
        attended = (mixed @ heads(module.v(changed["text"]))).transpose(1, 2).flatten(2)
        expected = changed["sample"] + module.out(attended).transpose(1, 2).reshape(output.shape)
    assert_close(recording.slot(0, "map"), base, torch.float32)
    for record in (False, True):
        with compiled.edit(recording, record=record) as session:
            session.reuse_maps(columns)
            assert_close(compiled(**changed), expected, torch.float32)
    assert session.result is not None
    # An edit keeps the maps that it used.
    assert_close(session.result.slot(0, "map"), mixed, torch.float32)


def masked(text: Tensor) -> dict[str, Any]:
    return {"attn_mask": (text.mean(-1) > -1.0)[:, None, None, :]}


def grouped(module: Any, x: Tensor, text: Tensor) -> Tensor:
    shared = module.k(text)[..., :4].unsqueeze(1)
    query = heads(module.q(module.conv(x).flatten(2).transpose(1, 2)))
    mixed = F.scaled_dot_product_attention(query, shared, shared, enable_gqa=True)
    return x + module.out(mixed.transpose(1, 2).flatten(2)).transpose(1, 2).reshape(x.shape)


def with_another_text(module: Any, x: Tensor, text: Tensor) -> Tensor:
    """Two attentions to the text, and one to a summary of it in two tokens, as image prompts have."""
    query = heads(module.q(module.conv(x).flatten(2).transpose(1, 2)))
    for context in (text, text[:, :2], text):
        key, value = heads(module.k(context)), heads(module.v(context))
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        x = x + module.out(mixed).transpose(1, 2).reshape(x.shape)
    return x


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: cross_attention(masked), "an attention mask is given"),
        (lambda: TextForward(grouped, **layers()), "heads or samples share keys"),
    ],
    ids=["mask", "grouped heads"],
)
def test_what_keeps_its_own_map_says_why(build: Callable[[], nn.Module], reason: str) -> None:
    compiled = compile_small(build())
    maps = program_of(compiled).maps
    assert not maps.slots and reason in maps.refusals[0][2]
    assert counts(maps.reuse) == counts(program_of(compiled).captured.graph)
    with (
        pytest.raises(RecordingError, match=rf"record\(maps=1\): the module has no .* \(its attention: {reason}"),
        compiled.record(maps=1),
    ):
        compiled(**example(compiled.original))


def test_self_attention_is_no_cross_attention() -> None:
    maps = program_of(compile_small(self_attention())).maps
    assert not maps.slots and not maps.refusals


def test_attention_to_something_of_another_length_keeps_its_own_map() -> None:
    compiled = compile_small(TextForward(with_another_text, **layers()))
    maps = program_of(compiled).maps
    assert len(maps.slots) == 2 and len(set(map_names(compiled))) == 2
    ((_, _, reason),) = maps.refusals
    assert reason == f"it has 2 keys, not one for each of the text's {TEXT_TOKENS} tokens"


def test_slots_are_named_after_the_attention() -> None:
    for name in ("sd15", "sdxl"):
        program, *_ = compiled_model(name).programs
        paths = [path for path, _ in compiled_model(name).original.named_modules() if path.endswith("attn2")]
        assert program.maps.tokens == TEXT
        assert sorted(slot.name for slot in program.maps.slots) == sorted(f"{path}.map" for path in paths)
        assert not {slot.name for slot in program.maps.slots} & {slot.name for slot in program.slots}
        del program.__dict__["maps"], program.reports[-3:]


def test_they_are_made_on_first_use_and_then_among_the_stages() -> None:
    compiled = compile_small(cross_attention())
    program = program_of(compiled)
    assert not program.has_maps and "reuse" not in compiled.stages().names
    with compiled.record():
        compiled(**example(compiled.original))
    assert not program.has_maps
    with compiled.record(maps=1):
        compiled(**example(compiled.original))
    names = ["recording_maps", "reuse", "reuse_recording"]
    assert program.has_maps and compiled.stages().names[-3:] == names
    on_a_gpu = {f"{graph}_{stage}" for graph in LOWERABLE for stage in ("staged", "cut", "repeated")}
    assert [report.name for report in program.reports] == [n for n in compiled.stages().names if n not in on_a_gpu]
    assert "attention_with_map" in str(compiled.stages()["reuse"])


@pytest.mark.parametrize("mistake", ["another slot", "not stored", "not read"])
def test_the_verifier_notices(mistake: str) -> None:
    maps = program_of(compile_small(TextForward(with_another_text, **layers()))).maps
    nodes = {graph: [n for n in graph.nodes if n.target in (MAP, WITH_MAP)] for graph in (maps.recording, maps.reuse)}
    verify_maps(maps)
    if mistake == "another slot":
        first, second = nodes[maps.reuse]
        first.args = (*first.args[:3], second.args[3], *first.args[4:])
    elif mistake == "not stored":
        output = next(node for node in maps.recording.nodes if node.op == "output")
        output.args = ((*output.args[0][:-2], output.args[0][-1], output.args[0][-2]),)
    else:
        nodes[maps.reuse][0].target = torch.ops.aten.scaled_dot_product_attention.default
    with pytest.raises(VerificationError, match="slot map"):
        verify_maps(maps)


def test_which_models_compute_samples_apart() -> None:
    for name in ("sd15", "sdxl"):
        program, *_ = compiled_model(name).programs
        assert are_independent(program.captured.graph, program.signature), name


@pytest.mark.parametrize(
    "mix",
    [
        lambda x: x - x.mean(0, keepdim=True),
        lambda x: x[:1],
        lambda x: x.roll(1, 0),
        lambda x: x.flip(0),
        lambda x: x.cumsum(0),
        lambda x: torch.softmax(x, 0),
        lambda x: x * torch.arange(x.shape[0])[:, None, None, None],
        lambda x: x.transpose(0, 1).flatten(1, 2).unflatten(1, (-1, x.shape[2])).transpose(0, 1) * x.sum(),
    ],
    ids=["mean", "first sample", "roll", "flip", "running sum", "softmax", "counted", "merged axes"],
)
def test_which_mix_them(mix: Callable[[Tensor], Tensor]) -> None:
    compiled = compile_small(Forward(lambda m, x: m.conv(x) + mix(x), conv=nn.Conv2d(8, 8, 3, padding=1)))
    program = program_of(compiled)
    assert not are_independent(program.captured.graph, program.signature)
