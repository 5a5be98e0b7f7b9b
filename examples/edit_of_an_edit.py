"""Edit an edit: each one is recorded, so the next starts from it and keeps what it did.

A turn keeps only what it wrote, so all of them can stay: the last lines go back to the first edit and try another
second turn. Run it with ``python examples/edit_of_an_edit.py``; it writes 0.png, 1.png, 2.png and 1b.png into the
current directory.
"""

from fisedit_compiler import Editor
from fisedit_compiler.models import load_pipeline

PROMPTS = (
    "a cat on the left and a rocket on the right, blue background",
    "a cat on the left and a planet on the right, blue background",
    "a panda on the left and a planet on the right, blue background",
)

with Editor(load_pipeline()) as editor:
    turns = [editor.generate(PROMPTS[0], seed=7)]
    turns[0].image.save("0.png")
    for number, prompt in enumerate(PROMPTS[1:], start=1):
        edit = editor.edit(turns[-1], prompt)
        edit.image.save(f"{number}.png")
        print(f"{number}.png: {prompt}\n{edit.report}\n")
        turns.append(edit)

    other = editor.edit(turns[1], "a dog on the left and a planet on the right, blue background")
    other.image.save("1b.png")
    print(f"1b.png, from 1.png: {other.prompt}\n{other.report}")
