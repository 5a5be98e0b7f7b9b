"""Say where an edit may change the picture: boxes, polygons, several regions, and a border that fades.

Run it with ``python examples/mask_tools.py``; it writes masks.png (the outlines of what may change), borders.png (a
hard border beside a feathered one) and feathered.png into the current directory.
"""

import numpy as np

from fisedit_compiler import Editor, masks
from fisedit_compiler.errors import MaskError
from fisedit_compiler.models import load_pipeline
from fisedit_compiler.pipelines.drawing.figures import mask_contours
from fisedit_compiler.pipelines.drawing.pictures import contact_sheet, mask_overlay

HEIGHT = WIDTH = 64  # latent sites of the embedded model's pictures

# Positions are fractions of the picture, the vertical one first.
box = (0.25, 0.02, 0.8, 0.5)  # top, left, bottom, right
polygon = [(0.2, 0.15), (0.2, 0.4), (0.4, 0.52), (0.7, 0.52), (0.85, 0.4), (0.85, 0.15), (0.7, 0.02), (0.4, 0.02)]
several = masks.regions_mask(HEIGHT, WIDTH, [(0.3, 0.05, 0.5, 0.45), masks.ellipse_mask(HEIGHT, WIDTH, box)])

# What a brush or a detector leaves: specks, frayed borders and holes.
noise = np.random.default_rng(0).random((HEIGHT, WIDTH)) > 0.97
rough = several ^ masks.to_site_mask(noise, HEIGHT, WIDTH)
clean = masks.minimum_area(rough, 12)  # regions and holes of fewer than 12 sites go
print(f"{len(masks.regions(rough))} regions, and after minimum_area: {', '.join(map(str, masks.regions(clean)))}")

with Editor(load_pipeline()) as editor:
    base = editor.generate(
        "a cat on the left and a rocket on the right, blue background", seed=7, num_inference_steps=15
    )
    prompt = "a dog on the left and a rocket on the right, green background"
    hard = editor.edit(base, prompt, polygon=polygon, record=False)
    soft = editor.edit(base, prompt, polygon=polygon, feather=4, record=False)
    try:  # the drawn mask is on the left, the box on the right
        editor.edit(base, prompt, mask=clean, box=(0.0, 0.6, 1.0, 1.0))
    except MaskError as error:
        print(error)

print(soft.report)
outlines = {"box": masks.box_mask(HEIGHT, WIDTH, box), "polygon": soft.mask, "cleaned drawing": clean}
mask_contours(base.image, outlines).savefig("masks.png")
sheet = contact_sheet(
    [
        [
            (mask_overlay(base.image, soft.mask), "the polygon over the base"),
            (hard.image, "hard border"),
            (soft.image, "feather=4"),
        ]
    ]
)
sheet.save("borders.png")
soft.image.save("feathered.png")
