"""Other projects' ways to a cheaper UNet call, as baselines beside ours: DeepCache and ToMe (tomesd), if installed.

Neither knows masks: they make every call of a run cheaper and change the whole picture. Each is applied, through its
public interface and with the settings its documentation starts with, to a copy of the UNet that runs eagerly: a
:class:`Peer` for single calls, a :class:`RunPeer` for whole runs of a pipeline.
"""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any, TypeVar

import torch

from benchmarks.support.harness import Stopwatch, Timing
from benchmarks.support.subjects import Prompt, Run

DEEPCACHE_INTERVAL = 3
TOME_RATIO = 0.5

P = TypeVar("P", "Peer", "RunPeer")


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


@dataclass(frozen=True)
class RunPeer:
    """A UNet that another project changes for one run of a pipeline, so that no run finds what another one left.

    Attributes:
        name: what rows call it.
        note: its settings, in words.
        unet: a copy, changed between ``enable`` and ``disable``.
        enable: called before a run.
        disable: called after it.
    """

    name: str
    note: str
    unet: Any
    enable: Callable[[], Any]
    disable: Callable[[], Any]


@contextmanager
def in_pipeline(pipe: Any, unet: Any) -> Iterator[None]:
    """For one run: put a dense baseline into a pipeline, a UNet or a peer, which is enabled inside the block only."""
    if not isinstance(unet, RunPeer):
        pipe.unet = unet
        yield
        return
    pipe.unet = unet.unet
    unet.enable()
    try:
        yield
    finally:
        unet.disable()


def deepcache(unet: torch.nn.Module, run: Run) -> Peer:
    """DeepCache (Ma et al., CVPR 2024): deep layers run every third call, their outputs are reused in between.

    Raises:
        ValueError: the run is shorter than one cycle.
    """
    if run.calls < DEEPCACHE_INTERVAL:
        raise ValueError(f"a cycle is {DEEPCACHE_INTERVAL} calls, the run has {run.calls}: give --calls 3 or more")
    schedule = SimpleNamespace(timesteps=torch.stack(list(run.timesteps)).cpu())
    _deepcache_helper(unet, schedule).enable()
    return Peer("deepcache", f"{_DEEPCACHE_NOTE}; mean over a cycle of calls", unet, DEEPCACHE_INTERVAL)


def deepcache_runs(unet: torch.nn.Module, pipe: Any) -> RunPeer:
    """DeepCache in whole runs of a pipeline."""
    helper = _deepcache_helper(unet, _ScheduleOnHost(pipe))
    return RunPeer("deepcache", _DEEPCACHE_NOTE, unet, helper.enable, helper.disable)


_DEEPCACHE_NOTE = f"eager, cache_interval={DEEPCACHE_INTERVAL}, cache_branch_id=0"


def _deepcache_helper(unet: torch.nn.Module, schedule: Any) -> Any:
    """It asks a pipeline for its UNet, and for the schedule to see which call this is.

    ``schedule.timesteps`` is on the CPU, so that looking a timestep up does not make the GPU wait once for each entry.
    """
    helper = import_module("DeepCache").DeepCacheSDHelper(pipe=SimpleNamespace(unet=unet, scheduler=schedule))
    helper.set_params(cache_interval=DEEPCACHE_INTERVAL, cache_branch_id=0)
    return helper


class _ScheduleOnHost:
    """The timesteps of a pipeline's scheduler, on the CPU; copied once a run."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self._copied: Any = None
        self._copy: Any = None

    @property
    def timesteps(self) -> torch.Tensor:
        timesteps = self._pipe.scheduler.timesteps
        if timesteps is not self._copied:
            self._copied, self._copy = timesteps, timesteps.cpu()
        return self._copy  # type: ignore[no-any-return]


def tome(unet: torch.nn.Module, run: Run) -> Peer:
    """ToMe for Stable Diffusion (Bolya and Hoffman, 2023): half the tokens are merged before self-attention."""
    patched = import_module("tomesd").apply_patch(unet, ratio=TOME_RATIO)
    return Peer("tomesd", _TOME_NOTE, patched)


def tome_runs(unet: torch.nn.Module, pipe: Any) -> RunPeer:
    """ToMe in whole runs of a pipeline."""
    tomesd = import_module("tomesd")
    enable, disable = partial(tomesd.apply_patch, unet, ratio=TOME_RATIO), partial(tomesd.remove_patch, unet)
    return RunPeer("tomesd", _TOME_NOTE, unet, enable, disable)


_TOME_NOTE = f"eager, ratio={TOME_RATIO}"
PEERS: dict[str, Callable[[torch.nn.Module, Run], Peer]] = {"DeepCache": deepcache, "tomesd": tome}
"""By the name of the module to import."""
RUN_PEERS: dict[str, Callable[[torch.nn.Module, Any], RunPeer]] = {"DeepCache": deepcache_runs, "tomesd": tome_runs}
"""Likewise for whole runs, made for a pipeline."""


def prepare_peers(unet: torch.nn.Module, run: Run) -> list[Peer]:
    """The peers that are installed and work on ``unet``, warm; it says in a line why another is left out."""

    def tried(peer: Peer) -> None:
        peer.time(run, run.samples, run.prompt, Stopwatch(run.samples[0].device))

    return _working(PEERS, unet, run, tried)


def prepare_run_peers(unet: torch.nn.Module, pipe: Any, run: Callable[[], Any]) -> list[RunPeer]:
    """Likewise those for whole runs.

    Args:
        unet: of which each gets a copy.
        pipe: the pipeline of the runs.
        run: makes one run of it.
    """

    def tried(peer: RunPeer) -> None:
        with in_pipeline(pipe, peer):
            run()

    return _working(RUN_PEERS, unet, pipe, tried)


def _working(
    makers: Mapping[str, Callable[[torch.nn.Module, Any], P]],
    unet: torch.nn.Module,
    subject: Any,
    tried: Callable[[P], None],
) -> list[P]:
    found: list[P] = []
    for module, make in makers.items():
        if find_spec(module) is None:
            print(f"{module} is not installed, so it is no baseline (pip install {module})", flush=True)
            continue
        try:
            peer = make(copy.deepcopy(unet), subject)
            tried(peer)
        except Exception:
            # Another project's error must not cost our own rows.
            traceback.print_exc()
            print(f"{module} does not work with this model or these versions, so it is no baseline", flush=True)
            continue
        found.append(peer)
    return found
