"""From a step to what a CPU runs of it without compiling: packed products, norms folded together, direct calls.

Only sparse graphs come here, on the way to being interpreted; ``step.py`` says what happens to them, in order. Nothing
here runs a graph. May import what the room ``lowering`` may.
"""
