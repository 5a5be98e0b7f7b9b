"""Edit a picture that was not generated here: load it, change an object, then another one.

Run it with ``python examples/edit_a_picture.py [PICTURE PROMPT]``; it writes picture.png, edited.png and again.png into
the current directory. Without arguments it draws a picture of its own, an apple on grass that no model made.
"""

import sys

import numpy as np
from PIL import Image, ImageDraw

from fisedit_compiler import Editor
from fisedit_compiler.masks import ellipse_mask
from fisedit_compiler.models import load_pipeline

PROMPT = "an apple in the center, grass field"


def drawing() -> Image.Image:
    """A red apple in front of sky and grass, drawn large and scaled down for smooth edges."""
    picture = Image.new("RGB", (1024, 1024), (150, 200, 250))
    pen = ImageDraw.Draw(picture)
    pen.rectangle((0, 680, 1024, 1024), fill=(90, 170, 70))
    pen.ellipse((312, 360, 600, 760), fill=(215, 35, 45))
    pen.ellipse((424, 360, 712, 760), fill=(215, 35, 45))
    pen.line((512, 400, 544, 264), fill=(100, 65, 30), width=28)
    pen.ellipse((544, 264, 688, 336), fill=(70, 150, 60))
    return picture.resize((256, 256), Image.Resampling.LANCZOS)


picture, prompt = (sys.argv[1], sys.argv[2]) if len(sys.argv) == 3 else (drawing(), PROMPT)
with Editor(load_pipeline()) as editor:
    base = editor.load(picture, prompt, resize=True)
    print(base.inversion)
    mask = ellipse_mask(64, 64, (0.15, 0.15, 0.85, 0.85))  # top, left, bottom, right
    edit = editor.edit(base, prompt.replace("apple", "pumpkin"), mask=mask)
    again = editor.edit(edit, prompt.replace("an apple", "a golden pumpkin"), mask=mask, record=False)

for name, image in (("picture", base.image), ("edited", edit.image), ("again", again.image)):
    image.save(f"{name}.png")
changed = np.any(np.asarray(again.image) != np.asarray(base.image), axis=-1)
print(edit.report)
print(f"{changed.mean():.1%} of the pixels changed, the mask holds {edit.report.area:.1%} of the sites")
