"""Write the graphs shown in ``reading-the-graph.md`` again: ``python docs/generate.py``.

Between a line ``<!-- stage STAGE MODULE -->`` and ``<!-- end -->`` stands what
``compiled.stages()[STAGE].excerpt(MODULE)`` gives for the embedded model. A test compares the two.
"""

from __future__ import annotations

import re
from pathlib import Path

from fisedit_compiler import sparsify
from fisedit_compiler.inspect.stages import Stages
from fisedit_compiler.models import load_pipeline

PAGE = Path(__file__).with_name("reading-the-graph.md")
_BLOCK = re.compile(r"<!-- stage (\S+) (\S+) -->\n.*?<!-- end -->", re.DOTALL)
_PREFIX = re.compile(
    r"(?:p|slot)_(?:down_blocks|mid_block|up_blocks)_(?:\d+_)?(?:resnets|attentions)_\d+_(?:transformer_blocks_\d+_)?"
)


def embedded_stages() -> Stages:
    """The stages of the embedded model's UNet."""
    return sparsify(load_pipeline().unet).stages()


def generated(text: str, stages: Stages) -> str:
    """The page with every graph made anew. Names of weights and slots lose the part that names the block."""

    def block(match: re.Match[str]) -> str:
        stage, module = match.groups()
        lines = [_PREFIX.sub("", line) for line in stages[stage].excerpt(module).splitlines()]
        body = "\n".join(re.sub(r" {3,}# ", "  # ", line) for line in lines)
        return f"<!-- stage {stage} {module} -->\n```text\n{body}\n```\n<!-- end -->"

    return _BLOCK.sub(block, text)


if __name__ == "__main__":
    PAGE.write_text(generated(PAGE.read_text(encoding="utf-8"), embedded_stages()), encoding="utf-8")
    print(f"wrote {PAGE}")
