"""A stock diffusers script; the lines marked (1) to (4) are all that sparse editing adds to it.

Run it with ``python examples/edit_with_mask.py``; it writes base.png and edited.png into the current
directory.
"""

import torch

import fisedit_compiler
from fisedit_compiler.masks import ellipse_mask
from fisedit_compiler.models import load_pipeline

pipe = load_pipeline()  # any StableDiffusionPipeline.from_pretrained(...) does
pipe.unet = fisedit_compiler.sparsify(pipe.unet)  # (1) compile

settings = {"num_inference_steps": 25, "guidance_scale": 5.0}

with pipe.unet.record() as recording:  # (2) record what edits will need
    base = pipe(
        "a cat on the left and a rocket on the right, blue background",
        generator=torch.Generator().manual_seed(7),
        **settings,
    ).images[0]

mask = ellipse_mask(64, 64, (0.2, 0.02, 0.85, 0.54))  # (3) what may change: top, left, bottom, right
with pipe.unet.edit(recording, mask=mask) as session:  # (4) compute only that
    edited = pipe(
        "a dog on the left and a rocket on the right, blue background",
        generator=torch.Generator().manual_seed(7),  # the base's seed: outside the mask nothing may move
        **settings,
    ).images[0]

base.save("base.png")
edited.save("edited.png")
seconds = sum(duration for _, duration in session.timings)
print(f"{session.call} sparse UNet calls in {seconds:.1f} s; wrote base.png and edited.png")
