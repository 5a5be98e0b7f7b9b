"""``compiled.bisect(mask)``: the rewrite pass with which a check begins to fail.

The captured graph is compiled with growing prefixes of the ordered passes, the others left out, so that their
operations run densely; between the last prefix that passes a check and the first that fails lies the pass at fault. A
fault that no prefix or every prefix shows is in no pass, and the report says where to look instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fisedit_compiler.errors import ConfigError, FiseditError
from fisedit_compiler.inspect.check import CheckReport, check_subject
from fisedit_compiler.inspect.subject import Subject
from fisedit_compiler.lowering.program import compile_captured
from fisedit_compiler.passes.order import REQUIRED, ordered
from fisedit_compiler.runtime.execution.executable import Executable

if TYPE_CHECKING:
    from fisedit_compiler.inspect.judge import Difference


@dataclass(frozen=True)
class Trial:
    """One compilation with the first ``enabled`` passes.

    Attributes:
        enabled: number of passes that ran, besides those that always run.
        last: name of the last of them, empty for none.
        report: what a check of it found; ``None`` if it could not be compiled.
        problem: why it could not be compiled or checked.
    """

    enabled: int
    last: str
    report: CheckReport | None
    problem: str = ""

    @property
    def ok(self) -> bool:
        return self.report is not None and self.report.ok


@dataclass(frozen=True)
class BisectReport:
    """What a bisection found; true if nothing is at fault.

    Attributes:
        pass_name: the pass at fault; ``None`` if nothing is, or if no pass is.
        check: the check of the module's own program, or of the first prefix that fails.
        trials: the prefixes that were tried, in that order.
        conclusion: the finding in a sentence.
    """

    pass_name: str | None
    check: CheckReport | None
    trials: tuple[Trial, ...]
    conclusion: str

    @property
    def ok(self) -> bool:
        """Whether the module's own program passes its check."""
        return self.check is not None and self.check.ok

    @property
    def first(self) -> Difference | None:
        """The first node that differs."""
        return self.check.first if self.check is not None else None

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        lines = [self.conclusion]
        if self.first is not None:
            lines.append(f"first difference: {self.first}")
        for trial in self.trials:
            last = f" (up to {trial.last})" if trial.last else ""
            outcome = "equal" if trial.ok else (trial.problem or "differs")
            lines.append(f"  {trial.enabled} passes{last}: {outcome}")
        return "\n".join(lines)


def bisect_subject(subject: Subject) -> BisectReport:
    """Find the pass at fault; see :meth:`SparseModule.bisect`."""
    if subject.options.lowered:
        raise ConfigError(
            "bisect() looks for a pass, which compiled code has no part in; use check(mask, lowered=True)."
        )
    own = check_subject(subject, subject.executable.hoisted.fork())
    if own.ok:
        return BisectReport(None, own, (), f"nothing to find: {own}")
    config = subject.executable.program.config
    names = [p.name for p in ordered(config.extra_passes, config.disabled_passes) if p.name not in REQUIRED]
    trials: list[Trial] = []

    def attempt(enabled: int) -> Trial:
        trials.append(_trial(subject, names, enabled))
        return trials[-1]

    if attempt(len(names)).ok:
        sentence = (
            "no pass is at fault: compiled anew, the program is right. What the module keeps is stale: hoisted values "
            "or a recording made with other weights or inputs, or a program made by other passes than today's"
        )
        return BisectReport(None, own, tuple(trials), sentence)
    none = attempt(0)
    if not none.ok:
        return _without_passes(none, trials)
    failing = _first_failing(attempt, trials, len(names))
    name = names[failing.enabled - 1]
    return BisectReport(name, failing.report, tuple(trials), f"pass {name!r} is at fault: {_ending(failing)}")


def _first_failing(attempt: Callable[[int], Trial], trials: list[Trial], count: int) -> Trial:
    """The shortest prefix that fails, by halving: none passes, all fail."""
    passing, failing = 0, trials[0]
    assert failing.enabled == count
    while failing.enabled - passing > 1:
        trial = attempt((passing + failing.enabled) // 2)
        if trial.ok:
            passing = trial.enabled
        else:
            failing = trial
    return failing


def _without_passes(trial: Trial, trials: list[Trial]) -> BisectReport:
    """The check fails though every pass is left out that can be."""
    first = trial.report.first if trial.report is not None else None
    (always,) = REQUIRED
    if first is not None and first.what.startswith("output"):
        sentence = f"pass {always!r}, which always runs, is at fault, or the lowering of what it writes"
        return BisectReport(always, trial.report, tuple(trials), sentence)
    sentence = (
        "the check fails even with every pass left out: the fault is in what all programs share (recording, lowering, "
        f"hoisting, site plan). {_ending(trial)}"
    )
    return BisectReport(None, trial.report, tuple(trials), sentence)


def _ending(trial: Trial) -> str:
    before = "without it the program is right, with it" if trial.enabled else "there"
    return f"{before} {trial.problem or 'the check fails'}"


def _trial(subject: Subject, names: list[str], enabled: int) -> Trial:
    program, last = subject.executable.program, names[enabled - 1] if enabled else ""
    config = replace(program.config, disabled_passes=program.config.disabled_passes | frozenset(names[enabled:]))
    try:
        compiled = compile_captured(program.captured, config)
        executable = Executable(
            compiled, subject.executable.module, replace(subject.executable.config, backend="eager")
        )
        report = check_subject(subject.of(executable), executable.hoisted)
    except FiseditError as error:
        return Trial(enabled, last, None, f"{type(error).__name__}: {error}")
    return Trial(enabled, last, report)
