"""Change the prompt and let the Editor find what to compute again.

Run it with ``python examples/automatic_mask.py``; it writes base.png, edited.png and mask.png into the
current directory.
"""

from fisedit_compiler import Editor
from fisedit_compiler.models import load_pipeline

with Editor(load_pipeline()) as editor:
    base = editor.generate("a cat on the left and a rocket on the right, blue background", seed=7)
    result = editor.edit(base, "a cat on the left and a planet on the right, blue background")

base.image.save("base.png")
result.image.save("edited.png")
result.show().savefig("mask.png")
print(result.report)
