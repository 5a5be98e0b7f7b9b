"""From rewritten graphs to what runs: whole programs, staged steps, cut products, Inductor.

Nothing here runs a program and no layout is decided here. May import ``passes`` and the rooms below.
"""
