"""Several edits of one picture in one run: a list of prompts, one mask for all of them, one UNet call per step.

Run it with ``python examples/many_edits.py``; it writes base.png and one picture a prompt into the current directory.
A list of masks, one for each prompt, works too; without ``mask`` each prompt's mask is found.
"""

from fisedit_compiler import Editor
from fisedit_compiler.masks import ellipse_mask
from fisedit_compiler.models import load_pipeline

ANIMALS = ("dog", "fox", "panda", "frog")

with Editor(load_pipeline()) as editor:
    base = editor.generate("a cat on the left and a rocket on the right, blue background", seed=7)
    base.image.save("base.png")
    prompts = [f"a {animal} on the left and a rocket on the right, blue background" for animal in ANIMALS]
    left = ellipse_mask(64, 64, (0.2, 0.02, 0.85, 0.54))  # top, left, bottom, right
    for animal, edit in zip(ANIMALS, editor.edit_many(base, prompts, mask=left), strict=True):
        edit.image.save(f"{animal}.png")
        print(f"{animal}.png\n{edit.report}\n")

    # Each of them is recorded, and can be edited further.
    further = editor.edit(edit, "a frog on the left and a planet on the right, blue background")
    further.image.save("frog_and_planet.png")
