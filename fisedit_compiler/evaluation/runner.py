"""Runs the pairs of a file through the methods, one after the other, and keeps a record of each.

A run may be interrupted anywhere and started again: pairs that have a record are skipped. A pair that fails is recorded
with its error and the rest runs. Several processes may share the pairs (``shard``).
"""

from __future__ import annotations

import json
import logging
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fisedit_compiler import __version__
from fisedit_compiler.errors import ConfigError, FiseditError
from fisedit_compiler.evaluation.measures.features import Extractor, load_extractor
from fisedit_compiler.evaluation.measures.judge import Judge
from fisedit_compiler.evaluation.measures.measure import Reference
from fisedit_compiler.evaluation.methods.bench import Bench, Case, NotApplicable
from fisedit_compiler.evaluation.methods.registry import Method, choose_methods
from fisedit_compiler.evaluation.pairs.grammar import make_pairs
from fisedit_compiler.evaluation.pairs.objects import ground_truth
from fisedit_compiler.evaluation.pairs.pairs import EditPair, PairFile, check_prompts, read_pairs
from fisedit_compiler.evaluation.results.environment import machine, versions
from fisedit_compiler.evaluation.results.store import Store, StoreError
from fisedit_compiler.pipelines.drawing.pictures import mask_overlay
from fisedit_compiler.pipelines.editor import EDITOR_CONFIG

logger = logging.getLogger(__name__)

SHEET_PAIRS = 24
"""Pairs whose pictures are on the contact sheet."""
SHEET_SIZE = 144
"""Edge in pixels of the pictures that are kept for it alone."""


@dataclass(frozen=True)
class Evaluation:
    """What to run and where its results go.

    Attributes:
        pairs: jsonl file.
        output: folder of the results.
        model: directory of the pipeline; ``None`` for the embedded one.
        clip: directory of the CLIP that judges; ``None`` for the embedded one.
        features: feature extractor of FID, see :func:`~fisedit_compiler.evaluation.measures.features.load_extractor`;
            ``None`` for the CLIP's image tower.
        methods: names, see :func:`~fisedit_compiler.evaluation.methods.registry.choose_methods`; none for those
            of ``suite``.
        suite: ``"methods"``, ``"approximations"`` or ``"reuse"``.
        steps: of the scheduler.
        guidance: weight of classifier-free guidance.
        seed: of pairs without one: this plus the number of their line.
        device: where everything runs.
        dtype: ``"float32"``, ``"float16"`` or ``"bfloat16"``, of the pipeline.
        backend: of sparse calls, see :class:`~fisedit_compiler.SparsifyConfig`.
        shard: ``(i, n)``: run every n-th pair from the i-th on, counted from 1.
        limit: run only so many pairs of the file.
        images: keep the pictures of all pairs, not only of those on the contact sheet.
    """

    pairs: Path
    output: Path
    model: Path | None = None
    clip: Path | None = None
    features: Path | None = None
    methods: tuple[str, ...] = ()
    suite: str = "methods"
    steps: int = 25
    guidance: float = 5.0
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"
    backend: str = "auto"
    shard: tuple[int, int] = (1, 1)
    limit: int | None = None
    images: bool = True

    def configuration(self, methods: Sequence[Method], file: PairFile) -> dict[str, Any]:
        """What results depend on: a folder holds results of one configuration."""
        return {
            "model": str(self.model or "emoji-scenes"),
            "clip": str(self.clip or "emoji-clip"),
            "features": str(self.features or "CLIP image tower"),
            "methods": [method.name for method in methods],
            "steps": self.steps,
            "guidance": self.guidance,
            "seed": self.seed,
            "pairs": file.path.name,
            "pairs sha256": file.digest,
            "device": torch.device(self.device).type,
            "dtype": self.dtype,
            "backend": self.backend,
            "norm": EDITOR_CONFIG.norm,
            "version": __version__,
        }

    def command(self) -> str:
        """The command line that repeats the run, without what is the default."""
        words = ["fisedit", "eval", self.pairs.name, "--output", self.output.name]
        paths = (("--model", self.model), ("--clip", self.clip), ("--features", self.features))
        words += [word for name, path in paths if path is not None for word in (name, str(path))]
        words += [word for name in self.methods for word in ("--methods", name)]
        defaults = Evaluation(self.pairs, self.output)
        for name in ("suite", "steps", "guidance", "seed", "device", "dtype", "backend", "limit"):
            if getattr(self, name) != getattr(defaults, name):
                words += [f"--{name}", str(getattr(self, name))]
        return shlex.join(words)


@dataclass(frozen=True)
class Progress:
    """Called with what is going on; the command line shows bars with it."""

    total: Callable[[int, int], None] = lambda pairs, methods: None
    pair: Callable[[EditPair], None] = lambda pair: None
    method: Callable[[str], None] = lambda name: None
    finished: Callable[[EditPair, str], None] = lambda pair, error: None


def evaluate(evaluation: Evaluation, progress: Progress | None = None) -> PairFile:
    """Run what is not there yet, and keep it in the output folder.

    Returns:
        The file of pairs as it was used, with what was rejected.

    Raises:
        FiseditError: the file holds no usable pair, the model cannot be loaded, or the folder holds results of another
            configuration.
    """
    progress = progress or Progress()
    file = read_pairs(evaluation.pairs)
    methods = choose_methods(evaluation.methods, evaluation.suite)
    _check_usable(file)
    store = Store(evaluation.output)
    configuration = evaluation.configuration(methods, file)
    store.prepare(configuration)
    runner = Runner.load(evaluation, store, methods)
    # Not before the models are there: a misspelt one must not stay in the folder as its configuration.
    store.open(configuration)
    file = check_prompts(runner.bench.pipe, file)
    _check_usable(file)
    pairs = file.pairs[: evaluation.limit]
    sheet = {pair.line for pair in sheet_pairs(pairs)}
    store.write_text("run.json", _run_facts(evaluation, file, len(pairs)))
    number, shards = evaluation.shard
    mine = [pair for pair in pairs[number - 1 :: shards] if not store.is_done(pair.line)]
    progress.total(len(mine), len(methods))
    for pair in mine:
        progress.pair(pair)
        error = runner.run(pair, progress.method, on_sheet=pair.line in sheet)
        progress.finished(pair, error)
    return file


class Runner:
    """Everything a pair needs, loaded once.

    Args:
        evaluation: its settings.
        store: where records go.
        methods: to run, the references first.
        bench: the pipeline.
        judge: the CLIP.
        extractor: of FID's features; ``None`` takes the judge's.
    """

    def __init__(
        self,
        evaluation: Evaluation,
        store: Store,
        methods: Sequence[Method],
        bench: Bench,
        judge: Judge,
        extractor: Extractor | None = None,
    ) -> None:
        self.evaluation, self.store, self.methods = evaluation, store, methods
        self.bench, self.judge, self.extractor = bench, judge, extractor

    @classmethod
    def load(cls, evaluation: Evaluation, store: Store, methods: Sequence[Method]) -> Runner:
        """Load pipeline, CLIP and extractor.

        Raises:
            ModelNotFoundError: one of them is not there.
            ConfigError: ``dtype`` or ``backend`` is unknown.
        """
        from fisedit_compiler.models import load_clip, load_pipeline

        dtypes = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
        if evaluation.dtype not in dtypes:
            raise ConfigError(f"unknown dtype {evaluation.dtype!r}; choose one of {', '.join(dtypes)}")
        config = replace(EDITOR_CONFIG, backend=evaluation.backend)  # type: ignore[arg-type]
        device = evaluation.device
        judge = Judge(load_clip(device, model=evaluation.clip))
        extractor = None if evaluation.features is None else load_extractor(evaluation.features, device)
        pipe = load_pipeline(evaluation.model, dtype=dtypes[evaluation.dtype], device=device)
        return cls(evaluation, store, methods, Bench(pipe, config), judge, extractor)

    def run(self, pair: EditPair, tell: Callable[[str], None], *, on_sheet: bool) -> str:
        """Run one pair and keep its record; returns the error's text, empty if there was none.

        Raises:
            StoreError: the folder cannot be written to; that is no fault of the pair, and ends the run.
        """
        seed = self.evaluation.seed + pair.line if pair.seed is None else pair.seed
        record: dict[str, Any] = {"line": pair.line, "pair": pair.to_dict(), "seed": seed}
        started = time.perf_counter()
        try:
            tell("base")
            reference = Reference.of(self._case(pair, seed), self.judge)
            figures, features = self._run_methods(reference, tell, on_sheet=on_sheet)
        except StoreError:
            raise
        except Exception as error:
            logger.debug("pair in line %d failed", pair.line, exc_info=True)
            text = f"{type(error).__name__}: {error}"
            self.store.write(record | {"status": "failed", "error": text}, {})
            return text
        truth, sparse = reference.case.truth, reference.case.sparse
        record |= {
            "status": "done",
            "truth": None if truth is None else {"source": truth.source, "area": truth.area},
            "everywhere": reference.case.everywhere,
            "threshold": sparse.report.threshold,
            "methods": figures,
            "seconds": time.perf_counter() - started,
        }
        self.store.write(record, features)
        return ""

    def _case(self, pair: EditPair, seed: int) -> Case:
        options = self.evaluation
        with self.bench.editor() as editor:
            base = editor.generate(
                pair.input, seed=seed, num_inference_steps=options.steps, guidance_scale=options.guidance
            )
            sparse = editor.edit(base, pair.output, record=False)
        dense = self.bench.run(pair.output, base.settings)
        return Case(pair, base, dense, sparse, ground_truth(pair, base.image, dense.image))

    def _run_methods(
        self, reference: Reference, tell: Callable[[str], None], *, on_sheet: bool
    ) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        case = reference.case
        figures: dict[str, Any] = {}
        features = {"base": self._features(case.base.image, reference.look.features)}
        keep = self.evaluation.images or on_sheet
        if keep:
            self._keep(case, "base", case.base.image)
            self._keep(case, "mask", mask_overlay(case.base.image, case.sparse.mask))
        for method in self.methods:
            tell(method.name)
            try:
                outcome = method.run(self.bench, case)
            except NotApplicable as reason:
                figures[method.name] = {"skipped": str(reason)}
                continue
            figures[method.name], look = reference.measure(outcome)
            features[method.name] = self._features(outcome.image, look.features)
            if keep:
                self._keep(case, method.name, outcome.image)
        return figures, features

    def _features(self, image: Any, own: torch.Tensor) -> torch.Tensor:
        return own if self.extractor is None else self.extractor(image)

    def _keep(self, case: Case, name: str, image: Any) -> None:
        self.store.write_image(case.pair.line, name, image, None if self.evaluation.images else SHEET_SIZE)


def sheet_pairs(pairs: Sequence[EditPair], count: int = SHEET_PAIRS) -> list[EditPair]:
    """Pairs for the contact sheet: of every kind in turn, in the order of the file."""
    by_kind: dict[str | None, list[EditPair]] = {}
    for pair in pairs:
        by_kind.setdefault(pair.kind, []).append(pair)
    chosen: list[EditPair] = []
    while len(chosen) < min(count, len(pairs)):
        for waiting in by_kind.values():
            if waiting and len(chosen) < count:
                chosen.append(waiting.pop(0))
    return sorted(chosen, key=lambda pair: pair.line)


def _check_usable(file: PairFile) -> None:
    if not file.pairs:
        problems = "\n".join(file.problems()[:10]) or "the file is empty"
        raise FiseditError(f"there is no pair to run in {str(file.path)!r}:\n{problems}")


def _pairs_command(file: PairFile) -> str | None:
    """The command that made the pairs, if they are those it makes."""
    found = [replace(pair, line=0) for pair in file.pairs]
    if file.rejected or found != make_pairs(len(found)):
        return None
    return shlex.join(["fisedit", "eval", "--make-pairs", str(len(found)), file.path.name])


def _run_facts(evaluation: Evaluation, file: PairFile, wanted: int) -> str:
    return json.dumps(
        {
            "pairs_command": _pairs_command(file),
            "command": evaluation.command(),
            "shards": evaluation.shard[1],
            "machine": machine(evaluation.device),
            "versions": versions(),
            "pairs": wanted,
            "rejected": file.problems(),
        },
        indent=1,
    )
