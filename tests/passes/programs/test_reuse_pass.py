"""Where a step is cut: found in any graph, or refused in words; what is left behind the cut."""

from __future__ import annotations

import pytest
import torch.nn.functional as F
from torch import Tensor, nn

from fisedit_compiler.errors import VerificationError
from fisedit_compiler.graph.inputs import HeldInput, SlotInput, graph_inputs
from fisedit_compiler.passes.instruments import Instruments
from fisedit_compiler.passes.programs.reuse import Cut, reuse_graphs
from tests.support.compiled_zoo import compiled_model
from tests.support.pass_tools import Forward, compile_small, counts, program_of
from tests.support.zoo import UNETS

CONV = "fisedit.conv2d_sites"


class Levels(nn.Module):
    """Convolutions at three levels, joined as ``forward`` says."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.down, self.middle = nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.up, self.after = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def below(self, x: Tensor) -> Tensor:
        return F.interpolate(self.middle(self.down(x)), scale_factor=2.0, mode="nearest")


class Joined(Levels):
    """What comes up is computed with at the finest level before it meets the skip connection."""

    def forward(self, sample: Tensor) -> Tensor:
        x = self.enter(sample)
        return self.leave(F.silu(x + self.after(F.silu(self.up(self.below(x))))))


class Twice(Levels):
    """Two values cross, each with its own reader."""

    def forward(self, sample: Tensor) -> Tensor:
        x = self.enter(sample)
        first = x + self.up(self.below(x))
        return self.leave(first + self.after(self.below(first)))


class Alone(Levels):
    """Nothing of the finest level meets what comes up."""

    def forward(self, sample: Tensor) -> Tensor:
        return self.leave(self.up(self.below(self.enter(sample))))


class Global(Levels):
    """The finest level reads one number per channel of what is below."""

    def forward(self, sample: Tensor) -> Tensor:
        x = self.enter(sample)
        return self.leave(x * self.middle(self.down(x)).mean(dim=(2, 3), keepdim=True))


def cut_of(module: nn.Module) -> Cut | str:
    return program_of(compile_small(module, multiple=2)).cut


def test_the_cut_lies_as_late_as_coarser_levels_alone_reach() -> None:
    cut = cut_of(Joined())
    assert isinstance(cut, Cut) and [value.path for value in cut.values] == ["after"] and cut.place == "after"
    program = program_of(compile_small(Joined(), multiple=2))
    assert counts(program.reuse.shallow)[CONV] == 2, "entering and leaving"
    assert counts(program.reuse.full) == counts(program.step)
    assert "middle.input" in cut.deep and "leave.input" not in cut.deep


def test_values_may_cross_at_several_places() -> None:
    """Only what is deep is held: both joins are of the finest level."""
    cut = cut_of(Twice())
    assert isinstance(cut, Cut) and [value.path for value in cut.values] == ["up", "after"]
    program = program_of(compile_small(Twice(), multiple=2))
    held = [item.value for item in graph_inputs(program.reuse.shallow) if isinstance(item, HeldInput)]
    assert held == [value.origin for value in cut.values]
    assert counts(program.reuse.shallow)[CONV] == 2


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Alone(), "is computed from coarser levels alone"),
        (Global(), "which has no sites of that level"),
        (Forward(lambda module, sample: F.silu(sample)), "all of its maps have one size"),
    ],
)
def test_what_offers_no_cut_says_why(module: nn.Module, reason: str) -> None:
    cut = cut_of(module)
    assert isinstance(cut, str) and reason in cut


@pytest.mark.parametrize("name", UNETS)
def test_of_a_unet_the_last_block_and_the_first_are_left(name: str) -> None:
    program = program_of(compiled_model(name))
    assert isinstance(program.cut, Cut)
    paths = {str(node.meta.get("path", "")) for node in program.reuse.shallow.nodes if node.op == "call_function"}
    blocks = {path.split(".")[1] for path in paths if path.startswith("up_blocks.")}
    assert len(blocks) == 1 and any(path.startswith("down_blocks.0") for path in paths)
    assert not any(path.startswith(("mid_block", "down_blocks.1")) for path in paths)
    read = {item.slot for item in graph_inputs(program.reuse.shallow_update) if isinstance(item, SlotInput)}
    assert read and not read & program.cut.deep
    assert program.cut.sources == (f"{program.cut.place}.input",)


def test_a_cut_that_leaves_coarser_levels_behind_it_is_a_defect() -> None:
    program = program_of(compiled_model("sd15"))
    cut = program.cut
    assert isinstance(cut, Cut)
    wrong = Cut(cut.values, cut.sources, cut.deep | {slot.name for slot in program.slots})
    with pytest.raises(VerificationError, match="of coarser levels are read behind the cut"):
        reuse_graphs(program.step, program.update, program.updates, wrong, Instruments())
