"""Right, refused or failed: what a generated module is judged by, through the compiler's public doors alone."""

from __future__ import annotations

import traceback
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fisedit_compiler import Recording, SparseModule, SparsifyConfig, sparsify
from fisedit_compiler.errors import FiseditError
from tests.fuzz.axes import COARSEST
from tests.fuzz.programs import GeneratedProgram, build, inputs

BATCH, HEIGHT, WIDTH = 2, 8, 12
TOLERANCE = 1e-3
"""A value in the wrong place is off by tenths; statistics in float32 and long sums by 1e-5."""
Inputs = dict[str, Any]
Outcome = Literal["right", "refused", "failed"]


@dataclass(frozen=True)
class Verdict:
    """What became of one module; ``reason`` is the refusal or the first promise that broke."""

    outcome: Outcome
    reason: str = ""


def judge(program: GeneratedProgram) -> Verdict:
    """Compile, record and edit a generated module.

    It must be right (the recording is the module's output bit for bit; an edit of nothing is the base; outside the mask
    stands the recording bit for bit; a full mask with incremental statistics is the dense run; two edits at once are
    what each is alone) or be refused with a ``FiseditError``.
    """
    module = build(program)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            problem = _problem(module, program)
    except FiseditError as error:
        return Verdict("refused", f"{type(error).__name__}: {str(error).splitlines()[0]}")
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return Verdict(
            "failed", f"{type(error).__name__}: {error} ({where.filename.rsplit('/', 1)[-1]}:{where.lineno})"
        )
    return Verdict("failed", problem) if problem else Verdict("right")


def _problem(module: nn.Module, program: GeneratedProgram) -> str:
    base, other = (inputs(program, BATCH, HEIGHT, WIDTH, seed) for seed in (0, 1))
    if not torch.isfinite(module(**base)).all():
        return ""
    return problem_of(module, base, other, _mask(program), COARSEST)


def problem_of(module: nn.Module, base: Inputs, other: Inputs, mask: Tensor, multiple: int | None = None) -> str:
    """The first promise that an edit of ``module`` breaks, ``""`` if it keeps all.

    Args:
        module: from maps ``sample`` (and tensors without sites) to one map of the same size.
        base: the call that is recorded.
        other: another call of the same shapes.
        mask: bool ``[H, W]``.
        multiple: what heights and widths are multiples of, if that is known.

    Raises:
        FiseditError: the module is refused.
    """
    dense, dense_other = _output(module(**base)), _output(module(**other))
    config = SparsifyConfig(norm="incremental", cache=False, multiple=multiple, dense_above=1.0)
    compiled = sparsify(module, config, example_inputs=base)
    with compiled.record() as recording:
        recorded = _output(compiled(**base))
    if not torch.equal(recorded, dense):
        return f"the recording differs by {_difference(recorded, dense):.2g}"
    with compiled.edit(recording, mask):
        same = _output(compiled(**base))
    if _difference(same, dense) > TOLERANCE:
        return f"an edit of nothing differs by {_difference(same, dense):.2g}"
    changed = {**other, "sample": torch.where(mask, other["sample"], base["sample"])}
    with compiled.edit(recording, mask):
        edited = _output(compiled(**changed))
    if not torch.equal(edited[..., ~mask], dense[..., ~mask]):
        return "something changed outside the mask"
    with compiled.edit(recording, torch.ones_like(mask)):
        whole = _output(compiled(**other))
    if _difference(whole, dense_other) > TOLERANCE:
        return f"a full mask differs by {_difference(whole, dense_other):.2g} from the dense run"
    return _copies_problem(compiled, recording, mask, (changed, base), (edited, same))


def _copies_problem(
    compiled: SparseModule,
    recording: Recording,
    mask: Tensor,
    calls: tuple[Inputs, Inputs],
    alone: tuple[Tensor, Tensor],
) -> str:
    first, second = calls
    both = {name: _side_by_side(value, second[name]) for name, value in first.items()}
    try:
        with compiled.edit(recording, mask, copies=2):
            together = _output(compiled(**both))
    except FiseditError:
        return ""
    for copy, expected in enumerate(alone):
        if _difference(together[copy::2], expected) > TOLERANCE:
            return f"copy {copy} of two differs by {_difference(together[copy::2], expected):.2g} from the edit alone"
    return ""


def _side_by_side(first: Any, second: Any) -> Any:
    """Each sample of one call followed by the other's; what has no samples as it is."""
    if not isinstance(first, Tensor) or not first.dim():
        return first
    return torch.stack([first, second], 1).flatten(0, 1)


def _output(result: Any) -> Tensor:
    return (
        result if isinstance(result, Tensor) else next(iter(result.values() if hasattr(result, "values") else result))
    )


def _mask(program: GeneratedProgram) -> Tensor:
    """A few sites: often as many as there are channels, so that an axis taken for another goes unseen by shapes."""
    generator = torch.Generator().manual_seed(program.seed)
    count = (
        program.channels if program.seed % 2 else int(torch.randint(1, HEIGHT * WIDTH // 2, (), generator=generator))
    )
    mask = torch.zeros(HEIGHT * WIDTH, dtype=torch.bool)
    mask[torch.randperm(HEIGHT * WIDTH, generator=generator)[:count]] = True
    return mask.view(HEIGHT, WIDTH)


def _difference(actual: Tensor, expected: Tensor) -> float:
    """Largest difference, as a share of the largest value."""
    return float((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-3))
