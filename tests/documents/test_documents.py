"""The documents: every test and file they name exists, and their Python is Python."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from fisedit_compiler.evaluation.pages.document import document, read_results

ROOT = Path(__file__).parents[2]
DOCUMENTS = (
    "README.md",
    "CONTRIBUTING.md",
    "benchmarks/NOTES.md",
    *(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md"))),
)


@pytest.fixture(params=DOCUMENTS)
def text(request: pytest.FixtureRequest) -> str:
    return (ROOT / request.param).read_text(encoding="utf-8")


def test_named_tests_and_files_exist(text: str):
    for path, name in re.findall(r"`((?:tests|fisedit_compiler)/[\w/]+\.py)(?:::(\w+))?`", text):
        source = (ROOT / path).read_text(encoding="utf-8")
        assert not name or re.search(rf"^def {name}\(", source, re.MULTILINE), f"{path}::{name}"


def test_named_results_exist(text: str):
    for name in re.findall(r"`(?:benchmarks/results/)?((?:cpu|h100|h200)\w*\.(?:json|txt))`", text):
        assert (ROOT / "benchmarks/results" / name).exists(), name


def test_code_blocks_parse(text: str):
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        ast.parse(block)


def test_links_lead_somewhere(text: str):
    for link in re.findall(r"(?<!!)\[[^\]]+\]\(([^)#]+)\)", text):
        assert any((folder / link).exists() for folder in (ROOT, ROOT / "docs")), link


def test_nobody_typed_the_figures_of_the_quality_page():
    """Its last lines are the command that writes it. Pictures are not drawn again, since their folder is gone."""
    text = (ROOT / "docs/quality.md").read_text(encoding="utf-8")
    command = re.findall(r"^\$ (python -m .*pages\.document .*)$", text, re.MULTILINE)[-1]
    results = [read_results(ROOT / word) for word in shlex.split(command) if word.endswith(".json")]
    notes = re.findall(r"--note ('[^']*')", command)
    written = document(
        results, command, "images/quality.svg", [shlex.split(note)[0] for note in notes], "images/quality.jpg"
    )
    assert written == text


def test_a_program_prints_what_the_documents_show():
    """Not word for word, since a pass may rename a node; the operations of the block shown must be those."""
    from tests.support.compiled import model_and_compiled

    (program,) = model_and_compiled()[1].programs
    document = (ROOT / "docs/how-it-works.md").read_text(encoding="utf-8")
    before, after = re.findall(r"```python\n(.*?)```", document, re.DOTALL)[:2]
    for shown, graph, first in ((before, program.recording, "norm1_weight"), (after, program.step, "norm1_statistics")):
        operations = re.findall(r"= (\w+\.\w+)\(", shown)
        calls = [node for node in graph.nodes if node.op == "call_function"]
        start = next(i for i, node in enumerate(calls) if any(first in str(argument) for argument in node.args))
        printed = [str(node.target).rpartition(".")[0] for node in calls[start : start + len(operations)]]
        assert printed == operations


def test_the_graphs_on_the_page_are_those_of_the_embedded_model():
    """``python docs/generate.py`` writes them; line numbers are those of the diffusers that the tests run with."""
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs/generate.py")
    assert spec is not None and spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    text = generate.PAGE.read_text(encoding="utf-8")
    assert generate.generated(text, generate.embedded_stages()) == text
    assert text.count("```text") == 6
