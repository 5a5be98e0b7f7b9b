"""Whatever is done to a module in whatever order: no recording changes, no edit is of another model, no mode is left.

A machine of hypothesis records, edits, interrupts, changes weights and scales, and after every step reads every slot of
every recording.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import zlib
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import Tensor, nn
from torch.nn import functional as F

from fisedit_compiler import Recording, SparsifyConfig, sparsify
from fisedit_compiler.errors import FiseditError, RecordingError

CALLS, SIZE = 3, 6
SCALES = (1.0, 0.5)
KEPT = 5


class Net(nn.Module):
    """A norm, convolutions, self-attention, cross-attention, and a factor that an adapter's scale would be."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(2, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.to_k = nn.Linear(4, 8)
        self.conv_out = nn.Conv2d(8, 2, 3, padding=1)
        self._scales = {"a": 1.0}

    def forward(self, sample: Tensor, encoder_hidden_states: Tensor, timestep: Tensor) -> Tensor:
        hidden = F.silu(self.norm(self.conv_in(sample))) * (1 + timestep / 1000)
        rows = hidden.flatten(2).transpose(1, 2)[:, None]
        rows = rows + F.scaled_dot_product_attention(rows, rows, rows)
        keys = self.to_k(encoder_hidden_states)[:, None]
        rows = rows + F.scaled_dot_product_attention(rows, keys, keys) * self._scales["a"]
        return self.conv_out(rows[:, 0].transpose(1, 2).unflatten(2, hidden.shape[2:]))


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@cache
def weights() -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return {name: value.clone() for name, value in Net().state_dict().items()}


def mask_of(number: int) -> Tensor:
    mask = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    if number == 3:
        return ~mask
    if number:
        mask[number : number + 3, 1 : 2 + 2 * number] = True
    return mask


@dataclass(repr=False)
class Kept:
    """A recording, what it is of, and what every slot held when it was made."""

    recording: Recording
    state: tuple[int, int]
    latents: list[Tensor]
    checksums: list[dict[str, int]]

    def __repr__(self) -> str:
        return f"Kept({self.recording}, {self.state})"


def checksums(recording: Recording) -> list[dict[str, int]]:
    return [
        {name: zlib.crc32(call.slots[name].contiguous().numpy().tobytes()) for name in call.slots} for call in recording
    ]


class AnyOrder(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        net = Net().eval().requires_grad_(False)
        net.load_state_dict(weights())
        config = SparsifyConfig(multiple=1, norm="incremental", dense_above=1.0, skip_recorded=False)
        self.net, self.module = net, sparsify(net, config)
        self.weights = self.scale = 0
        self.kept: list[Kept] = []
        self.incomplete: Recording | None = None
        self.edited: dict[Any, Tensor] = {}

    # -- runs ------------------------------------------------------------------------------------

    def run(self, module: Any, seed: int, text: int, copies: int = 1, stop: int = CALLS) -> list[Tensor]:
        """A run with steps that are element-wise, as a scheduler's; its latents before every call and at the end."""
        sample, latents = noise(seed, 1, 2, SIZE, SIZE).repeat(copies, 1, 1, 1), []
        words = torch.cat([noise(100 + text + copy, 1, 3, 4) for copy in range(copies)])
        for call in range(stop):
            latents.append(sample)
            sample = sample - 0.1 * module(sample, words, torch.tensor(900.0 - 100 * call))
        return [*latents, sample]

    @property
    def state(self) -> tuple[int, int]:
        return self.weights, self.scale

    def keep(self, recording: Recording, latents: list[Tensor]) -> None:
        assert recording.complete and recording.num_calls == CALLS
        self.kept.append(Kept(recording, self.state, latents, checksums(recording)))
        del self.kept[:-KEPT]

    @rule(seed=st.integers(0, 2), text=st.integers(0, 2))
    def record(self, seed: int, text: int) -> None:
        with self.module.record() as recording:
            latents = self.run(self.module, seed, text)
        for ours, own in zip(latents, self.run(self.net, seed, text), strict=True):
            assert torch.equal(ours, own)
        self.keep(recording, latents)

    @precondition(lambda self: self.kept)
    @rule(
        data=st.data(),
        mask=st.integers(0, 3),
        text=st.integers(0, 2),
        record=st.booleans(),
        copies=st.sampled_from([1, 1, 2]),
        late=st.integers(0, 1),
        again=st.booleans(),
    )
    def edit(self, data: Any, mask: int, text: int, record: bool, copies: int, late: int, again: bool) -> None:
        base = data.draw(st.sampled_from(self.kept))
        if base.state != self.state:
            try:
                with self.module.edit(base.recording, mask_of(mask)):
                    raise AssertionError("a recording of another model was taken")
            except RecordingError:
                return
        module, number = self.module, 0
        chosen = mask_of(mask)
        record = record and not late  # a late mask leaves what was returned before it, not what this driver made of it
        with module.edit(base.recording, None if late else chosen, record=record, copies=copies) as session:

            def called(*args: Any) -> Tensor:
                nonlocal number
                if number == late and late:
                    session.set_mask(chosen)
                if again and number == 2:
                    session.set_mask(chosen.clone())
                number += 1
                # Without a mask a call is dense, so what it predicts outside is put back as a pipeline would.
                output = module(*args)
                if session.mask is None:
                    recorded = base.recording.calls[number - 1].slots["conv_out.output"]
                    output = torch.where(chosen, output, recorded.repeat_interleave(copies, 0))
                return output

            start = base.latents[0].repeat_interleave(copies, 0)
            latents, sample = [], start
            words = torch.cat([noise(100 + text + copy, 1, 3, 4) for copy in range(copies)])
            for call in range(CALLS):
                latents.append(sample)
                sample = sample - 0.1 * called(sample, words, torch.tensor(900.0 - 100 * call))
            latents.append(sample)
        for ours, recorded in zip(latents, base.latents, strict=True):
            assert torch.equal(ours[..., ~chosen], recorded.repeat_interleave(copies, 0)[..., ~chosen])
        key = (id(base.recording), base.checksums[0]["conv_out.output"], mask, text, copies, late)
        assert torch.allclose(self.edited.setdefault(key, sample), sample, atol=1e-5)
        self._alive = [*getattr(self, "_alive", []), base.recording]  # an identity is not given again
        for copy, result in enumerate(session.results if record else ()):
            self.keep(result, [value[copy : copy + 1] for value in latents])

    # -- what goes wrong -------------------------------------------------------------------------

    @rule(seed=st.integers(0, 2), stop=st.integers(0, CALLS - 1), how=st.sampled_from(["error", "signal", "exit"]))
    def interrupted_recording(self, seed: int, stop: int, how: str) -> None:
        errors = {"error": ZeroDivisionError, "signal": KeyboardInterrupt, "exit": SystemExit}
        try:
            with self.module.record() as recording:
                self.run(self.module, seed, 0, stop=stop)
                fail(how)
        except errors[how]:
            pass
        assert not recording.complete
        self.incomplete = recording

    @precondition(lambda self: self.kept and self.kept[-1].state == self.state)
    @rule(mask=st.integers(0, 3), stop=st.integers(0, CALLS - 1), how=st.sampled_from(["error", "signal", "exit"]))
    def interrupted_edit(self, mask: int, stop: int, how: str) -> None:
        base = self.kept[-1]
        with contextlib.suppress(ZeroDivisionError, KeyboardInterrupt, SystemExit):
            with self.module.edit(base.recording, mask_of(mask), record=True):
                sample = base.latents[0]
                for call in range(stop):
                    sample = sample - 0.1 * self.module(sample, noise(7, 1, 3, 4), torch.tensor(900.0 - 100 * call))
                fail(how)
            raise AssertionError("nothing was raised")

    @precondition(lambda self: self.kept and self.kept[-1].state == self.state)
    @rule(what=st.sampled_from(["size", "batch", "timestep", "noise", "fewer", "mask", "nested"]))
    def another_run(self, what: str) -> None:
        base = self.kept[-1]
        sample, words, timestep = base.latents[0].clone(), noise(100, 1, 3, 4), torch.tensor(900.0)
        mask: Any = mask_of(1)
        if what == "size":
            sample = sample[..., :-1]
        elif what == "batch":
            sample, words = sample.repeat(2, 1, 1, 1), words.repeat(2, 1, 1)
        elif what == "timestep":
            timestep = timestep + 1
        elif what == "noise":
            sample[..., 0, 0] += 1
        elif what == "mask":
            mask = torch.zeros(SIZE + 1, SIZE, dtype=torch.bool)
        try:
            with self.module.edit(base.recording, mask):
                if what == "nested":
                    with self.module.record():
                        pass
                self.module(sample, words, timestep)
        except FiseditError:
            return
        raise AssertionError(f"another {what} was accepted")

    @precondition(lambda self: self.incomplete is not None)
    @rule()
    def an_unfinished_recording(self) -> None:
        try:
            with self.module.edit(self.incomplete, mask_of(1)):  # type: ignore[arg-type]
                pass
        except RecordingError:
            return
        raise AssertionError("an unfinished recording was taken")

    @rule(mode=st.booleans())
    def another_thread(self, mode: bool) -> None:
        found: list[Any] = []
        arguments = (noise(0, 1, 2, SIZE, SIZE), noise(100, 1, 3, 4), torch.tensor(1.0))

        thread = threading.Thread(target=lambda: found.append(self.module(*arguments)))
        if mode:
            with self.module.record() as recording:
                thread.start()
                thread.join()
                self.module(*arguments)
            assert recording.complete and recording.num_calls == 1
        else:
            thread.start()
            thread.join()
        assert torch.equal(found[0], self.net(*arguments))

    # -- the model changes -----------------------------------------------------------------------

    @rule(variant=st.integers(0, 2), path=st.sampled_from(["in place", "data", "numpy", "replaced", "loaded"]))
    def change_weights(self, variant: int, path: str) -> None:
        values = {name: value.clone() for name, value in weights().items()}
        if variant == 1:
            values["to_k.weight"] = -values["to_k.weight"]
        elif variant == 2:
            values["conv_in.weight"] = values["conv_in.weight"].flip(0)
        for name, value in values.items():
            part, own = self.net.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
            parameter = getattr(part, own)
            if path == "in place":
                parameter.copy_(value)
            elif path == "data":
                parameter.data.copy_(value)
            elif path == "numpy":
                parameter.detach().numpy()[...] = value.numpy()
            elif path == "replaced":
                setattr(part, own, nn.Parameter(value, requires_grad=False))
        if path == "loaded":
            self.net.load_state_dict(values)
        self.weights = variant

    @rule(scale=st.integers(0, 1))
    def change_scale(self, scale: int) -> None:
        self.net._scales["a"] = SCALES[scale]
        self.scale = scale

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def drop(self, data: Any) -> None:
        self.kept.pop(data.draw(st.integers(0, len(self.kept) - 1)))

    # -- what always holds -----------------------------------------------------------------------

    @invariant()
    def no_recording_changes(self) -> None:
        for kept in self.kept:
            assert checksums(kept.recording) == kept.checksums

    @invariant()
    def no_mode_is_left(self) -> None:
        assert "in no mode" in repr(self.module)


def fail(how: str) -> None:
    if how == "signal":
        before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell runs behind itself
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            signal.signal(signal.SIGINT, before)
    elif how == "exit":
        raise SystemExit
    raise ZeroDivisionError


AnyOrder.TestCase.settings = settings(
    max_examples=50,
    stateful_step_count=50,
    derandomize=True,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestAnyOrder = AnyOrder.TestCase
