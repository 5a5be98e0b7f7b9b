"""Generated modules: a list of steps between two convolutions, drawn with hypothesis, printed, shortened."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.fuzz.axes import home
from tests.fuzz.state import TEXT_CHANNELS, TEXT_TOKENS, Call, State, Step
from tests.fuzz.steps import KINDS, following, possible, start

INPUT_CHANNELS = 4


@dataclass(frozen=True)
class GeneratedProgram:
    """A module as data.

    Attributes:
        channels: between the first and the last convolution.
        steps: in order; every one is possible where it stands.
        seed: of the weights, the inputs and the mask.
    """

    channels: int
    steps: tuple[Step, ...]
    seed: int = 0

    @property
    def reads_text(self) -> bool:
        return any(KINDS[step.name].reads_text for step in self.steps)

    def states(self) -> list[State] | None:
        """The state before every step and the last one, ``None`` if a step is not possible."""
        states = [start(self.channels)]
        for step in self.steps:
            after = following(states[-1], step)
            if after is None:
                return None
            states.append(after)
        return states

    def __str__(self) -> str:
        lines = [f"channels={self.channels} seed={self.seed}: conv_in", *map(str, self.steps), "home, up, conv_out"]
        return "\n  ".join(lines)

    def shorter(self) -> Iterator[GeneratedProgram]:
        """Programs with one run of steps less, the longest runs first."""
        count = len(self.steps)
        for length in sorted({count // 2, 2, 1} - {0}, reverse=True):
            for first in range(count - length + 1):
                shorter = replace(self, steps=self.steps[:first] + self.steps[first + length :])
                if shorter.states() is not None:
                    yield shorter


class Generated(nn.Module):
    """``[B, 4, H, W]`` (and a text ``[B, 5, 6]``) to ``[B, 4, H, W]``, for multiples of 4 as height and width."""

    def __init__(self, program: GeneratedProgram) -> None:
        super().__init__()
        states = program.states()
        assert states is not None
        self.program, self.last = program, states[-1]
        self.conv_in = nn.Conv2d(INPUT_CHANNELS, program.channels, 3, padding=1)
        built = (KINDS[step.name].build(state, step.args) for step, state in zip(program.steps, states))  # noqa: B905
        self.parts = nn.ModuleDict({str(index): part for index, part in enumerate(built) if part is not None})
        self.conv_out = nn.Conv2d(program.channels, INPUT_CHANNELS, 3, padding=1)

    def forward(self, sample: Tensor, encoder_hidden_states: Tensor | None = None) -> Tensor:
        call = Call({"b": sample.shape[0], "h": sample.shape[2], "w": sample.shape[3]}, encoder_hidden_states)
        x = self.conv_in(sample)
        for index, step in enumerate(self.program.steps):
            part = dict(self.parts.items()).get(str(index))
            x = KINDS[step.name].run(x, step.args, part, call)
        axes = self.last.axes
        if self.last.map is None:
            x = KINDS["home"].run(x, (axes,), None, call)
            axes = home(axes)[2]
        for _ in range(axes[2][0].divisor.bit_length() - 1):
            x = KINDS["up"].run(x, ("nearest",), None, call)
        return self.conv_out(torch.tanh(x))  # type: ignore[no-any-return]


def build(program: GeneratedProgram) -> nn.Module:
    """The module with its seeded weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(program.seed)
        module = Generated(program).eval().requires_grad_(False)
        for name, parameter in [*module.named_parameters(), *module.named_buffers()]:
            if "running_mean" in name:
                parameter.normal_(std=0.3)
            elif parameter.dim() == 1 and parameter.is_floating_point():
                parameter.add_(torch.rand_like(parameter) * 0.4)
    return module


def inputs(program: GeneratedProgram, batch: int, height: int, width: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1000 * program.seed + seed)
    made = {"sample": torch.randn(batch, INPUT_CHANNELS, height, width, generator=generator)}
    if program.reads_text:
        made["encoder_hidden_states"] = torch.randn(batch, TEXT_TOKENS, TEXT_CHANNELS, generator=generator)
    return made


FAMILIES = (
    ("reshape", "view", "permute"),
    ("reshape", "view", "permute", "home"),
    ("conv", "conv1d", "norm", "linear", "layer_norm", "attention"),
    ("linear", "layer_norm"),
    ("attention",),
    ("reduce", "select", "softmax", "stack", "glu", "swap_halves", "rotate", "half"),
    ("flip", "roll", "cumsum", "pointwise"),
    ("heads", "text", "condition", "pad", "pool", "third_of_tokens"),
    ("down", "keep"),
    ("up", "join"),
)
"""Kinds of steps that are drawn with equal chances, whatever their numbers of arguments."""


@st.composite
def programs(draw: Callable[[Any], Any], most: int = 8) -> GeneratedProgram:
    """Programs of one to ``most`` steps."""
    random = draw(st.randoms(use_true_random=False))
    channels = random.choice([4, 8])
    state, steps = start(channels), []
    for _ in range(random.choice(range(1, most + 1))):
        options = possible(state)
        families = [[name for name in family if name in options] for family in FAMILIES]
        name = random.choice(random.choice([family for family in families if family]))
        step = random.choice(options[name])
        after = following(state, step)
        assert after is not None
        steps.append(step)
        state = after
    return GeneratedProgram(channels, tuple(steps), random.choice(range(1000)))


def shortest(program: GeneratedProgram, fails: Callable[[GeneratedProgram], bool]) -> GeneratedProgram:
    """The program with as many steps taken out as still fail."""
    while True:
        found = next((shorter for shorter in program.shorter() if fails(shorter)), None)
        if found is None:
            return program
        program = found
