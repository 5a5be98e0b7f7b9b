"""How far a module scales its maps down, read off one run on tensors without contents.

Height and width must be multiples of this for every size in the captured graph to be whole. Exporting a module for one
divisor after another until one fits costs as much as so many captures; a run on fake tensors costs a second at Stable
Diffusion's size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fisedit_compiler.capture.keys.snapshot import Snapshot

GRANULE = 192
"""Sizes of the run are multiples of it, so that maps may shrink by any power of two up to 64, or three times one."""

ROUNDED = 2
"""Sites by which a smaller map may miss an exact share, as a convolution without padding makes it."""


def own_downsampling(module: nn.Module, arguments_of: Callable[[int, int, int], dict[str, Any]]) -> int:
    """The total downsampling of a module: the smallest divisor of height and width that divides every map's size.

    Args:
        module: run once, on fake tensors; what its forward writes to itself is undone.
        arguments_of: makes named arguments for a height and width of ``first * k`` and ``second * k``, where ``k`` is
            its first argument and ``first`` and ``second`` are its others.

    Returns:
        What was seen until it ended, where the run fails: the capture says then what is wrong.
    """
    first, second = 29, 31  # no numbers of channels, heads or words are multiples of them: sizes tell which axis it is
    sizes = _SizesSeen()
    before = Snapshot(module)
    try:
        # Control flow of torch would compile itself here, and be found compiled when it is to be captured.
        with (
            torch.no_grad(),
            torch.compiler.set_stance("force_eager"),
            FakeTensorMode(allow_non_fake_inputs=True),
        ):
            arguments = arguments_of(GRANULE, first, second)  # fake, too: no memory is taken
            with sizes:
                module(**arguments)
    except Exception:
        pass  # what was seen until then counts
    finally:
        before.restore()
    found = 1
    for shape in sizes.shapes:
        found = math.lcm(found, *_divisors(shape, GRANULE * first, GRANULE * second))
    return found if GRANULE % found == 0 else 1


def _divisors(shape: tuple[int, ...], height: int, width: int) -> Iterator[int]:
    """What height and width were divided by, for neighbouring axes that hold a smaller map of both."""
    for index, rows in enumerate(shape):
        if not 0 < rows < height:
            continue
        divisor = round(height / rows)
        if GRANULE % divisor or abs(rows - height / divisor) > ROUNDED:
            continue
        if any(abs(columns - width / divisor) <= ROUNDED for columns in shape[index + 1 : index + 3]):
            yield divisor
    tokens = height * width
    for size in shape:
        root = math.isqrt(tokens // size) if 0 < size < tokens else 1
        if root > 1 and root * root * size == tokens and GRANULE % root == 0:
            yield root


class _SizesSeen(TorchDispatchMode):
    """Notes the shapes of all results."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.shapes.add(tuple(leaf.shape))
        return result
