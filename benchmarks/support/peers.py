"""Other projects' ways to a cheaper UNet call, as baselines beside ours: DeepCache and ToMe (tomesd), if installed.

Neither knows masks: they make every call of a run cheaper and change the whole picture. Each is applied, through its
public interface and with the settings its documentation starts with, to a copy of the UNet that runs eagerly.
"""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.support.harness import Stopwatch, Timing
from benchmarks.support.subjects import Prompt, Run

DEEPCACHE_INTERVAL = 3
TOME_RATIO = 0.5


@dataclass(frozen=True)
class Peer:
    """A UNet changed by another project.

    Attributes:
        name: what rows call it.
        note: its settings, in words.
        unet: the changed copy.
        cycle: calls after which its work repeats; a time is the mean of one cycle.
    """

    name: str
    note: str
    unet: Any
    cycle: int = 1

    def time(self, run: Run, samples: list[torch.Tensor], prompt: Prompt, stopwatch: Stopwatch) -> None:
        """Make the calls of one cycle; their sum is filed under the peer's name."""
        stopwatch.time(self.name, partial(self._cycle, run, samples, prompt))

    def timing(self, stopwatch: Stopwatch) -> Timing:
        """The times of one call."""
        return Timing(tuple(sample / self.cycle for sample in stopwatch[self.name].samples_ms))

    def _cycle(self, run: Run, samples: list[torch.Tensor], prompt: Prompt) -> None:
        for call in range(self.cycle):
            run.dense(self.unet, call, samples, prompt)


def deepcache(unet: torch.nn.Module, run: Run) -> Peer:
    """DeepCache (Ma et al., CVPR 2024): deep layers run every third call, their outputs are reused in between.

    Raises:
        ValueError: the run is shorter than one cycle.
    """
    if run.calls < DEEPCACHE_INTERVAL:
        raise ValueError(f"a cycle is {DEEPCACHE_INTERVAL} calls, the run has {run.calls}: give --calls 3 or more")
    helper_class = import_module("DeepCache").DeepCacheSDHelper
    # It asks a pipeline for its UNet, and for the schedule to see which call this is; on the CPU, so that looking
    # a timestep up does not make the GPU wait once more for each entry.
    schedule = SimpleNamespace(timesteps=torch.stack(list(run.timesteps)).cpu())
    helper = helper_class(pipe=SimpleNamespace(unet=unet, scheduler=schedule))
    helper.set_params(cache_interval=DEEPCACHE_INTERVAL, cache_branch_id=0)
    helper.enable()
    note = f"eager, cache_interval={DEEPCACHE_INTERVAL}, cache_branch_id=0; mean over a cycle of calls"
    return Peer("deepcache", note, unet, DEEPCACHE_INTERVAL)


def tome(unet: torch.nn.Module, run: Run) -> Peer:
    """ToMe for Stable Diffusion (Bolya and Hoffman, 2023): half the tokens are merged before self-attention."""
    patched = import_module("tomesd").apply_patch(unet, ratio=TOME_RATIO)
    return Peer("tomesd", f"eager, ratio={TOME_RATIO}", patched)


PEERS: dict[str, Callable[[torch.nn.Module, Run], Peer]] = {"DeepCache": deepcache, "tomesd": tome}
"""By the name of the module to import."""


def prepare_peers(unet: torch.nn.Module, run: Run) -> list[Peer]:
    """The peers that are installed and work on ``unet``, warm; it says in a line why another is left out."""
    found = []
    for module, make in PEERS.items():
        if find_spec(module) is None:
            print(f"{module} is not installed, so it is no baseline (pip install {module})", flush=True)
            continue
        try:
            peer = make(copy.deepcopy(unet), run)
            peer.time(run, run.samples, run.prompt, Stopwatch(run.samples[0].device))
        except Exception:
            # Another project's error must not cost our own rows.
            traceback.print_exc()
            print(f"{module} does not work with this model or these versions, so it is no baseline", flush=True)
            continue
        found.append(peer)
    return found
