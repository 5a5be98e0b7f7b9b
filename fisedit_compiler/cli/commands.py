"""The command ``fisedit``: arguments in, tables and files out.

A command here parses, calls the library and prints. What only one command needs is imported
inside it, so that the others start fast.
"""

from __future__ import annotations

import io
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from fisedit_compiler import __version__
from fisedit_compiler.errors import FiseditError

if TYPE_CHECKING:
    from fisedit_compiler.pipelines.demo import Comparison

USER_ERROR = 2
"""Exit code of a mistake the user can mend; the message says how."""

LARGEST_SEED = 2**63 - 1
"""Of torch's generators, which take 64 bits."""

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""

app = typer.Typer(
    name="fisedit",
    help="Edit images with diffusion models, computing only the pixels that change.",
    no_args_is_help=True,
    add_completion=False,
)


def main() -> None:
    """Entry point of the console script."""
    app()


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fisedit-compiler {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Edit images with diffusion models, computing only the pixels that change."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Names of files may hold bytes that are no characters, and terminals may know few.
            stream.reconfigure(errors="backslashreplace")


@app.command()
def demo(
    model: Annotated[
        Path | None,
        typer.Option(help="Directory of a Stable Diffusion pipeline (diffusers layout); else the embedded one."),
    ] = None,
    output: Annotated[Path, typer.Option(help="Directory for the pictures.")] = Path("fisedit-demo"),
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Steps of the scheduler.")] = 25,
    guidance: Annotated[float, typer.Option(min=0.0, help="Weight of guidance; 0 for a model that needs none.")] = 5.0,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of the noise.")] = 7,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: torch's own choice.")] = None,
    device: Annotated[str, typer.Option(help="Where to run: cpu, cuda, cuda:1 ...")] = "cpu",
    progress: Annotated[bool, typer.Option(help="Show progress bars.")] = True,
) -> None:
    """Make an image, edit it three ways, and compare every edit with the dense run."""
    console = Console()
    started = time.perf_counter()
    with _clean_errors():
        _check_output(output)
        from fisedit_compiler.models import load_pipeline
        from fisedit_compiler.pipelines import Editor
        from fisedit_compiler.pipelines.demo import run_demo, save_pictures

        _set_threads(threads)
        _check_device(device)
        _check_guidance(guidance)
        with Editor(load_pipeline(model, device=device), progress=progress) as editor:
            comparisons = run_demo(editor, seed=seed, steps=steps, guidance=guidance)
        paths = save_pictures(comparisons, output)
    console.print(_demo_table(comparisons, steps))
    for title, note in _demo_notes(comparisons):
        console.print(f"{title}: {note}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"{len(paths)} pictures in {output}, all of them on {paths[-1]}", markup=False, soft_wrap=True)
    console.print(f"{time.perf_counter() - started:.0f} s in all", highlight=False)


@app.command()
def inspect(
    model: Annotated[
        Path | None,
        typer.Argument(help="Directory of a Stable Diffusion pipeline (diffusers layout); else the embedded one."),
    ] = None,
    mask: Annotated[Path | None, typer.Option(help="Image of the mask; else a square of 6 % of the picture.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write the page here.")] = None,
    svg: Annotated[Path | None, typer.Option(help="Write the drawing of the program here.")] = None,
    profile: Annotated[bool, typer.Option("--profile", help="Also run a call and draw where its time goes.")] = False,
) -> None:
    """Show what the compiler makes of a UNet: the sparse program, the passes, the recording, the mask's levels."""
    with _clean_errors():
        if html is None and svg is None:
            raise FiseditError("nothing to write; name a file with --html or --svg")
        if profile and html is None:
            raise FiseditError("--profile is part of the page; name a file with --html")
        from fisedit_compiler.cli.inspect_model import inspect_model

        for path in inspect_model(model, mask, html=html, svg=svg, profile=profile):
            Console().print(f"wrote {path}", markup=False, soft_wrap=True, highlight=False)


@app.command(name="compile")
def compile_ahead(
    model: Annotated[
        Path | None,
        typer.Argument(help="Directory of a Stable Diffusion pipeline (diffusers layout); else the embedded one."),
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="Of the pictures to come: 768 or 768x512 (height x width); else the model's own.")
    ] = None,
    guidance: Annotated[bool, typer.Option(help="Whether they are made with guidance.")] = True,
    device: Annotated[str, typer.Option(help="Where they are made: cpu, cuda, cuda:1 ...")] = "cpu",
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16 or bfloat16; else float16 on a GPU and float32 on a CPU.")
    ] = None,
    progress: Annotated[bool, typer.Option(help="Show progress bars.")] = True,
) -> None:
    """Compile a pipeline's UNet now, so that its first edit in another process waits for less."""
    console = Console()
    with _clean_errors():
        from fisedit_compiler.cli.compile_model import compile_model

        _check_device(device)
        made = compile_model(model, size=_size(size), guidance=guidance, device=device, dtype=dtype, progress=progress)
    what = "the program and its code" if made.lowered else "the program; calls run eagerly there, so it needs no code"
    console.print(f"compiled for {device} in {made.seconds:.0f} s: {what}", highlight=False, soft_wrap=True)
    for name, folder in made.folders.items():
        console.print(f"{name} in {folder}", markup=False, highlight=False, soft_wrap=True)


@app.command(name="eval")
def evaluate(
    pairs: Annotated[
        Path | None, typer.Argument(help="jsonl file with the fields input, edit, output and, if you like, seed.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder of the results; a run goes on where it was interrupted.")] = Path(
        "fisedit-eval"
    ),
    make_pairs: Annotated[
        int | None, typer.Option(min=1, help="Write so many pairs of the embedded model's grammar to PAIRS instead.")
    ] = None,
    model: Annotated[Path | None, typer.Option(help="Directory of a pipeline; else the embedded one.")] = None,
    clip: Annotated[Path | None, typer.Option(help="Directory of the CLIP that judges; else the embedded one.")] = None,
    features: Annotated[
        Path | None, typer.Option(help="Extractor of FID's features: TorchScript file, or a CLIP directory.")
    ] = None,
    methods: Annotated[
        list[str] | None, typer.Option(help="Methods to run (repeat, or separate by commas): sdedit, sdedit@0.4, ...")
    ] = None,
    suite: Annotated[
        str, typer.Option(help="Methods to run if none are named: methods, approximations or reuse.")
    ] = "methods",
    steps: Annotated[int, typer.Option(min=6, max=1000, help="Steps of the scheduler.")] = 25,
    guidance: Annotated[float, typer.Option(min=0.0, help="Weight of classifier-free guidance.")] = 5.0,
    seed: Annotated[
        int, typer.Option(min=0, max=LARGEST_SEED, help="Of --make-pairs; else of pairs without a seed.")
    ] = 0,
    device: Annotated[str, typer.Option(help="Where to run: cpu, cuda, cuda:1 ...")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    backend: Annotated[str, typer.Option(help="How sparse calls run: auto, eager or inductor.")] = "auto",
    shard: Annotated[
        str, typer.Option(help="i/n: run every n-th pair from the i-th on, beside other processes.")
    ] = "1/1",
    limit: Annotated[int | None, typer.Option(min=1, help="Run only so many pairs.")] = None,
    images: Annotated[bool, typer.Option(help="Keep all pictures, not only those of the contact sheet.")] = True,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Delete what an earlier evaluation left in the folder.")
    ] = False,
    report_only: Annotated[bool, typer.Option("--report-only", help="Write the report of what is there.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: torch's own choice.")] = None,
    progress: Annotated[bool, typer.Option(help="Show progress bars.")] = True,
) -> None:
    """Run pairs of captions through several ways to edit, and report what each keeps, changes and costs."""
    console = Console()
    with _clean_errors():
        from fisedit_compiler.evaluation import command

        if report_only:
            results = command.write_report(output)
        elif pairs is None:
            raise FiseditError("name the file of pairs: `fisedit eval PAIRS.jsonl`, or make one with --make-pairs N")
        elif make_pairs is not None:
            done = command.make_pairs_file(pairs, make_pairs, seed)
            console.print(done, markup=False, soft_wrap=True, highlight=False)
            return
        else:
            _set_threads(threads)
            _check_device(device)
            _check_guidance(guidance)
            evaluation = command.Evaluation(
                pairs=pairs,
                output=output,
                model=model,
                clip=clip,
                features=features,
                methods=tuple(name for names in methods or () for name in names.split(",")),
                suite=suite,
                steps=steps,
                guidance=guidance,
                seed=seed,
                device=device,
                dtype=dtype,
                backend=backend,
                shard=command.parse_shard(shard),
                limit=limit,
                images=images,
            )
            try:
                ending = command.run_evaluation(evaluation, console, fresh=fresh, progress=progress)
            except KeyboardInterrupt:
                console.print("interrupted; the same command goes on where it stopped", soft_wrap=True)
                raise typer.Exit(INTERRUPTED) from None
            results = ending.results
    console.print(command.summary_table(results))
    for line in command.check_lines(results):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(
        f"results.json, report.html and quality.md in {output}", markup=False, soft_wrap=True, highlight=False
    )
    if not results["counts"]["done"]:
        console.print("no pair could be run", style="bold red")
        raise typer.Exit(1)


def _demo_table(comparisons: Sequence[Comparison], steps: int) -> Table:
    table = Table(
        title=f"Sparse edits and dense runs of the same prompt and seed, {steps} step{'s' * (steps != 1)}",
        caption="An edit that is edited again is recorded on the way: its calls take longer.",
    )
    table.add_column("edit")
    for heading in (
        "mask\narea",
        "dense\nms/call",
        "sparse\nms/call",
        "ratio",
        "inside:\ndB to\ndense",
        "outside:\ndB to\nbase",
        "latents\noutside\nequal",
    ):
        table.add_column(heading, justify="right")
    for comparison in comparisons:
        edit = comparison.edit
        table.add_row(
            comparison.title,
            f"{edit.report.area:.1%}",
            f"{comparison.dense.ms:.1f}",
            _number(edit.report.sparse_ms),
            _number(comparison.speedup, "{:.2f}x"),
            f"{comparison.psnr_to_dense_inside:.1f}",
            f"{comparison.psnr_to_base_outside:.1f}",
            "yes" if edit.unchanged_outside else "NO",
        )
    return table


def _demo_notes(comparisons: Sequence[Comparison]) -> list[tuple[str, str]]:
    """Why calls ran otherwise than one would expect, by the titles of the edits."""
    return [(one.title, one.edit.report.note) for one in comparisons if one.edit.report.note]


def _number(value: float | None, form: str = "{:.1f}") -> str:
    return "-" if value is None else form.format(value)


def _check_output(folder: Path) -> None:
    """Fail before the work, not after it, if the pictures cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FiseditError(f"cannot write to {str(folder)!r} ({error.strerror}); choose another --output") from error


def _set_threads(threads: int | None) -> None:
    """Use so many CPU threads; torch starts as many as it is told, until the process dies of it."""
    if threads is None:
        return
    import torch

    most = max(4 * (os.cpu_count() or 1), 64)
    if threads > most:
        raise FiseditError(f"--threads {threads} is more than this machine can use; name {most} or fewer")
    torch.set_num_threads(threads)


def _size(text: str | None) -> tuple[int, int] | None:
    """Height and width of ``768`` or ``768x512``."""
    if text is None:
        return None
    numbers = text.lower().split("x")
    if len(numbers) > 2 or not all(number.isdecimal() and int(number) for number in numbers):
        raise FiseditError(f"--size {text} is no size; name pixels, such as 768, or height and width, such as 768x512")
    return int(numbers[0]), int(numbers[-1])


def _check_guidance(guidance: float) -> None:
    if not math.isfinite(guidance):
        raise FiseditError(f"--guidance {guidance} is no weight; name a finite number, such as 5")


def _check_device(device: str) -> None:
    """Fail before the work if nothing can be computed there."""
    import torch

    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise FiseditError(f"{device!r} is not a device; use --device cpu or --device cuda") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise FiseditError("no CUDA device is available here; use --device cpu")
    try:
        torch.zeros(1, device=device).item()
    except Exception as error:  # every backend that is not there raises another error
        raise FiseditError(f"nothing can be computed on {device!r} here; use --device cpu or --device cuda") from error


@contextmanager
def _clean_errors() -> Iterator[None]:
    """Print mistakes that a user can mend without a traceback, and exit with :data:`USER_ERROR`.

    Those are the errors raised on purpose, and what disks and memory do: a full disk is no defect of the program.
    """
    try:
        yield
    except (FiseditError, OSError, MemoryError) as error:
        text = str(error) or "out of memory"
        Console(stderr=True).print(f"[bold red]error:[/] {type(error).__name__}:", end=" ", soft_wrap=True)
        Console(stderr=True).print(text, markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(USER_ERROR) from error


if __name__ == "__main__":
    main()
