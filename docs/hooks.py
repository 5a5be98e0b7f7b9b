"""What the site shows from outside of docs/: the README as its start page, notes of the repository, examples, licence.

MkDocs runs these functions (``hooks:`` in ``mkdocs.yml``). Links between those files are written for a reader of the
repository; here they are led to the pages of the site. Links that lead nowhere are left alone: MkDocs fails on them.
"""

from __future__ import annotations

import ast
import logging
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/NOTES.md": "measurements.md",
}
"""Files of the repository and the pages that they become."""
TEXTS = {"LICENSE": "LICENSE.txt", "NOTICE": "NOTICE.txt"}
"""Files that are copied as they are."""
TARGETS = PAGES | TEXTS | {"examples": "examples.md"}

_LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")
_LIST = re.compile(r"(?:[-*+]|\d+\.) ")
_SEPARATE = re.compile(r"[-*+#|>]|\d+\. |```|<!--")
logger = logging.getLogger("mkdocs.hooks.repository")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from outside of docs/."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=led_to_pages(text, Path(source).parent)))
    files.append(File.generated(config, "examples.md", content=examples_page()))
    for source, name in TEXTS.items():
        files.append(File.generated(config, name, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: object, **_: object) -> str:
    """Lead links of pages in docs/ to the pages that other files become, and warn of lists that would not be shown.

    GitHub shows lists right below a paragraph; Python-Markdown takes them for text.
    """
    fenced, before = False, ""
    for line in markdown.splitlines():
        fenced ^= line.startswith("```")
        if not fenced and _LIST.match(line) and before and not before.startswith(" ") and not _SEPARATE.match(before):
            logger.warning("%s: put an empty line above the list that starts with %r", page, line[:60])
        before = line
    return led_to_pages(markdown, Path("docs"))


def led_to_pages(text: str, folder: Path) -> str:
    """Markdown whose relative links, seen from a folder of the repository, lead to pages of the site instead."""

    def led(match: re.Match[str]) -> str:
        link, anchor = match.groups()
        path = (ROOT / folder / link).resolve().relative_to(ROOT).as_posix()
        return f"]({TARGETS.get(path, path.removeprefix('docs/'))}{anchor or ''})"

    return _LINK.sub(led, text)


def examples_page() -> str:
    """The scripts of examples/, whole, each under what its first line says."""
    parts = ["# Examples\n\nScripts that run as they are, with the embedded model: `python examples/NAME.py`.\n"]
    for file in sorted((ROOT / "examples").glob("*.py")):
        code = file.read_text(encoding="utf-8")
        summary = (ast.get_docstring(ast.parse(code)) or file.stem).splitlines()[0]
        parts.append(f"## {file.name}\n\n{summary}\n\n```python\n{code.rstrip()}\n```\n")
    return "\n".join(parts)
