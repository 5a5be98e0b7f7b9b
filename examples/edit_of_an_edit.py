"""Edit an edit: each one is recorded, so the next starts from it and keeps what it did.

Run it with ``python examples/edit_of_an_edit.py``; it writes 0.png, 1.png and 2.png into the current
directory.
"""

from fisedit_compiler import Editor
from fisedit_compiler.models import load_pipeline

PROMPTS = (
    "a cat on the left and a rocket on the right, blue background",
    "a cat on the left and a planet on the right, blue background",
    "a panda on the left and a planet on the right, blue background",
)

with Editor(load_pipeline()) as editor:
    picture = editor.generate(PROMPTS[0], seed=7)
    picture.image.save("0.png")
    for number, prompt in enumerate(PROMPTS[1:], start=1):
        picture = editor.edit(picture, prompt)
        picture.image.save(f"{number}.png")
        print(f"{number}.png: {prompt}\n{picture.report}\n")
