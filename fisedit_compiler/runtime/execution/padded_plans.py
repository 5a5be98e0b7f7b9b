"""The site plans of a program's masks, and plans padded to buckets of row counts, so that few CUDA graphs serve all."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from torch import Tensor

from fisedit_compiler.config import SparsifyConfig
from fisedit_compiler.geometry.block_sizes import BlockSizes
from fisedit_compiler.geometry.conv_tables import ConvKey
from fisedit_compiler.geometry.site_plan import SitePlan
from fisedit_compiler.graph.inputs import Input, IotaInput, Sources, TableInput
from fisedit_compiler.lowering.program import CompiledProgram

KEPT = 8
"""Plans of a program: tables of a mask that comes again are not built again."""


class SitePlans:
    """Makes the site plans of one program, for any number of runs at once.

    Attributes:
        block_sizes: chooses the sizes of blocks.
    """

    def __init__(self, program: CompiledProgram, config: SparsifyConfig) -> None:
        self._program, self._config = program, config
        self.block_sizes = BlockSizes(program.layers)
        self._lock = threading.Lock()
        self.recent: OrderedDict[tuple[Any, ...], SitePlan] = OrderedDict()

    def of(self, mask: Tensor, dilation: int, sample: Tensor) -> SitePlan:
        """The site plan of a mask (bool ``[H, W]``) for calls with such a sample; recent ones are kept.

        The sample tells where the tables go, and what block sizes are chosen for: its batch, precision and device.
        """
        device, batch = sample.device, sample.shape[0]
        key = (mask.shape, mask.cpu().numpy().tobytes(), dilation, str(device), batch, sample.dtype)
        plan = self.recent.get(key)
        if plan is None:
            built = SitePlan.build(mask, self._program.levels, self._program.convs, dilation=dilation)
            plan = self.divided(built, batch, sample.element_size(), device.type).to(device)
        with self._lock:
            plan = self.recent.setdefault(key, plan)  # another run's, if it was faster
            self.recent.move_to_end(key)
            while len(self.recent) > KEPT:
                self.recent.popitem(last=False)
        return plan

    def divided(self, plan: SitePlan, batch: int, element_size: int, device_type: str) -> SitePlan:
        """A plan in blocks of the configured size, or of the sizes with the smallest estimates."""
        size = self._config.block_size
        if size is None:
            return plan.blocked(self.block_sizes.choose(plan, batch, element_size, device_type))
        return plan.blocked(dict.fromkeys(self.block_sizes.levels, size))


def bucket(count: int, least: int = 16) -> int:
    """The padded size of ``count`` rows: a multiple of ``least``, at most an eighth above it from ``8 * least`` on."""
    step = least
    while step * 16 <= count:
        step *= 2
    return -(-max(count, 1) // step) * step


def block_bucket(count: int, size: int) -> int:
    """The padded number of blocks of ``size`` by ``size`` sites, in steps of 16 sites or a block.

    It is 2 at least: a compiled step takes a dimension of 1 for a constant.
    """
    return max(bucket(count, max(16 // (size * size), 1)), 2)


@dataclass(frozen=True)
class PaddedPlan:
    """A padded plan on the device, the tables a graph needs of it, and the number of its bucket.

    ``counts`` are the numbers of active sites before padding, per level.
    """

    bucket: int
    plan: SitePlan
    tables: dict[Input, Tensor]
    counts: Mapping[Fraction, int]


class PaddedPlans:
    """The padded plans of one step, the most recent few. Their owner lets one thread at a time in."""

    def __init__(self, inputs: Sequence[Input], kept: int = 8) -> None:
        """``inputs`` are those of the step."""
        self.inputs, self.kept = inputs, kept
        self._buckets: dict[tuple[Any, ...], int] = {}
        self._padded: OrderedDict[int, tuple[SitePlan, PaddedPlan]] = OrderedDict()

    def of(self, plan: SitePlan) -> PaddedPlan:
        """A plan padded to its bucket."""
        if id(plan) not in self._padded:
            self._padded[id(plan)] = (plan, self._pad(plan))
            while len(self._padded) > self.kept:
                self._padded.popitem(last=False)
        return self._padded[id(plan)][1]

    def _pad(self, plan: SitePlan) -> PaddedPlan:
        rows: dict[Fraction, int] = {level: bucket(table.shape[0]) for level, table in plan.active.items()}
        rings: dict[ConvKey, int] = {key: bucket(table.shape[0]) for key, table in plan.ring.items()}
        blocks = {level: block_bucket(count, plan.block_size(level)) for level, count in plan.blocks.items()}
        padded = plan.padded(rows, rings, blocks)
        of_plan = [item for item in self.inputs if isinstance(item, TableInput | IotaInput)]
        tables: dict[Input, Tensor] = {item: item.of(Sources(plan=padded)).contiguous() for item in of_plan}
        sizes = sorted((level, plan.block_size(level), count) for level, count in blocks.items())
        key = (*sorted(rows.items()), *sorted(rings.items(), key=str), *sizes)
        number = self._buckets.setdefault(key, len(self._buckets))
        counts = {level: table.shape[0] for level, table in plan.active.items()}
        return PaddedPlan(number, padded, tables, counts)
