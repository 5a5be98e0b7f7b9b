"""What a compiled module has to say about itself: ``explain()``, ``check()``, ``bisect()``, ``stages()``.

Nothing here changes a program, and no run needs it. May import ``runtime`` and the rooms below.
"""
